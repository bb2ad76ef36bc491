"""Qwen3-VL, dense and with experts: published names, and what transformers 5 saves."""

from __future__ import annotations

from mmjax.converters import decoder
from mmjax.converters.table import Rule, Table

from . import qwen_vl

_VISION = qwen_vl.qwen3("merger", "deepstack_merger_list", ("norm", "linear_fc1", "linear_fc2"))


def _table(experts: tuple[Rule, ...], otherwise: Table | None = None) -> Table:
    return Table(
        rules=(*decoder.RULES, *experts, *_VISION),
        ignore=(*decoder.IGNORE, *qwen_vl.IGNORE),
        prefixes=qwen_vl.PREFIXES,
        otherwise=otherwise,
    )


TABLE = _table(decoder.EXPERTS, _table(decoder.TRANSPOSED_EXPERTS))
