"""Rules of the Llama-type decoder, which families share. A model without q, k, v biases has no `qkv_bias`, and such
tensors of its checkpoint would be unclaimed.
"""

from __future__ import annotations

import dataclasses

from mmjax.converters import transforms as to
from mmjax.converters.table import Rule, Table, linear

_S, _T = "text.layers.{i}", "text.layers.{i}"
_QKV = tuple(f"{_S}.self_attn.{x}_proj" for x in "qkv")

RULES = (
    Rule("text.embed_tokens.weight", "text.embed"),
    Rule(f"{_S}.input_layernorm.weight", f"{_T}.attn_norm"),
    Rule(tuple(f"{x}.weight" for x in _QKV), f"{_T}.qkv", to.fuse_qkv),
    Rule(tuple(f"{x}.bias" for x in _QKV), f"{_T}.qkv_bias", to.fuse_qkv_bias),
    Rule(f"{_S}.self_attn.q_norm.weight", f"{_T}.q_norm"),  # Qwen3's
    Rule(f"{_S}.self_attn.k_norm.weight", f"{_T}.k_norm"),
    Rule(f"{_S}.self_attn.o_proj.weight", f"{_T}.o", to.merge_heads),
    Rule(f"{_S}.self_attn.o_proj.bias", f"{_T}.o_bias"),
    Rule(f"{_S}.post_attention_layernorm.weight", f"{_T}.mlp_norm"),
    Rule((f"{_S}.mlp.gate_proj.weight", f"{_S}.mlp.up_proj.weight"), f"{_T}.gate_up", to.fuse_gate_up),
    Rule((f"{_S}.mlp.gate_proj.bias", f"{_S}.mlp.up_proj.bias"), f"{_T}.gate_up_bias", to.stack),
    *linear(f"{_S}.mlp.down_proj", f"{_T}.down"),
    Rule("text.norm.weight", "text.norm"),
    Rule("lm_head.weight", "text.head", optional=True),  # a tied head is the embedding
)

# Phi-3 stores q, k, v in one tensor, and gate and up in another.
FUSED = (
    Rule(f"{_S}.self_attn.qkv_proj.weight", f"{_T}.qkv", to.regroup_qkv),
    Rule(f"{_S}.mlp.gate_up_proj.weight", f"{_T}.gate_up", to.split_gate_up),
)

_EXPERT = f"{_S}.mlp.experts.{{j}}"
_ROUTED = (
    Rule(f"{_S}.mlp.gate.weight", f"{_T}.experts.router", to.transpose),
    Rule((f"{_EXPERT}.gate_proj.weight", f"{_EXPERT}.up_proj.weight"), f"{_T}.experts.gate_up", to.join_gate_up),
    Rule(f"{_EXPERT}.down_proj.weight", f"{_T}.experts.down", to.transpose),
)
# Experts one by one, or all in one tensor as published: [experts, in, out].
EXPERTS = (
    *_ROUTED,
    Rule(f"{_S}.mlp.experts.gate_up_proj", f"{_T}.experts.gate_up"),
    Rule(f"{_S}.mlp.experts.down_proj", f"{_T}.experts.down"),
)
# As transformers 5 saves them, under the same names: [experts, out, in]. One of the two tensors may be square, never
# both, so that the shapes of the two together always tell which layout it is.
TRANSPOSED_EXPERTS = (
    *_ROUTED,
    Rule(f"{_S}.mlp.experts.gate_up_proj", f"{_T}.experts.gate_up", to.transpose_experts),
    Rule(f"{_S}.mlp.experts.down_proj", f"{_T}.experts.down", to.transpose_experts),
)

# Old checkpoints carry the rotary tables, which follow from the config.
IGNORE = (r"text\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"text\.rotary_emb\.inv_freq")


def any_text_model(table: Table) -> Table:
    """The table of a family that may have any of the text models, with the rules of those that are fused or have
    experts."""
    other = dataclasses.replace(table, rules=(*table.rules, *FUSED, *TRANSPOSED_EXPERTS))
    return dataclasses.replace(table, rules=(*table.rules, *FUSED, *EXPERTS), otherwise=other)
