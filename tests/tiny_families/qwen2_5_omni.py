"""A tiny Qwen2.5-Omni, laid out as the whole published model, of which only the thinker is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from tiny import (
    CLIP_MEAN,
    CLIP_STD,
    QWEN_WORDS,
    Shapes,
    byte_level,
    host_files,
    put_decoder,
    put_layer,
    put_norm,
    table_rows,
)

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|vision_pad|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
]
SEED = 2
BINS = 32
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] in ('video', 'video_url') %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif part['type'] in ('audio', 'audio_url', 'input_audio') %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT = {
    "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>", "unk_token": None, "additional_special_tokens": SPECIAL[1:],
    "model_max_length": 32768, "image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>", "chat_template": TEMPLATE,
}  # fmt: skip


def build(size: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    tokenizer = byte_level(SPECIAL, QWEN_WORDS)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    vocabulary, slots = table_rows(tokenizer), size["width"] // size["heads"] // 2
    side = 3 * slots // 8
    config = {
        "architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni", "torch_dtype": "float32",
        "enable_audio_output": False, "enable_talker": False,
        "thinker_config": {
            "architectures": ["Qwen2OmniNaViTThinkerForConditionalGeneration"], "model_type": "qwen2_5_omni_thinker",
            "audio_token_index": ids["<|AUDIO|>"], "image_token_index": ids["<|IMAGE|>"],
            "video_token_index": ids["<|VIDEO|>"], "audio_start_token_id": ids["<|audio_bos|>"],
            "audio_end_token_id": ids["<|audio_eos|>"], "vision_start_token_id": ids["<|vision_bos|>"],
            "vision_end_token_id": ids["<|vision_eos|>"], "vision_token_id": ids["<|vision_pad|>"],
            "bos_token_id": ids["<|im_start|>"], "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"], "ignore_index": -100, "position_id_per_seconds": 25,
            "seconds_per_chunk": 2, "user_token_id": 10,
            "text_config": {
                "model_type": "qwen2_5_omni_text", "hidden_act": "silu", "hidden_size": size["width"],
                "intermediate_size": size["mlp"], "num_hidden_layers": size["layers"],
                "num_attention_heads": size["heads"], "num_key_value_heads": size["kv_heads"],
                "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
                "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": size["layers"],
                "vocab_size": vocabulary,
                "rope_scaling": {
                    "type": "default", "rope_type": "default", "mrope_section": [slots - 2 * side, side, side],
                },
            },
            "vision_config": {
                "model_type": "qwen2_5_omni_vision_encoder", "depth": size["tower_layers"], "hidden_act": "silu",
                "hidden_size": size["tower_width"], "embed_dim": size["tower_width"], "in_chans": 3, "in_channels": 3,
                "intermediate_size": size["tower_mlp"], "num_heads": size["tower_heads"],
                "out_hidden_size": size["width"], "fullatt_block_indexes": [1], "window_size": 112, "patch_size": 14,
                "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2, "tokens_per_second": 25,
            },
            "audio_config": {
                "model_type": "qwen2_5_omni_audio_encoder", "num_mel_bins": BINS, "encoder_layers": 2,
                "encoder_attention_heads": size["tower_heads"], "encoder_ffn_dim": size["tower_mlp"],
                "d_model": size["tower_width"], "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
                "activation_function": "gelu", "scale_embedding": False, "max_source_positions": 1500,
                "n_window": 25, "output_dim": size["width"], "num_hidden_layers": 2,
            },
        },
    }  # fmt: skip
    generation = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"]}
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5OmniProcessor",
        "feature_extractor_type": "WhisperFeatureExtractor", "min_pixels": 3136, "max_pixels": 12845056,
        "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        "feature_size": BINS, "sampling_rate": 16000, "hop_length": 160, "n_fft": 400, "chunk_length": 8,
        "n_samples": 128000, "nb_max_frames": 800, "padding_side": "right", "padding_value": 0.0, "dither": 0.0,
        "return_attention_mask": True,
    }  # fmt: skip
    return tokenizer, host_files(config, generation, preprocessor, TEXT), _shapes(size, vocabulary)


def _shapes(size: Mapping[str, int], vocabulary: int) -> Shapes:
    shapes: Shapes = {}
    put_decoder(shapes, "thinker.model.", size, vocabulary, bias=True)
    shapes["thinker.lm_head.weight"] = (vocabulary, size["width"])
    width, mlp = size["tower_width"], size["tower_mlp"]
    shapes["thinker.visual.patch_embed.proj.weight"] = (width, 3, 2, 14, 14)
    for i in range(size["tower_layers"]):
        block = f"thinker.visual.blocks.{i}."
        for name in ("q", "k", "v", "proj"):
            put_layer(shapes, f"{block}attn.{name}", width, width)
        put_layer(shapes, block + "mlp.gate_proj", mlp, width)
        put_layer(shapes, block + "mlp.up_proj", mlp, width)
        put_layer(shapes, block + "mlp.down_proj", width, mlp)
        put_norm(shapes, block + "norm1", width, bias=False)
        put_norm(shapes, block + "norm2", width, bias=False)
    put_norm(shapes, "thinker.visual.merger.ln_q", width, bias=False)
    put_layer(shapes, "thinker.visual.merger.mlp.0", 4 * width, 4 * width)
    put_layer(shapes, "thinker.visual.merger.mlp.2", size["width"], 4 * width)
    shapes["thinker.audio_tower.conv1.weight"] = (width, BINS, 3)
    shapes["thinker.audio_tower.conv2.weight"] = (width, width, 3)
    for name in ("conv1", "conv2"):
        shapes[f"thinker.audio_tower.{name}.bias"] = (width,)
    put_audio_tower(shapes, width, mlp, key_bias=False)
    put_layer(shapes, "thinker.audio_tower.proj", size["width"], width)
    shapes["thinker.audio_tower.audio_bos_eos_token.weight"] = (2, size["width"])
    return shapes


def put_audio_tower(shapes: Shapes, width: int, mlp: int, key_bias: bool) -> None:
    for i in range(2):
        layer = f"thinker.audio_tower.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            put_layer(shapes, f"{layer}self_attn.{name}", width, width, bias=key_bias or name != "k_proj")
        put_layer(shapes, layer + "fc1", mlp, width)
        put_layer(shapes, layer + "fc2", width, mlp)
        put_norm(shapes, layer + "self_attn_layer_norm", width)
        put_norm(shapes, layer + "final_layer_norm", width)
    put_norm(shapes, "thinker.audio_tower.ln_post", width)
