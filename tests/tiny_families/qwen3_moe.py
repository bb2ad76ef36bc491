"""A tiny Qwen3 with experts, each in tensors of its own, and one layer without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from tiny import Shapes
from tiny_families import qwen3_vl

SEED = 0


def build(size: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    tokenizer, files, _ = qwen3_vl.build(size, qwen3_vl.EXPERTS)
    vocabulary = files["config.json"]["text_config"]["vocab_size"]
    files["config.json"] = qwen3_vl.text_config(size, vocabulary, qwen3_vl.EXPERTS) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "eos_token_id": files["config.json"]["text_config"]["eos_token_id"],
        "norm_topk_prob": False,
        "mlp_only_layers": [0],
        "use_sliding_window": False,
        "sliding_window": None,
    }
    shapes: Shapes = {"lm_head.weight": (vocabulary, size["width"])}
    qwen3_vl.put_text(shapes, "model.", size, vocabulary, qwen3_vl.EXPERTS, apart=True)
    plain: Shapes = {}
    qwen3_vl.put_text(plain, "model.", {**size, "layers": 1}, vocabulary, 0)
    shapes = {name: shape for name, shape in shapes.items() if ".layers.0.mlp." not in name} | plain
    return tokenizer, {name: files[name] for name in files if "preprocessor" not in name}, shapes
