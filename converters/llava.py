"""LLaVA-1.5: published names, the names of transformers since 4.52, and what transformers 5 saves.

The model stops at the chosen CLIP layer, so later blocks have no place and the last norm is never used.
"""

from __future__ import annotations

from mmjax.converters import decoder
from mmjax.converters import transforms as to
from mmjax.converters.table import Rule, Table, linear, norm, optional

_S, _T = "vision.encoder.layers.{i}", "vision.blocks"
_QKV = tuple(f"{_S}.self_attn.{x}_proj" for x in "qkv")

TABLE = Table(
    rules=(
        *decoder.RULES,
        Rule("vision.embeddings.class_embedding", "vision.class_embed"),
        Rule("vision.embeddings.patch_embedding.weight", "vision.patch", to.patches(3)),
        Rule("vision.embeddings.position_embedding.weight", "vision.positions"),
        *norm("vision.pre_layrnorm", "vision.pre_norm"),  # the published spelling
        *optional(
            *norm(f"{_S}.layer_norm1", f"{_T}.norm1"),
            Rule(tuple(f"{x}.weight" for x in _QKV), f"{_T}.qkv", to.fuse_qkv),
            Rule(tuple(f"{x}.bias" for x in _QKV), f"{_T}.qkv_bias", to.fuse_qkv_bias),
            *linear(f"{_S}.self_attn.out_proj", f"{_T}.o", to.merge_heads),
            *norm(f"{_S}.layer_norm2", f"{_T}.norm2"),
            *linear(f"{_S}.mlp.fc1", f"{_T}.fc1"),
            *linear(f"{_S}.mlp.fc2", f"{_T}.fc2"),
        ),
        *linear("projector.linear_1", "projector.fc1"),
        *linear("projector.linear_2", "projector.fc2"),
    ),
    ignore=(*decoder.IGNORE, r"vision\.post_layernorm\.(weight|bias)", r"vision\.embeddings\.position_ids"),
    prefixes=(
        ("model.language_model.", "text."),
        ("language_model.model.", "text."),
        ("language_model.lm_head.", "lm_head."),
        ("model.vision_tower.vision_model.", "vision."),
        ("model.vision_tower.", "vision."),
        ("vision_tower.vision_model.", "vision."),
        ("vision_tower.", "vision."),
        ("model.multi_modal_projector.", "projector."),
        ("multi_modal_projector.", "projector."),
    ),
)
