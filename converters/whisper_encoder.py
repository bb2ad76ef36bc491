"""Rules of Whisper's encoder, which audio families share. Key projections have no bias."""

from __future__ import annotations

from mmjax.converters import transforms as to
from mmjax.converters.table import Rule, linear, norm

_S, _T = "audio.layers.{i}", "audio.layers"


def _projections(names: str, parameter: str) -> tuple[str, ...]:
    return tuple(f"{_S}.self_attn.{x}_proj.{parameter}" for x in names)


RULES = (
    *linear("audio.conv1", "audio.conv1"),
    *linear("audio.conv2", "audio.conv2"),
    Rule("audio.embed_positions.weight", "audio.positions"),
    *norm(f"{_S}.self_attn_layer_norm", f"{_T}.norm1"),
    Rule(_projections("qkv", "weight"), f"{_T}.qkv", to.stack_heads),
    Rule(_projections("qv", "bias"), f"{_T}.qkv_bias", to.stack_qv_bias),
    *linear(f"{_S}.self_attn.out_proj", f"{_T}.o", to.merge_heads),
    *norm(f"{_S}.final_layer_norm", f"{_T}.norm2"),
    *linear(f"{_S}.fc1", f"{_T}.fc1"),
    *linear(f"{_S}.fc2", f"{_T}.fc2"),
    *norm("audio.layer_norm", "audio.norm"),
)
