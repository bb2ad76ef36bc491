"""Text-only language models, by their published names; experts one by one, or all in one tensor."""

from __future__ import annotations

from mmjax.converters import decoder
from mmjax.converters.table import Rule, Table


def _table(experts: tuple[Rule, ...], otherwise: Table | None = None) -> Table:
    return Table(
        rules=(*decoder.RULES, *decoder.FUSED, *experts),
        ignore=decoder.IGNORE,
        prefixes=(("model.", "text."),),
        otherwise=otherwise,
    )


TABLE = _table(decoder.EXPERTS, _table(decoder.TRANSPOSED_EXPERTS))
