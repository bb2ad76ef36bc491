"""Tiny random checkpoints in the layout of the hub, made without torch, network or downloads.

    make("qwen2_vl", directory, seed=0, layers=3)

Every value depends on the seed and its own name only, so the same call gives the same bytes. Scales are chosen so that
greedy continuations wander; special and padding tokens are muted in the head, so none is ever the answer.
A family that is not in FAMILIES below has a file of its own in tiny_families/, with a `build` and a `SEED`.
"""

from __future__ import annotations

import importlib
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

Shapes = dict[str, tuple[int, ...]]
Builder = Callable[[Mapping[str, int]], tuple[Tokenizer, dict[str, Any], Shapes]]  # sizes -> tokenizer, files, tensors

SIZES: Mapping[str, int] = {
    "layers": 2,
    "width": 64,
    "mlp": 128,
    "heads": 4,
    "kv_heads": 2,
    "tower_layers": 3,
    "tower_width": 32,
    "tower_mlp": 64,
    "tower_heads": 4,
}
# Added to the caller's seed: with these, seed 0 is known to give varied tokens and clear winners.
SEEDS: Mapping[str, int] = {"whisper": 37, "llava": 5, "qwen2_vl": 21}

GAIN = 1.6  # standard deviation of a matrix times the root of its fan-in
EMBED_STD = 0.5
HEAD_STD = 0.45
POSITION_STD = 3.0  # Whisper's decoder: its head is its embedding, and small positions would let it repeat itself
MUTED = 0.05
HEADS = ("lm_head.weight", "model.decoder.embed_tokens.weight", "model.embed_tokens.weight")  # the first found

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

MERGES = [
    ("Ġ", "t"),
    ("h", "e"),
    ("i", "n"),
    ("Ġ", "a"),
    ("Ġt", "he"),
    ("e", "r"),
    ("o", "n"),
    ("Ġ", "s"),
    ("Ġ", "i"),
    ("Ġi", "s"),
]
QWEN_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
LANGUAGES = ["en", "zh", "de", "es", "ru", "ko", "fr", "ja"]
WHISPER_TASKS = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
WHISPER_SECONDS = 4

QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'] | upper }}: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make(family: str, directory: Path, seed: int = 0, shards: int = 1, **sizes: int) -> Path:
    """Write a checkpoint of `family` into `directory` (created if need be) and return it. `sizes` override SIZES."""
    if unknown := set(sizes) - set(SIZES):
        raise TypeError(f"unknown sizes {sorted(unknown)}; known are {sorted(SIZES)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    build, offset = (FAMILIES[family], SEEDS[family]) if family in FAMILIES else _elsewhere(family)
    tokenizer, files, shapes = build({**SIZES, **sizes})
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    weights = {name: draw(name, shape, seed + offset) for name, shape in shapes.items()}
    head = next(name for end in HEADS for name in weights if name.endswith(end))
    added = sorted(tokenizer.get_added_tokens_decoder())
    weights[head][[token for token in added if token < len(weights[head])]] *= MUTED
    weights[head][tokenizer.get_vocab_size() :] *= MUTED
    _save(directory, weights, shards)
    return directory


def _elsewhere(family: str) -> tuple[Builder, int]:
    """The builder and the seed of a family that has a file of its own in tiny_families/."""
    module = importlib.import_module(f"tiny_families.{family}")
    return module.build, module.SEED


def draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 values whose scale follows from the tensor's name."""
    if name.endswith("encoder.embed_positions.weight"):
        return sinusoids(*shape)
    noise = np.random.default_rng([zlib.crc32(name.encode()), seed]).standard_normal(shape, dtype=np.float32)
    if "lm_head" in name:
        return noise * HEAD_STD
    if name.endswith("decoder.embed_positions.weight"):
        return noise * POSITION_STD
    part = name.replace("vision_embed_tokens.", "")  # where Phi-3.5-vision keeps all that sees
    if ("embed_" in part or "embedding" in part) and "patch" not in part:
        return noise * EMBED_STD
    if len(shape) == 1:
        return noise * np.float32(0.1) + np.float32(name.endswith("weight"))
    fan_in = shape[1] if ".experts." in name and len(shape) == 3 else np.prod(shape[1:])
    return noise * np.float32(GAIN / fan_in**0.5)


def sinusoids(length: int, width: int) -> np.ndarray:
    """Whisper's fixed positions: sines beside cosines, time scales from 1 to 10000."""
    rate = np.exp(-np.log(10000) / (width // 2 - 1) * np.arange(width // 2))
    angle = np.arange(length)[:, None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def _save(directory: Path, weights: dict[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names, places = sorted(weights), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        share = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: weights[name] for name in share}, directory / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(share, file))
    total = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def byte_level(special: list[str], words: str | None) -> Tokenizer:
    """Byte-level BPE with a handful of merges; the special tokens follow the ordinary ones."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in MERGES]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    tokenizer.pre_tokenizer = (
        level if words is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), level])
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def characters(special: list[str]) -> Tokenizer:
    """The shape of Llama-2's tokenizer: a visible space in front, bytes for what is unknown, BOS before the text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ["<unk>", "<s>", "</s>", *special]]
    )
    return tokenizer


def table_rows(tokenizer: Tokenizer) -> int:
    """Published tables are padded past the tokenizer; so is this one, to the next multiple of 64."""
    return (tokenizer.get_vocab_size() // 64 + 1) * 64


def put_layer(shapes: Shapes, name: str, outputs: int, inputs: int, bias: bool = True) -> None:
    shapes[f"{name}.weight"] = (outputs, inputs)
    if bias:
        shapes[f"{name}.bias"] = (outputs,)


def put_norm(shapes: Shapes, name: str, width: int, bias: bool = True) -> None:
    shapes[f"{name}.weight"] = (width,)
    if bias:
        shapes[f"{name}.bias"] = (width,)


def put_decoder(shapes: Shapes, prefix: str, size: Mapping[str, int], vocabulary: int, bias: bool) -> None:
    width, head = size["width"], size["width"] // size["heads"]
    shapes[f"{prefix}embed_tokens.weight"] = (vocabulary, width)
    for i in range(size["layers"]):
        layer = f"{prefix}layers.{i}."
        put_norm(shapes, layer + "input_layernorm", width, bias=False)
        put_layer(shapes, layer + "self_attn.q_proj", size["heads"] * head, width, bias)
        put_layer(shapes, layer + "self_attn.k_proj", size["kv_heads"] * head, width, bias)
        put_layer(shapes, layer + "self_attn.v_proj", size["kv_heads"] * head, width, bias)
        put_layer(shapes, layer + "self_attn.o_proj", width, size["heads"] * head, bias=False)
        put_norm(shapes, layer + "post_attention_layernorm", width, bias=False)
        put_layer(shapes, layer + "mlp.gate_proj", size["mlp"], width, bias=False)
        put_layer(shapes, layer + "mlp.up_proj", size["mlp"], width, bias=False)
        put_layer(shapes, layer + "mlp.down_proj", width, size["mlp"], bias=False)
    put_norm(shapes, prefix + "norm", width, bias=False)


def _qwen2_vl(size: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    tokenizer = byte_level(QWEN_SPECIAL, QWEN_WORDS)
    ids = {token: tokenizer.token_to_id(token) for token in QWEN_SPECIAL}
    vocabulary, slots = table_rows(tokenizer), size["width"] // size["heads"] // 2
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "torch_dtype": "float32",
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"], "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"], "hidden_act": "silu", "hidden_size": size["width"],
        "intermediate_size": size["mlp"], "num_hidden_layers": size["layers"], "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"], "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 32768,
        "max_window_layers": size["layers"], "vocab_size": vocabulary,
        "rope_scaling": {
            "type": "mrope", "mrope_section": [slots - 2 * (3 * slots // 8), 3 * slots // 8, 3 * slots // 8],
        },
        "vision_config": {
            "depth": size["tower_layers"], "embed_dim": size["tower_width"], "num_heads": size["tower_heads"],
            "in_chans": 3, "mlp_ratio": size["tower_mlp"] // size["tower_width"], "hidden_size": size["width"],
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
        },
    }  # fmt: skip
    generation = {
        "bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"], "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "temperature": 0.01, "top_k": 1, "top_p": 0.001,
    }  # fmt: skip
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor", "min_pixels": 3136,
        "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }  # fmt: skip
    text = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "additional_special_tokens": QWEN_SPECIAL[1:],
        "model_max_length": 32768, "chat_template": QWEN_TEMPLATE,
    }  # fmt: skip
    return tokenizer, host_files(config, generation, preprocessor, text), _qwen2_vl_shapes(size, vocabulary)


def _qwen2_vl_shapes(size: Mapping[str, int], vocabulary: int) -> Shapes:
    shapes: Shapes = {}
    put_decoder(shapes, "model.", size, vocabulary, bias=True)
    width, mlp = size["tower_width"], size["tower_mlp"]
    shapes["visual.patch_embed.proj.weight"] = (width, 3, 2, 14, 14)
    for i in range(size["tower_layers"]):
        block = f"visual.blocks.{i}."
        put_norm(shapes, block + "norm1", width)
        put_layer(shapes, block + "attn.qkv", 3 * width, width)
        put_layer(shapes, block + "attn.proj", width, width)
        put_norm(shapes, block + "norm2", width)
        put_layer(shapes, block + "mlp.fc1", mlp, width)
        put_layer(shapes, block + "mlp.fc2", width, mlp)
    put_norm(shapes, "visual.merger.ln_q", width)
    put_layer(shapes, "visual.merger.mlp.0", 4 * width, 4 * width)
    put_layer(shapes, "visual.merger.mlp.2", size["width"], 4 * width)
    return shapes


def _llava(size: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    tokenizer = characters(["<image>", "<pad>"])
    vocabulary, image, pad = table_rows(tokenizer), tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<pad>")
    side, patch = 56, 14
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": "float32",
        "image_token_index": image, "pad_token_id": pad, "ignore_index": -100, "projector_hidden_act": "gelu",
        "tie_word_embeddings": False, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "image_seq_length": (side // patch) ** 2, "vocab_size": vocabulary,
        "text_config": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
            "vocab_size": vocabulary, "hidden_size": size["width"], "intermediate_size": size["mlp"],
            "num_hidden_layers": size["layers"], "num_attention_heads": size["heads"],
            "num_key_value_heads": size["kv_heads"], "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": size["tower_width"],
            "intermediate_size": size["tower_mlp"], "num_hidden_layers": size["tower_layers"],
            "num_attention_heads": size["tower_heads"], "image_size": side, "patch_size": patch,
            "projection_dim": size["tower_width"], "vocab_size": 32000,
        },
    }  # fmt: skip
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "do_resize": True,
        "size": {"shortest_edge": side}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": side, "width": side}, "do_convert_rgb": True, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    }  # fmt: skip
    text = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>",
        "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "legacy": False, "model_max_length": 4096,
        "padding_side": "left", "chat_template": LLAVA_TEMPLATE,
    }  # fmt: skip
    files = host_files(config, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad}, preprocessor, text)
    files["processor_config.json"] = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": patch,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    return tokenizer, files, _llava_shapes(size, vocabulary, side, patch)


def _llava_shapes(size: Mapping[str, int], vocabulary: int, side: int, patch: int) -> Shapes:
    shapes: Shapes = {}
    put_decoder(shapes, "language_model.model.", size, vocabulary, bias=False)
    shapes["language_model.lm_head.weight"] = (vocabulary, size["width"])
    put_layer(shapes, "multi_modal_projector.linear_1", size["width"], size["tower_width"])
    put_layer(shapes, "multi_modal_projector.linear_2", size["width"], size["width"])
    tower, width = "vision_tower.vision_model.", size["tower_width"]
    shapes[tower + "embeddings.class_embedding"] = (width,)
    shapes[tower + "embeddings.patch_embedding.weight"] = (width, 3, patch, patch)
    shapes[tower + "embeddings.position_embedding.weight"] = ((side // patch) ** 2 + 1, width)
    put_norm(shapes, tower + "pre_layrnorm", width)
    put_norm(shapes, tower + "post_layernorm", width)
    for i in range(size["tower_layers"]):
        block = f"{tower}encoder.layers.{i}."
        put_norm(shapes, block + "layer_norm1", width)
        put_norm(shapes, block + "layer_norm2", width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            put_layer(shapes, f"{block}self_attn.{projection}", width, width)
        put_layer(shapes, block + "mlp.fc1", size["tower_mlp"], width)
        put_layer(shapes, block + "mlp.fc2", width, size["tower_mlp"])
    return shapes


def _whisper(size: Mapping[str, int]) -> tuple[Tokenizer, dict[str, Any], Shapes]:
    tags = [f"<|{tag}|>" for tag in ("endoftext", "startoftranscript", *LANGUAGES, *WHISPER_TASKS)]
    tokenizer = byte_level(tags + [f"<|{step * 0.02:.2f}|>" for step in range(50 * WHISPER_SECONDS + 1)], None)
    ids = {tag: tokenizer.token_to_id(tag) for tag in tags}
    end, vocabulary, width, mels = ids["<|endoftext|>"], table_rows(tokenizer), size["width"], 80
    common = {
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "max_length": 448,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "begin_suppress_tokens": [tokenizer.token_to_id("Ġ"), end],
    }  # fmt: skip
    config = {
        **common, "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper",
        "torch_dtype": "float32", "d_model": width, "encoder_layers": size["tower_layers"],
        "encoder_attention_heads": size["heads"], "encoder_ffn_dim": size["mlp"], "decoder_layers": size["layers"],
        "decoder_attention_heads": size["heads"], "decoder_ffn_dim": size["mlp"],
        "num_hidden_layers": size["tower_layers"], "activation_function": "gelu",
        "max_source_positions": 50 * WHISPER_SECONDS, "max_target_positions": 448, "num_mel_bins": mels,
        "is_encoder_decoder": True, "scale_embedding": False, "use_cache": True, "vocab_size": vocabulary,
    }  # fmt: skip
    generation = {
        **common, "is_multilingual": True, "lang_to_id": {f"<|{x}|>": ids[f"<|{x}|>"] for x in LANGUAGES},
        "task_to_id": {x: ids[f"<|{x}|>"] for x in ("transcribe", "translate")}, "suppress_tokens": [],
        "no_timestamps_token_id": ids["<|notimestamps|>"], "prev_sot_token_id": ids["<|startofprev|>"],
        "forced_decoder_ids": [[1, None], [2, ids["<|transcribe|>"]]], "max_initial_timestamp_index": 50,
        "return_timestamps": False,
    }  # fmt: skip
    preprocessor = {
        "feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "WhisperProcessor",
        "sampling_rate": 16000, "hop_length": 160, "n_fft": 400, "feature_size": mels,
        "chunk_length": WHISPER_SECONDS, "n_samples": 16000 * WHISPER_SECONDS, "nb_max_frames": 100 * WHISPER_SECONDS,
        "padding_side": "right", "padding_value": 0.0, "return_attention_mask": False,
    }  # fmt: skip
    text = {
        "tokenizer_class": "WhisperTokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "additional_special_tokens": tags,
        "model_max_length": 448,
    }  # fmt: skip
    return tokenizer, host_files(config, generation, preprocessor, text), _whisper_shapes(size, vocabulary, mels)


def _whisper_shapes(size: Mapping[str, int], vocabulary: int, mels: int) -> Shapes:
    width = size["width"]
    shapes: Shapes = {
        "model.encoder.conv1.weight": (width, mels, 3),
        "model.encoder.conv1.bias": (width,),
        "model.encoder.conv2.weight": (width, width, 3),
        "model.encoder.conv2.bias": (width,),
        "model.encoder.embed_positions.weight": (50 * WHISPER_SECONDS, width),
        "model.decoder.embed_tokens.weight": (vocabulary, width),
        "model.decoder.embed_positions.weight": (448, width),
    }
    for stack, depth in (("model.encoder", size["tower_layers"]), ("model.decoder", size["layers"])):
        for i in range(depth):
            layer = f"{stack}.layers.{i}."
            for attention in ("self_attn", "encoder_attn")[: 1 + stack.endswith("decoder")]:
                for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    put_layer(shapes, f"{layer}{attention}.{projection}", width, width, bias=projection != "k_proj")
                put_norm(shapes, f"{layer}{attention}_layer_norm", width)
            put_layer(shapes, layer + "fc1", size["mlp"], width)
            put_layer(shapes, layer + "fc2", width, size["mlp"])
            put_norm(shapes, layer + "final_layer_norm", width)
        put_norm(shapes, f"{stack}.layer_norm", width)
    return shapes


def host_files(config: Any, generation: Any, preprocessor: Any, text: Any) -> dict[str, Any]:
    return {
        "config.json": config,
        "generation_config.json": generation,
        "preprocessor_config.json": preprocessor,
        "tokenizer_config.json": text,
    }


FAMILIES: Mapping[str, Builder] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "whisper": _whisper,
}
