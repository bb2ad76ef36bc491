"""Qwen2.5-Omni: the whole model as published, or its thinker as transformers saves it. The talker is ignored."""

from __future__ import annotations

from mmjax.converters import decoder
from mmjax.converters import transforms as to
from mmjax.converters.table import Rule, Table, linear

from . import qwen_omni, qwen_vl

_V = "vision.blocks.{i}.attn"

TABLE = Table(
    rules=(
        *decoder.RULES,
        *(rule for rule in qwen_vl.QWEN2_5 if not rule.target.startswith("vision.layers.qkv")),
        Rule(tuple(f"{_V}.{x}.weight" for x in "qkv"), "vision.layers.qkv", to.stack_heads),
        Rule(tuple(f"{_V}.{x}.bias" for x in "qkv"), "vision.layers.qkv_bias", to.stack_heads_bias),
        *qwen_omni.LAYERS,
        Rule(qwen_omni.biases("qv"), "audio.layers.qkv_bias", to.stack_qv_bias),  # keys have none
        *linear("audio.conv1", "audio.conv1"),
        *linear("audio.conv2", "audio.conv2"),
        *linear("audio.proj", "audio.project"),
    ),
    ignore=(*decoder.IGNORE, *qwen_vl.IGNORE, r"audio\.audio_bos_eos_token\.weight", r"(talker|token2wav)\..*"),
    prefixes=qwen_omni.PREFIXES,
)
