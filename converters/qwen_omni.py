"""Rules of the Omni audio towers, and the prefixes of the thinker's parts in Omni checkpoints."""

from __future__ import annotations

from mmjax.converters import transforms as to
from mmjax.converters.table import Rule, linear, norm

_S, _T = "audio.layers.{i}", "audio.layers"


def biases(names: str) -> tuple[str, ...]:
    """The biases of some of the projections q, k, v."""
    return tuple(f"{_S}.self_attn.{x}_proj.bias" for x in names)


LAYERS = (
    *norm(f"{_S}.self_attn_layer_norm", f"{_T}.norm1"),
    Rule(tuple(f"{_S}.self_attn.{x}_proj.weight" for x in "qkv"), f"{_T}.qkv", to.stack_heads),
    *linear(f"{_S}.self_attn.out_proj", f"{_T}.o", to.merge_heads),
    *norm(f"{_S}.final_layer_norm", f"{_T}.norm2"),
    *linear(f"{_S}.fc1", f"{_T}.fc1"),
    *linear(f"{_S}.fc2", f"{_T}.fc2"),
    *norm("audio.ln_post", "audio.norm"),
)

# as published (thinker.model.layers), of the thinker alone, and as transformers names the parts in memory
PREFIXES = tuple(
    (whole + old, new)
    for whole in ("thinker.", "")
    for old, new in (
        ("model.language_model.", "text."),
        ("model.audio_tower.", "audio."),
        ("model.visual.", "vision."),
        ("audio_tower.", "audio."),
        ("visual.", "vision."),
        ("lm_head.", "lm_head."),
        ("model.", "text."),
    )
)
