"""A tiny Qwen3-Omni, laid out as the whole published model, of which only the thinker is loaded."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from tiny import QWEN_WORDS, Shapes, byte_level, host_files, put_layer, put_norm, table_rows
from tiny_families.qwen2_5_omni import BINS, TEMPLATE, put_audio_tower

SEED = 6
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<|audio_pad|>",
]
EXPERTS, CHANNELS, HEAD, SIDE = 6, 8, 16, 8
OTHER_WORDS = {
    "<|vision_bos|><|IMAGE|><|vision_eos|>": "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_bos|><|VIDEO|><|vision_eos|>": "<|vision_start|><|video_pad|><|vision_end|>",
    "<|audio_bos|><|AUDIO|><|audio_eos|>": "<|audio_start|><|audio_pad|><|audio_end|>",
}


def build(size: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    """Tokenizer, files and tensors; the head is untied."""
    tokenizer = byte_level(SPECIAL, QWEN_WORDS)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    vocabulary = table_rows(tokenizer)
    config = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"], "model_type": "qwen3_omni_moe", "dtype": "float32",
        "enable_audio_output": False, "im_start_token_id": ids["<|im_start|>"], "im_end_token_id": ids["<|im_end|>"],
        "thinker_config": {
            "model_type": "qwen3_omni_moe_thinker", "dtype": "float32", "audio_token_id": ids["<|audio_pad|>"],
            "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
            "audio_start_token_id": ids["<|audio_start|>"], "audio_end_token_id": ids["<|audio_end|>"],
            "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
            "initializer_range": 0.02, "position_id_per_seconds": 13, "seconds_per_chunk": 2, "user_token_id": 10,
            "text_config": _text(size, vocabulary), "vision_config": _vision(size), "audio_config": _audio(size),
        },
    }  # fmt: skip
    generation = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"]}
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3OmniMoeProcessor",
        "feature_extractor_type": "WhisperFeatureExtractor", "min_pixels": 3136, "max_pixels": 12845056,
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "feature_size": BINS, "sampling_rate": 16000, "hop_length": 160, "n_fft": 400, "chunk_length": 30,
        "n_samples": 480000, "nb_max_frames": 3000, "padding_side": "right", "padding_value": 0.0, "dither": 0.0,
        "return_attention_mask": True,
    }  # fmt: skip
    template = TEMPLATE
    for theirs, ours in OTHER_WORDS.items():
        template = template.replace(theirs, ours)
    text = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "additional_special_tokens": SPECIAL[1:],
        "model_max_length": 65536, "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
        "audio_token": "<|audio_pad|>", "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
        "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>", "chat_template": template,
    }  # fmt: skip
    return tokenizer, host_files(config, generation, preprocessor, text), _shapes(size, vocabulary)


def _text(size: Mapping[str, int], vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_omni_moe_text", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": HEAD,
        "hidden_act": "silu", "hidden_size": size["width"], "intermediate_size": size["mlp"],
        "max_position_embeddings": 65536, "mlp_only_layers": [], "moe_intermediate_size": size["mlp"] // 4,
        "norm_topk_prob": True, "num_attention_heads": size["heads"], "num_experts": EXPERTS, "num_experts_per_tok": 2,
        "num_hidden_layers": size["layers"], "num_key_value_heads": size["kv_heads"], "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "shared_expert_intermediate_size": 0, "use_qk_norm": True, "use_sliding_window": False,
        "rope_scaling": {
            "interleaved": True, "mrope_interleaved": True, "mrope_section": [HEAD // 2 - 4, 2, 2],
            "rope_type": "default", "type": "default",
        },
        "vocab_size": vocabulary,
    }  # fmt: skip


def _vision(size: Mapping[str, int]) -> dict[str, Any]:
    return {
        "model_type": "qwen3_omni_moe_vision_encoder", "deepstack_visual_indexes": [0], "depth": size["tower_layers"],
        "hidden_act": "gelu_pytorch_tanh", "hidden_size": size["tower_width"], "in_channels": 3, "in_chans": 3,
        "intermediate_size": size["tower_mlp"], "num_heads": size["tower_heads"],
        "num_position_embeddings": SIDE**2, "out_hidden_size": size["width"], "patch_size": 16,
        "spatial_merge_size": 2, "spatial_patch_size": 16, "temporal_patch_size": 2,
    }  # fmt: skip


def _audio(size: Mapping[str, int]) -> dict[str, Any]:
    return {
        "model_type": "qwen3_omni_moe_audio_encoder", "num_mel_bins": BINS, "encoder_layers": 2,
        "encoder_attention_heads": size["tower_heads"], "encoder_ffn_dim": size["tower_mlp"],
        "d_model": size["tower_width"], "dropout": 0, "attention_dropout": 0, "activation_dropout": 0,
        "activation_function": "gelu", "scale_embedding": False, "max_source_positions": 1500, "n_window": 50,
        "n_window_infer": 200, "conv_chunksize": 500, "downsample_hidden_size": CHANNELS, "output_dim": size["width"],
        "num_hidden_layers": 2,
    }  # fmt: skip


def _shapes(size: Mapping[str, int], vocabulary: int) -> Shapes:
    shapes: Shapes = {}
    width, part = size["width"], size["mlp"] // 4
    shapes["thinker.model.embed_tokens.weight"] = shapes["thinker.lm_head.weight"] = (vocabulary, width)
    for i in range(size["layers"]):
        layer = f"thinker.model.layers.{i}."
        for name, heads in (("q", size["heads"]), ("k", size["kv_heads"]), ("v", size["kv_heads"])):
            put_layer(shapes, f"{layer}self_attn.{name}_proj", heads * HEAD, width, bias=False)
        put_layer(shapes, layer + "self_attn.o_proj", width, size["heads"] * HEAD, bias=False)
        for name, norm in (
            ("input_layernorm", width),
            ("post_attention_layernorm", width),
            ("self_attn.q_norm", HEAD),
            ("self_attn.k_norm", HEAD),
        ):
            put_norm(shapes, layer + name, norm, bias=False)
        put_layer(shapes, layer + "mlp.gate", EXPERTS, width, bias=False)
        for j in range(EXPERTS):
            expert = f"{layer}mlp.experts.{j}."
            put_layer(shapes, expert + "gate_proj", part, width, bias=False)
            put_layer(shapes, expert + "up_proj", part, width, bias=False)
            put_layer(shapes, expert + "down_proj", width, part, bias=False)
    put_norm(shapes, "thinker.model.norm", width, bias=False)
    _put_vision_tower(shapes, size)
    _spectrum(shapes, size)
    return shapes


def _put_vision_tower(shapes: Shapes, size: Mapping[str, int]) -> None:
    width, mlp = size["tower_width"], size["tower_mlp"]
    shapes["thinker.visual.patch_embed.proj.weight"] = (width, 3, 2, 16, 16)
    shapes["thinker.visual.patch_embed.proj.bias"] = (width,)
    shapes["thinker.visual.pos_embed.weight"] = (SIDE**2, width)
    for i in range(size["tower_layers"]):
        block = f"thinker.visual.blocks.{i}."
        put_norm(shapes, block + "norm1", width)
        put_norm(shapes, block + "norm2", width)
        put_layer(shapes, block + "attn.qkv", 3 * width, width)
        put_layer(shapes, block + "attn.proj", width, width)
        put_layer(shapes, block + "mlp.linear_fc1", mlp, width)
        put_layer(shapes, block + "mlp.linear_fc2", width, mlp)
    for name, norm in (("merger", width), ("merger_list.0", 4 * width)):
        put_norm(shapes, f"thinker.visual.{name}.ln_q", norm)
        put_layer(shapes, f"thinker.visual.{name}.mlp.0", 4 * width, 4 * width)
        put_layer(shapes, f"thinker.visual.{name}.mlp.2", size["width"], 4 * width)


def _spectrum(shapes: Shapes, size: Mapping[str, int]) -> None:
    width = size["tower_width"]
    for n, inputs in ((1, 1), (2, CHANNELS), (3, CHANNELS)):
        shapes[f"thinker.audio_tower.conv2d{n}.weight"] = (CHANNELS, inputs, 3, 3)
        shapes[f"thinker.audio_tower.conv2d{n}.bias"] = (CHANNELS,)
    put_layer(shapes, "thinker.audio_tower.conv_out", width, CHANNELS * BINS // 8, bias=False)
    put_audio_tower(shapes, width, size["tower_mlp"], key_bias=True)
    put_layer(shapes, "thinker.audio_tower.proj1", width, width)
    put_layer(shapes, "thinker.audio_tower.proj2", size["width"], width)
