"""Phi-3.5-vision, tiny: crops of 4 x 4 patches, 4 embeddings each, with a tokenizer like Llama-2's."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from tiny import CLIP_MEAN, CLIP_STD, Shapes, characters, host_files, put_layer, put_norm, table_rows

SEED = 4
SPECIAL = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|image|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
EDGE, PATCH = 56, 14
VISION, IMAGE = "model.vision_embed_tokens.img_processor.vision_model.", "model.vision_embed_tokens."


def build(size: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    """Tokenizer, files and tensors."""
    tokenizer = characters(SPECIAL)
    end, stop = (tokenizer.token_to_id(f"<|{word}|>") for word in ("endoftext", "end"))
    vocabulary = table_rows(tokenizer)
    config = configuration(size, vocabulary) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": end}
    config["img_processor"]["vision_config"] = {
        "hidden_size": size["tower_width"], "intermediate_size": size["tower_mlp"], "image_size": EDGE,
        "num_hidden_layers": size["tower_layers"], "num_attention_heads": size["tower_heads"], "patch_size": PATCH,
        "projection_dim": size["tower_width"], "hidden_act": "quick_gelu",
    }  # fmt: skip
    preprocessor = {
        "image_processor_type": "Phi3VImageProcessor", "processor_class": "Phi3VProcessor", "num_crops": 4,
        "num_img_tokens": (EDGE // PATCH // 2) ** 2, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }  # fmt: skip
    text = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>",
        "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>", "legacy": False,
        "model_max_length": 131072, "chat_template": TEMPLATE,
    }  # fmt: skip
    generation = {"bos_token_id": 1, "eos_token_id": [stop, end], "pad_token_id": end}
    return tokenizer, host_files(config, generation, preprocessor, text), shapes(size, vocabulary, EDGE)


def configuration(size: Mapping[str, int], vocabulary: int) -> dict[str, Any]:
    """config.json as published, without the token ids: it has only the name of the image tower."""
    slots = size["width"] // size["heads"] // 2
    return {
        "architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v", "torch_dtype": "float32", "hidden_act": "silu",
        "hidden_size": size["width"], "intermediate_size": size["mlp"], "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"], "num_key_value_heads": size["kv_heads"], "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "su", "short_factor": [1 + i / slots for i in range(slots)],
            "long_factor": [1.1 + 30 * i / slots for i in range(slots)],
        },
        "sliding_window": 262144, "tie_word_embeddings": False, "vocab_size": vocabulary,
        "embd_layer": {
            "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
            "use_hd_transform": True, "with_learnable_separator": True,
        },
        "img_processor": {
            "image_dim_out": size["tower_width"], "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model", "num_img_tokens": 144,
        },
    }  # fmt: skip


def shapes(size: Mapping[str, int], vocabulary: int, edge: int) -> Shapes:
    """The tensors of a checkpoint, by published name."""
    width, head, tower = size["width"], size["width"] // size["heads"], size["tower_width"]
    fused = (size["heads"] + 2 * size["kv_heads"]) * head
    out: Shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    put_norm(out, "model.norm", width, bias=False)
    for i in range(size["layers"]):
        layer = f"model.layers.{i}."
        put_norm(out, layer + "input_layernorm", width, bias=False)
        put_norm(out, layer + "post_attention_layernorm", width, bias=False)
        put_layer(out, layer + "self_attn.qkv_proj", fused, width, bias=False)
        put_layer(out, layer + "self_attn.o_proj", width, size["heads"] * head, bias=False)
        put_layer(out, layer + "mlp.gate_up_proj", 2 * size["mlp"], width, bias=False)
        put_layer(out, layer + "mlp.down_proj", width, size["mlp"], bias=False)
    out[IMAGE + "sub_GN"], out[IMAGE + "glb_GN"] = (1, 1, 1, 4 * tower), (1, 1, 4 * tower)
    put_layer(out, IMAGE + "img_projection.0", width, 4 * tower)
    put_layer(out, IMAGE + "img_projection.2", width, width)
    out[VISION + "embeddings.class_embedding"] = (tower,)
    out[VISION + "embeddings.patch_embedding.weight"] = (tower, 3, PATCH, PATCH)
    out[VISION + "embeddings.position_embedding.weight"] = ((edge // PATCH) ** 2 + 1, tower)
    for name in ("pre_layrnorm", "post_layernorm"):
        put_norm(out, VISION + name, tower)
    for i in range(size["tower_layers"]):
        block = f"{VISION}encoder.layers.{i}."
        put_norm(out, block + "layer_norm1", tower)
        put_norm(out, block + "layer_norm2", tower)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            put_layer(out, f"{block}self_attn.{projection}", tower, tower)
        put_layer(out, block + "mlp.fc1", size["tower_mlp"], tower)
        put_layer(out, block + "mlp.fc2", tower, size["tower_mlp"])
    return out
