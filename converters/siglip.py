"""Rules of SigLIP's image tower, which families share.

A model ends at the hidden state it uses: later layers, or the last norm, may be left out.
"""

from __future__ import annotations

from mmjax.converters import transforms as to
from mmjax.converters.table import Rule, linear, norm, optional

_S, _T = "vision.encoder.layers.{i}", "vision.layers"
_QKV = tuple(f"{_S}.self_attn.{x}_proj" for x in "qkv")

RULES = (
    *linear("vision.embeddings.patch_embedding", "vision.patch", to.patches(3)),
    Rule("vision.embeddings.position_embedding.weight", "vision.positions"),
    *optional(
        *norm(f"{_S}.layer_norm1", f"{_T}.norm1"),
        Rule(tuple(f"{x}.weight" for x in _QKV), f"{_T}.qkv", to.stack_heads),
        Rule(tuple(f"{x}.bias" for x in _QKV), f"{_T}.qkv_bias", to.stack_heads_bias),
        *linear(f"{_S}.self_attn.out_proj", f"{_T}.o", to.merge_heads),
        *norm(f"{_S}.layer_norm2", f"{_T}.norm2"),
        *linear(f"{_S}.mlp.fc1", f"{_T}.fc1"),
        *linear(f"{_S}.mlp.fc2", f"{_T}.fc2"),
        *norm("vision.post_layernorm", "vision.last_norm"),
    ),
)

# The attention-pooled summary of a picture, which no language model reads, and indices that follow from the sizes.
IGNORE = (r"vision\.head\..*", r"vision\.embeddings\.position_ids")
