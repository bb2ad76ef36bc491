"""A tiny Qwen3-VL: heads wider than width / num_heads, two DeepStack layers, a table of 6 x 6 positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from tiny import (
    QWEN_SPECIAL,
    QWEN_TEMPLATE,
    QWEN_WORDS,
    Shapes,
    byte_level,
    host_files,
    put_layer,
    put_norm,
    table_rows,
)

SEED = 1
HEAD, SIDE, TAPS = 24, 6, 2
EXPERTS, TOP = 6, 2


def expert_mlp(size: Mapping[str, int]) -> int:
    """Never the width: transformers infers the layout of an expert from its shape."""
    return 3 * size["mlp"] // 8


def build(size: Mapping[str, int], experts: int = 0) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    """With `experts`, they replace every feed-forward."""
    tokenizer = byte_level(QWEN_SPECIAL, QWEN_WORDS)
    ids = {token: tokenizer.token_to_id(token) for token in QWEN_SPECIAL}
    vocabulary, kind = table_rows(tokenizer), "qwen3_vl_moe" if experts else "qwen3_vl"
    text = text_config(size, vocabulary, experts) | {
        "model_type": f"{kind}_text", "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 4, 4], "rope_type": "default"},
    }  # fmt: skip
    config = {
        "architectures": [f"Qwen3VL{'Moe' * bool(experts)}ForConditionalGeneration"], "model_type": kind,
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False, "text_config": text,
        "vision_config": {
            "deepstack_visual_indexes": list(range(TAPS)), "depth": size["tower_layers"],
            "hidden_act": "gelu_pytorch_tanh", "hidden_size": size["tower_width"], "in_channels": 3,
            "intermediate_size": size["tower_mlp"], "model_type": kind, "num_heads": size["tower_heads"],
            "num_position_embeddings": SIDE**2, "out_hidden_size": size["width"], "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    }  # fmt: skip
    eyes = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    generation = {
        "bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"], "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "top_k": 20, "top_p": 0.8, "temperature": 0.7,
    }  # fmt: skip
    words = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "additional_special_tokens": QWEN_SPECIAL[1:],
        "model_max_length": 32768, "chat_template": QWEN_TEMPLATE,
    }  # fmt: skip
    image = eyes | {
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor",
        "size": {"longest_edge": 16777216, "shortest_edge": 4096},
    }  # fmt: skip
    files = host_files(config, generation, image, words)
    files["video_preprocessor_config.json"] = eyes | {
        "video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor",
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    }  # fmt: skip
    shapes: Shapes = {"lm_head.weight": (vocabulary, size["width"])}
    put_text(shapes, "model.language_model.", size, vocabulary, experts)
    put_tower(shapes, size)
    return tokenizer, files, shapes


def text_config(size: Mapping[str, int], vocabulary: int, experts: int) -> dict[str, Any]:
    """The options of every Qwen3 decoder."""
    config = {
        "attention_bias": False, "dtype": "float32", "head_dim": HEAD, "hidden_act": "silu",
        "hidden_size": size["width"], "intermediate_size": size["mlp"], "max_position_embeddings": 32768,
        "num_attention_heads": size["heads"], "num_hidden_layers": size["layers"],
        "num_key_value_heads": size["kv_heads"], "rms_norm_eps": 1e-6, "rope_theta": 5000000.0,
        "tie_word_embeddings": False, "vocab_size": vocabulary,
    }  # fmt: skip
    routed = {
        "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": expert_mlp(size),
        "norm_topk_prob": True, "num_experts": experts, "num_experts_per_tok": TOP,
    }  # fmt: skip
    return config | (routed if experts else {})


def put_text(
    shapes: Shapes, prefix: str, size: Mapping[str, int], vocabulary: int, experts: int, apart: bool = False
) -> None:
    """A decoder; its experts in two tensors, or `apart`."""
    width, mlp = size["width"], expert_mlp(size) if experts else size["mlp"]
    shapes[f"{prefix}embed_tokens.weight"] = (vocabulary, width)
    shapes[f"{prefix}norm.weight"] = (width,)
    for i in range(size["layers"]):
        layer = f"{prefix}layers.{i}."
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (width,)
        for part, heads in (("q", size["heads"]), ("k", size["kv_heads"]), ("v", size["kv_heads"])):
            put_layer(shapes, f"{layer}self_attn.{part}_proj", heads * HEAD, width, bias=False)
        put_layer(shapes, f"{layer}self_attn.o_proj", width, size["heads"] * HEAD, bias=False)
        shapes[f"{layer}self_attn.q_norm.weight"] = shapes[f"{layer}self_attn.k_norm.weight"] = (HEAD,)
        if experts:
            put_layer(shapes, f"{layer}mlp.gate", experts, width, bias=False)
        if experts and not apart:
            shapes[f"{layer}mlp.experts.gate_up_proj"] = (experts, width, 2 * mlp)
            shapes[f"{layer}mlp.experts.down_proj"] = (experts, mlp, width)
        for name in [f"experts.{e}." for e in range(experts)] if apart else [""] * (not experts):
            put_layer(shapes, f"{layer}mlp.{name}gate_proj", mlp, width, bias=False)
            put_layer(shapes, f"{layer}mlp.{name}up_proj", mlp, width, bias=False)
            put_layer(shapes, f"{layer}mlp.{name}down_proj", width, mlp, bias=False)


def put_tower(shapes: Shapes, size: Mapping[str, int], prefix: str = "model.visual.") -> None:
    """The vision tower."""
    width, mlp = size["tower_width"], size["tower_mlp"]
    shapes[f"{prefix}patch_embed.proj.weight"] = (width, 3, 2, 16, 16)
    shapes[f"{prefix}patch_embed.proj.bias"] = (width,)
    shapes[f"{prefix}pos_embed.weight"] = (SIDE**2, width)
    for i in range(size["tower_layers"]):
        block = f"{prefix}blocks.{i}."
        put_norm(shapes, block + "norm1", width)
        put_norm(shapes, block + "norm2", width)
        put_layer(shapes, block + "attn.qkv", 3 * width, width)
        put_layer(shapes, block + "attn.proj", width, width)
        put_layer(shapes, block + "mlp.linear_fc1", mlp, width)
        put_layer(shapes, block + "mlp.linear_fc2", width, mlp)
    for name in ("merger", *(f"deepstack_merger_list.{i}" for i in range(TAPS))):
        put_norm(shapes, f"{prefix}{name}.norm", width if name == "merger" else 4 * width)
        put_layer(shapes, f"{prefix}{name}.linear_fc1", 4 * width, 4 * width)
        put_layer(shapes, f"{prefix}{name}.linear_fc2", size["width"], 4 * width)
