"""Qwen2.5-VL: published names, the names of transformers since 4.52, and what transformers 5 saves."""

from __future__ import annotations

from mmjax.converters import decoder, patches
from mmjax.converters.table import Table

TABLE = Table(
    rules=(*decoder.RULES, *patches.WINDOWED),
    ignore=(*decoder.IGNORE, *patches.IGNORE),
    prefixes=patches.PREFIXES,
)
