"""Qwen2-VL: published names, the names of transformers since 4.52, and what transformers 5 saves."""

from __future__ import annotations

from mmjax.converters import decoder
from mmjax.converters import transforms as to
from mmjax.converters.table import Rule, Table, linear, norm

_S, _T = "vision.blocks.{i}", "vision.blocks"

TABLE = Table(
    rules=(
        *decoder.RULES,
        Rule("vision.patch_embed.proj.weight", "vision.patch", to.patches(3, 2)),  # (channel, frame, y, x)
        *norm(f"{_S}.norm1", f"{_T}.norm1"),
        *linear(f"{_S}.attn.qkv", f"{_T}.qkv", to.split_qkv, to.split_qkv_bias),
        *linear(f"{_S}.attn.proj", f"{_T}.o", to.merge_heads),
        *norm(f"{_S}.norm2", f"{_T}.norm2"),
        *linear(f"{_S}.mlp.fc1", f"{_T}.fc1"),
        *linear(f"{_S}.mlp.fc2", f"{_T}.fc2"),
        *norm("vision.merger.ln_q", "vision.merge_norm"),
        *linear("vision.merger.mlp.0", "vision.merge1"),
        *linear("vision.merger.mlp.2", "vision.merge2"),
    ),
    ignore=(*decoder.IGNORE, r"vision\.rotary_pos_emb\.inv_freq"),
    prefixes=(
        ("model.language_model.", "text."),
        ("language_model.model.", "text."),
        ("language_model.lm_head.", "lm_head."),
        ("model.visual.", "vision."),
        ("visual.", "vision."),
        ("model.", "text."),
    ),
)
