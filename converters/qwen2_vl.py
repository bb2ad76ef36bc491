"""Qwen2-VL: published names, the names of transformers since 4.52, and what transformers 5 saves."""

from __future__ import annotations

from mmjax.converters import decoder
from mmjax.converters.table import Table

from . import qwen_vl

TABLE = Table(
    rules=(*decoder.RULES, *qwen_vl.QWEN2),
    ignore=(*decoder.IGNORE, *qwen_vl.IGNORE),
    prefixes=qwen_vl.PREFIXES,
)
