"""Qwen2-Audio, tiny: windows of four seconds, three chunks each."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from tiny import QWEN_WORDS, Shapes, byte_level, host_files, put_decoder, put_layer, put_norm, table_rows

SEED = 0
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
BINS, STEPS = 32, 200
TEMPLATE = (
    "{% set sounds = namespace(count=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('audio', 'audio_url', 'input_audio') %}{% set sounds.count = sounds.count + 1 %}"
    "Audio {{ sounds.count }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(size: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    """Tokenizer, files and tensors."""
    tokenizer = byte_level(SPECIAL, QWEN_WORDS)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    vocabulary = table_rows(tokenizer)
    config = configuration(size, vocabulary, BINS, STEPS) | {"audio_token_index": ids["<|AUDIO|>"]}
    config["text_config"] |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    generation = {"eos_token_id": [ids["<|endoftext|>"], ids["<|im_end|>"]], "pad_token_id": ids["<|endoftext|>"]}
    text = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "additional_special_tokens": SPECIAL[1:],
        "model_max_length": 32768, "chat_template": TEMPLATE,
    }  # fmt: skip
    prepare = extractor(BINS, STEPS) | {"processor_class": "Qwen2AudioProcessor", "return_attention_mask": True}
    return tokenizer, host_files(config, generation, prepare, text), tensors(size, vocabulary, BINS, STEPS)


def configuration(size: Mapping[str, int], vocabulary: int, bins: int, steps: int) -> dict[str, Any]:
    """config.json but for the tokens."""
    return {
        "architectures": ["Qwen2AudioForConditionalGeneration"], "model_type": "qwen2_audio", "ignore_index": -100,
        "torch_dtype": "float32", "vocab_size": vocabulary,
        "audio_config": {"model_type": "qwen2_audio_encoder", **encoder(size, bins, steps)},
        "text_config": {
            "model_type": "qwen2", "hidden_size": size["width"], "intermediate_size": size["mlp"],
            "num_hidden_layers": size["layers"], "num_attention_heads": size["heads"],
            "num_key_value_heads": size["kv_heads"], "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
            "rope_theta": 10000, "use_mrope": False, "sliding_window": 32768, "vocab_size": vocabulary,
        },
    }  # fmt: skip


def encoder(size: Mapping[str, int], bins: int, steps: int) -> dict[str, Any]:
    """audio_config."""
    return {
        "d_model": size["tower_width"], "encoder_layers": size["tower_layers"],
        "encoder_attention_heads": size["tower_heads"], "encoder_ffn_dim": size["tower_mlp"], "num_mel_bins": bins,
        "max_source_positions": steps, "activation_function": "gelu", "scale_embedding": False, "dropout": 0.0,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0,
    }  # fmt: skip


def extractor(bins: int, steps: int) -> dict[str, Any]:
    """preprocessor_config.json."""
    return {
        "feature_extractor_type": "WhisperFeatureExtractor", "sampling_rate": 16000, "hop_length": 160, "n_fft": 400,
        "feature_size": bins, "chunk_length": steps // 50, "n_samples": 320 * steps, "nb_max_frames": 2 * steps,
        "padding_side": "right", "padding_value": 0.0, "dither": 0.0,
    }  # fmt: skip


def tensors(size: Mapping[str, int], vocabulary: int, bins: int, steps: int) -> Shapes:
    """Published names."""
    shapes: Shapes = {}
    put_decoder(shapes, "language_model.model.", size, vocabulary, bias=True)
    shapes["language_model.lm_head.weight"] = (vocabulary, size["width"])
    put_whisper_encoder(shapes, "audio_tower.", size, bins, steps)
    put_layer(shapes, "multi_modal_projector.linear", size["width"], size["tower_width"])
    return shapes


def put_whisper_encoder(shapes: Shapes, prefix: str, size: Mapping[str, int], bins: int, steps: int) -> None:
    """Whisper's encoder."""
    width, mlp = size["tower_width"], size["tower_mlp"]
    shapes[f"{prefix}conv1.weight"], shapes[f"{prefix}conv1.bias"] = (width, bins, 3), (width,)
    shapes[f"{prefix}conv2.weight"], shapes[f"{prefix}conv2.bias"] = (width, width, 3), (width,)
    shapes[f"{prefix}embed_positions.weight"] = (steps, width)
    for i in range(size["tower_layers"]):
        layer = f"{prefix}layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            put_layer(shapes, f"{layer}self_attn.{name}", width, width, bias=name != "k_proj")
        put_layer(shapes, layer + "fc1", mlp, width)
        put_layer(shapes, layer + "fc2", width, mlp)
        put_norm(shapes, layer + "self_attn_layer_norm", width)
        put_norm(shapes, layer + "final_layer_norm", width)
    put_norm(shapes, f"{prefix}layer_norm", width)
