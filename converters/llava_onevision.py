"""LLaVA-OneVision."""

from __future__ import annotations

from mmjax.converters import decoder
from mmjax.converters.llava_layout import IGNORE, PREFIXES, RULES
from mmjax.converters.table import Rule, Table

TABLE = decoder.any_text_model(
    Table(
        rules=(*RULES, Rule("image_newline", "newline")),
        ignore=IGNORE,
        prefixes=(*PREFIXES, ("model.image_newline", "image_newline")),
    )
)
