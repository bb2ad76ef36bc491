"""MiniCPM-V 2.6: published names. The resampler's positions are computed, not loaded."""

from __future__ import annotations

from mmjax.converters import decoder, siglip
from mmjax.converters import transforms as to
from mmjax.converters.table import Rule, Table, linear, norm

TABLE = Table(
    rules=(
        *decoder.RULES,
        *siglip.RULES,
        Rule("resampler.query", "resampler.query"),
        Rule("resampler.kv_proj.weight", "resampler.key", to.transpose),
        *norm("resampler.ln_q", "resampler.query_norm"),
        *norm("resampler.ln_kv", "resampler.key_norm"),
        Rule("resampler.attn.in_proj_weight", "resampler.qkv", to.split_heads),
        Rule("resampler.attn.in_proj_bias", "resampler.qkv_bias", to.split_heads_bias),
        *linear("resampler.attn.out_proj", "resampler.o", to.merge_heads),
        *norm("resampler.ln_post", "resampler.last_norm"),
        Rule("resampler.proj", "resampler.out"),  # applied from the right, as it is stored
    ),
    ignore=(*decoder.IGNORE, *siglip.IGNORE, r"resampler\.pos_embed"),
    prefixes=(("llm.lm_head.", "lm_head."), ("llm.model.", "text."), ("vpm.", "vision.")),
)
