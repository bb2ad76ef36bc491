"""Qwen3-VL, dense and with experts: published names, and what transformers 5 saves."""

from __future__ import annotations

from mmjax.converters import decoder, patches
from mmjax.converters.table import Rule, Table

_VISION = patches.tapped("merger", "deepstack_merger_list", ("norm", "linear_fc1", "linear_fc2"))


def _table(experts: tuple[Rule, ...], otherwise: Table | None = None) -> Table:
    return Table(
        rules=(*decoder.RULES, *experts, *_VISION),
        ignore=(*decoder.IGNORE, *patches.IGNORE),
        prefixes=patches.PREFIXES,
        otherwise=otherwise,
    )


TABLE = _table(decoder.EXPERTS, _table(decoder.TURNED_EXPERTS))
