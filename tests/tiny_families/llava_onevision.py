"""LLaVA-OneVision, tiny: crops of 56 pixels, up to four by four of them, scaled down above nine."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from tiny import QWEN_WORDS, Shapes, byte_level, host_files, put_decoder, put_layer, put_norm, table_rows

SEED = 11
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}<video>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIDE, PATCH = 56, 14


def build(size: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    """Tokenizer, files and tensors; the head is the embedding, as in the 0.5B."""
    tokenizer = byte_level(SPECIAL, QWEN_WORDS)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    vocabulary = table_rows(tokenizer)
    config = configuration(size, vocabulary, SIDE, [[h, w] for h in STEPS for w in STEPS]) | {
        "image_token_index": ids["<image>"],
        "video_token_index": ids["<video>"],
    }
    config["text_config"] |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    preprocessor = {
        "image_processor_type": "LlavaOnevisionImageProcessor", "processor_class": "LlavaOnevisionProcessor",
        "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 3, "do_convert_rgb": True,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_pad": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_grid_pinpoints": config["image_grid_pinpoints"],
    }  # fmt: skip
    text = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "additional_special_tokens": SPECIAL[1:],
        "model_max_length": 32768, "chat_template": TEMPLATE,
    }  # fmt: skip
    generation = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    files = host_files(config, generation, preprocessor, text)
    files["video_preprocessor_config.json"] = preprocessor | {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    files["processor_config.json"] = {
        "processor_class": "LlavaOnevisionProcessor", "image_token": "<image>", "video_token": "<video>",
        "num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }  # fmt: skip
    return tokenizer, files, shapes(size, vocabulary, SIDE)


STEPS = [SIDE, 2 * SIDE, 3 * SIDE, 4 * SIDE]


def configuration(size: Mapping[str, int], vocabulary: int, side: int, pinpoints: list[list[int]]) -> dict[str, Any]:
    """config.json, but for the token ids."""
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision",
        "torch_dtype": "float32", "image_grid_pinpoints": pinpoints, "projector_hidden_act": "gelu",
        "tie_word_embeddings": False, "use_image_newline_parameter": True, "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "text_config": {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "float32",
            "vocab_size": vocabulary, "hidden_size": size["width"], "intermediate_size": size["mlp"],
            "num_hidden_layers": size["layers"], "num_attention_heads": size["heads"],
            "num_key_value_heads": size["kv_heads"], "rope_theta": 1000000.0, "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": size["tower_width"],
            "intermediate_size": size["tower_mlp"], "num_hidden_layers": size["tower_layers"],
            "num_attention_heads": size["tower_heads"], "image_size": side, "patch_size": PATCH,
            "vision_use_head": False,
        },
    }  # fmt: skip


def shapes(size: Mapping[str, int], vocabulary: int, side: int) -> Shapes:
    """Tensors by their published names."""
    found: Shapes = {"image_newline": (size["width"],)}
    put_decoder(found, "language_model.model.", size, vocabulary, bias=True)
    put_layer(found, "multi_modal_projector.linear_1", size["width"], size["tower_width"])
    put_layer(found, "multi_modal_projector.linear_2", size["width"], size["width"])
    put_siglip(found, "vision_tower.vision_model.", size, (side // PATCH) ** 2)
    return found


def put_siglip(found: Shapes, tower: str, size: Mapping[str, int], positions: int) -> None:
    """The tensors of a SigLIP tower."""
    width = size["tower_width"]
    found[tower + "embeddings.patch_embedding.weight"] = (width, 3, PATCH, PATCH)
    found[tower + "embeddings.patch_embedding.bias"] = (width,)
    found[tower + "embeddings.position_embedding.weight"] = (positions, width)
    put_norm(found, tower + "post_layernorm", width)
    for i in range(size["tower_layers"]):
        block = f"{tower}encoder.layers.{i}."
        put_norm(found, block + "layer_norm1", width)
        put_norm(found, block + "layer_norm2", width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            put_layer(found, f"{block}self_attn.{projection}", width, width)
        put_layer(found, block + "mlp.fc1", size["tower_mlp"], width)
        put_layer(found, block + "mlp.fc2", width, size["tower_mlp"])
