"""Whisper: published names, with or without the leading `model.`. Key projections have no bias; the head is tied."""

from __future__ import annotations

from mmjax.converters import transforms as to
from mmjax.converters.table import Rule, Table, linear, norm

from . import whisper_encoder

_D = "text.layers.{i}"


def _projections(attention: str, names: str, parameter: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{x}_proj.{parameter}" for x in names)


TABLE = Table(
    rules=(
        *whisper_encoder.RULES,
        Rule("text.embed_tokens.weight", "text.embed"),
        Rule("text.embed_positions.weight", "text.positions"),
        *norm(f"{_D}.self_attn_layer_norm", f"{_D}.attn_norm"),
        Rule(_projections(f"{_D}.self_attn", "qkv", "weight"), f"{_D}.qkv", to.fuse_qkv),
        Rule(_projections(f"{_D}.self_attn", "qv", "bias"), f"{_D}.qkv_bias", to.fuse_qv_bias),
        *linear(f"{_D}.self_attn.out_proj", f"{_D}.o", to.merge_heads),
        *norm(f"{_D}.encoder_attn_layer_norm", f"{_D}.cross_norm"),
        *linear(f"{_D}.encoder_attn.q_proj", f"{_D}.cross_q", to.fuse_heads, to.fold),
        Rule(_projections(f"{_D}.encoder_attn", "kv", "weight"), f"{_D}.cross_kv", to.fuse_heads),
        Rule(f"{_D}.encoder_attn.v_proj.bias", f"{_D}.cross_kv_bias", to.fuse_v_bias),
        *linear(f"{_D}.encoder_attn.out_proj", f"{_D}.cross_o", to.merge_heads),
        *norm(f"{_D}.final_layer_norm", f"{_D}.mlp_norm"),
        *linear(f"{_D}.fc1", f"{_D}.fc1"),
        *linear(f"{_D}.fc2", f"{_D}.fc2"),
        *norm("text.layer_norm", "text.norm"),
    ),
    ignore=(r"proj_out\.weight",),  # equal to the embedding
    prefixes=(
        ("model.encoder.", "audio."),
        ("model.decoder.", "text."),
        ("encoder.", "audio."),
        ("decoder.", "text."),
    ),
)
