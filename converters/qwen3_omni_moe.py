"""Qwen3-Omni: the whole model as published, or its thinker as transformers saves it. The talker is ignored."""

from __future__ import annotations

from mmjax.converters import decoder
from mmjax.converters import transforms as to
from mmjax.converters.table import Rule, Table, linear

from . import qwen_omni, qwen_vl

_RULES = (
    *qwen_vl.qwen3("merger", "merger_list", ("ln_q", "mlp.0", "mlp.2")),
    *qwen_omni.LAYERS,
    Rule(qwen_omni.biases("qkv"), "audio.layers.qkv_bias", to.stack_heads_bias),
    *(rule for n in (1, 2, 3) for rule in linear(f"audio.conv2d{n}", f"audio.conv{n}")),
    Rule("audio.conv_out.weight", "audio.conv_out", to.transpose),
    *linear("audio.proj1", "audio.project1"),
    *linear("audio.proj2", "audio.project2"),
)


def _table(experts: tuple[Rule, ...], otherwise: Table | None = None) -> Table:
    return Table(
        rules=(*decoder.RULES, *experts, *_RULES),
        ignore=(*decoder.IGNORE, *qwen_vl.IGNORE, r"(talker|code2wav)\..*"),
        prefixes=qwen_omni.PREFIXES,
        otherwise=otherwise,
    )


TABLE = _table(decoder.EXPERTS, _table(decoder.TRANSPOSED_EXPERTS))
