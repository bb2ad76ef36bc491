"""LLaVA-1.5."""

from __future__ import annotations

from mmjax.converters import decoder
from mmjax.converters.llava_layout import IGNORE, PREFIXES, RULES
from mmjax.converters.table import Table

TABLE = decoder.any_text_model(Table(rules=RULES, ignore=IGNORE, prefixes=PREFIXES))
