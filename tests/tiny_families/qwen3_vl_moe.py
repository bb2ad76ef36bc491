"""A tiny Qwen3-VL with experts, laid out as published: input before output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from tiny import Shapes
from tiny_families import qwen3_vl

SEED = 0


def build(size: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    return qwen3_vl.build(size, qwen3_vl.EXPERTS)
