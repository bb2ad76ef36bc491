"""Text-only language models, by their published names; experts one by one, or all in one tensor."""

from __future__ import annotations

from mmjax.converters import decoder
from mmjax.converters.table import Table

TABLE = decoder.any_text_model(
    Table(rules=decoder.RULES, ignore=decoder.IGNORE, prefixes=(("model.", "text."),)),
)
