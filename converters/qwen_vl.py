"""Rules of the Qwen vision towers, by generation, and the prefixes of the parts in Qwen checkpoints."""

from __future__ import annotations

from mmjax.converters import transforms as to
from mmjax.converters.table import Rule, linear, norm

_S, _T = "vision.blocks.{i}", "vision.layers"

_COMMON = (
    Rule("vision.patch_embed.proj.weight", "vision.patch", to.patches(3, 2)),  # (channel, frame, y, x)
    *linear(f"{_S}.attn.qkv", f"{_T}.qkv", to.split_heads, to.split_heads_bias),
    *linear(f"{_S}.attn.proj", f"{_T}.o", to.merge_heads),
)
_MERGE = (*linear("vision.merger.mlp.0", "vision.merger.fc1"), *linear("vision.merger.mlp.2", "vision.merger.fc2"))

QWEN2 = (
    *_COMMON,
    *norm(f"{_S}.norm1", f"{_T}.norm1"),
    *norm(f"{_S}.norm2", f"{_T}.norm2"),
    *linear(f"{_S}.mlp.fc1", f"{_T}.fc1"),
    *linear(f"{_S}.mlp.fc2", f"{_T}.fc2"),
    *norm("vision.merger.ln_q", "vision.merger.norm"),
    *_MERGE,
)
QWEN2_5 = (
    *_COMMON,
    Rule(f"{_S}.norm1.weight", f"{_T}.norm1"),
    Rule(f"{_S}.norm2.weight", f"{_T}.norm2"),
    Rule((f"{_S}.mlp.gate_proj.weight", f"{_S}.mlp.up_proj.weight"), f"{_T}.gate_up", to.fuse_gate_up),
    Rule((f"{_S}.mlp.gate_proj.bias", f"{_S}.mlp.up_proj.bias"), f"{_T}.gate_up_bias", to.stack),
    *linear(f"{_S}.mlp.down_proj", f"{_T}.down"),
    Rule("vision.merger.ln_q.weight", "vision.merger.norm"),
    *_MERGE,
)


def qwen3(final: str, inner: str, parts: tuple[str, str, str]) -> tuple[Rule, ...]:
    """Qwen3-VL's and Qwen3-Omni's, which name them differently: the final merger, the list of DeepStack mergers, and
    the parts of each: norm and the two dense layers."""
    rules: list[Rule] = []
    for source, target in ((final, "vision.merger"), (f"{inner}.{{i}}", "vision.deepstack_mergers")):
        rules += norm(f"vision.{source}.{parts[0]}", f"{target}.norm")
        rules += linear(f"vision.{source}.{parts[1]}", f"{target}.fc1")
        rules += linear(f"vision.{source}.{parts[2]}", f"{target}.fc2")
    return (
        *_COMMON,
        Rule("vision.patch_embed.proj.bias", "vision.patch_bias"),
        Rule("vision.pos_embed.weight", "vision.positions"),
        *norm(f"{_S}.norm1", f"{_T}.norm1"),
        *norm(f"{_S}.norm2", f"{_T}.norm2"),
        *linear(f"{_S}.mlp.linear_fc1", f"{_T}.fc1"),
        *linear(f"{_S}.mlp.linear_fc2", f"{_T}.fc2"),
        *rules,
    )


IGNORE = (r"vision\.rotary_pos_emb\.inv_freq",)
PREFIXES = (
    ("model.language_model.", "text."),
    ("language_model.model.", "text."),
    ("language_model.lm_head.", "lm_head."),
    ("model.visual.", "vision."),
    ("visual.", "vision."),
    ("model.", "text."),
)
