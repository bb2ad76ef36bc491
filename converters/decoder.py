"""Rules of the Llama-type text decoder, which families share. Qwen2's has q, k, v biases; a model without them has no
`qkv_bias` and such tensors are then unclaimed.
"""

from __future__ import annotations

from mmjax.converters import transforms as to
from mmjax.converters.table import Rule

_S, _T = "text.layers.{i}", "text.layers.{i}"
_QKV = tuple(f"{_S}.self_attn.{x}_proj" for x in "qkv")

RULES = (
    Rule("text.embed_tokens.weight", "text.embed"),
    Rule(f"{_S}.input_layernorm.weight", f"{_T}.attn_norm"),
    Rule(tuple(f"{x}.weight" for x in _QKV), f"{_T}.qkv", to.fuse_qkv),
    Rule(tuple(f"{x}.bias" for x in _QKV), f"{_T}.qkv_bias", to.fuse_qkv_bias),
    Rule(f"{_S}.self_attn.o_proj.weight", f"{_T}.o", to.merge_heads),
    Rule(f"{_S}.post_attention_layernorm.weight", f"{_T}.mlp_norm"),
    Rule((f"{_S}.mlp.gate_proj.weight", f"{_S}.mlp.up_proj.weight"), f"{_T}.gate_up", to.fuse_gate_up),
    Rule(f"{_S}.mlp.down_proj.weight", f"{_T}.down", to.transpose),
    Rule("text.norm.weight", "text.norm"),
    Rule("lm_head.weight", "text.head", optional=True),  # tied heads have no place of their own
)

# Phi-3 stores q, k, v in one tensor, and gate and up in another.
FUSED = (
    Rule(f"{_S}.self_attn.qkv_proj.weight", f"{_T}.qkv", to.regroup_qkv),
    Rule(f"{_S}.mlp.gate_up_proj.weight", f"{_T}.gate_up", to.split_gate_up),
)

# Old checkpoints carry the rotary tables, which follow from the config.
IGNORE = (r"text\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"text\.rotary_emb\.inv_freq")
