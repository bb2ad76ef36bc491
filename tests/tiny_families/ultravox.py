"""Ultravox, tiny, with the encoder and the language model in the same checkpoint. The audio token is one past the
embedding, as published."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from tiny import QWEN_WORDS, Shapes, byte_level, host_files, put_decoder, put_norm
from tiny_families.qwen2_audio import encoder, extractor, put_whisper_encoder

SEED = 0
SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|audio|>",
]
BINS, STEPS, STACK = 32, 200, 8
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def build(size: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    """Tokenizer, files and tensors."""
    tokenizer = byte_level(SPECIAL, QWEN_WORDS)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    vocabulary, ends = ids["<|audio|>"], [ids[f"<|{name}|>"] for name in ("end_of_text", "eom_id", "eot_id")]
    config = configuration(size, vocabulary, BINS, STEPS) | {"pad_token_id": ids["<|eot_id|>"]}
    config["text_config"] |= {"bos_token_id": ids["<|begin_of_text|>"], "eos_token_id": ends}
    generation = {
        "bos_token_id": ids["<|begin_of_text|>"], "eos_token_id": ends, "do_sample": True, "temperature": 0.6,
        "top_p": 0.9,
    }  # fmt: skip
    text = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": "<|eot_id|>",
        "pad_token": "<|eot_id|>", "model_max_length": 131072, "chat_template": TEMPLATE,
    }  # fmt: skip
    prepare = extractor(BINS, STEPS) | {"processor_class": "UltravoxProcessor", "return_attention_mask": False}
    files = host_files(config, generation, prepare, text)
    files["processor_config.json"] = {
        "processor_class": "UltravoxProcessor", "audio_padding": "longest", "audio_placeholder": "<|audio|>",
        "encoder_ds_factor": 2, "stack_factor": STACK,
    }  # fmt: skip
    return tokenizer, files, tensors(size, vocabulary, 96, BINS, STEPS)


def configuration(size: Mapping[str, int], vocabulary: int, bins: int, steps: int) -> dict[str, Any]:
    """config.json but for the ordinary tokens."""
    return {
        "architectures": ["UltravoxModel"], "model_type": "ultravox", "torch_dtype": "float32", "ignore_index": -100,
        "audio_model_id": None, "text_model_id": None, "audio_token_index": vocabulary, "hidden_size": 96,
        "projector_act": "swiglu", "projector_ln_mid": True, "stack_factor": STACK, "vocab_size": vocabulary,
        "audio_config": {"model_type": "whisper", **encoder(size, bins, steps)},
        "text_config": {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": size["width"],
            "intermediate_size": size["mlp"], "num_hidden_layers": size["layers"],
            "num_attention_heads": size["heads"], "num_key_value_heads": size["kv_heads"],
            "head_dim": size["width"] // size["heads"], "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": vocabulary, "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    }  # fmt: skip


def tensors(size: Mapping[str, int], vocabulary: int, hidden: int, bins: int, steps: int) -> Shapes:
    """Published names."""
    shapes: Shapes = {}
    put_decoder(shapes, "language_model.model.", size, vocabulary, bias=False)
    put_whisper_encoder(shapes, "audio_tower.", size, bins, steps)
    stacked = STACK * size["tower_width"]
    put_norm(shapes, "multi_modal_projector.ln_pre", stacked, bias=False)
    shapes["multi_modal_projector.linear_1.weight"] = (hidden, stacked)
    put_norm(shapes, "multi_modal_projector.ln_mid", hidden // 2, bias=False)
    shapes["multi_modal_projector.linear_2.weight"] = (size["width"], hidden // 2)
    return shapes
