"""MiniCPM-V 2.6, tiny: slices of about 8 x 8 patches, 16 embeddings each. The resampler has heads of 128: so `width` is
counted in fours."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from tiny import QWEN_WORDS, Shapes, byte_level, host_files, put_decoder, put_layer, put_norm, table_rows
from tiny_families.llava_onevision import put_siglip

SEED = 4
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>",
    "</image_id>",
]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EDGE, QUERIES, TABLE, PATCH = 112, 16, 980, 14


def build(size: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    """Tokenizer, files and tensors."""
    size = {**size, "width": 4 * size["width"]}
    tokenizer = byte_level(SPECIAL, QWEN_WORDS)
    end, stop = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    vocabulary = table_rows(tokenizer)
    config = configuration(size, vocabulary, EDGE, QUERIES) | {"bos_token_id": end, "eos_token_id": stop}
    preprocessor = {
        "image_processor_type": "MiniCPMVImageProcessor", "processor_class": "MiniCPMVProcessor", "max_slice_nums": 9,
        "scale_resolution": EDGE, "patch_size": PATCH, "use_image_id": True, "image_feature_size": QUERIES,
        "im_start": "<image>", "im_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>", "unk": "<unk>",
        "im_id_start": "<image_id>", "im_id_end": "</image_id>", "slice_mode": True, "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5], "version": 2.6,
    }  # fmt: skip
    text = {
        "tokenizer_class": "MiniCPMVTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": "<unk>", "additional_special_tokens": SPECIAL[1:],
        "model_max_length": 32768, "chat_template": TEMPLATE,
    }  # fmt: skip
    generation = {"bos_token_id": end, "pad_token_id": end, "eos_token_id": [stop, end]}
    return tokenizer, host_files(config, generation, preprocessor, text), shapes(size, vocabulary, QUERIES)


def configuration(size: Mapping[str, int], vocabulary: int, edge: int, queries: int) -> dict[str, Any]:
    """config.json, but for the token ids."""
    return {
        "architectures": ["MiniCPMV"], "version": 2.6, "model_type": "minicpmv", "torch_dtype": "float32",
        "batch_vision_input": True, "drop_vision_last_layer": False, "hidden_act": "silu",
        "hidden_size": size["width"], "image_size": edge, "intermediate_size": size["mlp"],
        "max_position_embeddings": 32768, "num_attention_heads": size["heads"], "num_hidden_layers": size["layers"],
        "num_key_value_heads": size["kv_heads"], "patch_size": PATCH, "query_num": queries, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "slice_mode": True, "use_image_id": True,
        "slice_config": {
            "max_slice_nums": 9, "patch_size": PATCH, "scale_resolution": edge, "model_type": "minicpmv",
        },
        "vision_config": {
            "model_type": "siglip", "hidden_size": size["tower_width"], "image_size": TABLE,
            "intermediate_size": size["tower_mlp"], "num_attention_heads": size["tower_heads"],
            "num_hidden_layers": size["tower_layers"], "patch_size": PATCH,
        },
        "vocab_size": vocabulary,
    }  # fmt: skip


def shapes(size: Mapping[str, int], vocabulary: int, queries: int) -> Shapes:
    """Tensors by their published names."""
    width = size["width"]
    found: Shapes = {"llm.lm_head.weight": (vocabulary, width)}
    put_decoder(found, "llm.model.", size, vocabulary, bias=True)
    put_siglip(found, "vpm.", size, (TABLE // PATCH) ** 2)
    found["resampler.query"] = (queries, width)
    put_layer(found, "resampler.kv_proj", width, size["tower_width"], bias=False)
    found["resampler.attn.in_proj_weight"] = (3 * width, width)
    found["resampler.attn.in_proj_bias"] = (3 * width,)
    put_layer(found, "resampler.attn.out_proj", width, width)
    for name in ("ln_q", "ln_kv", "ln_post"):
        put_norm(found, f"resampler.{name}", width)
    found["resampler.proj"] = (width, width)
    return found
