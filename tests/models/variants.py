"""Tiny checkpoints that differ from the usual ones as published models do, and in key layouts."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

import tiny

if TYPE_CHECKING:
    from models.published import Published

Weights = dict[str, np.ndarray]
Files = dict[str, dict[str, Any]]
WEIGHTS = "model.safetensors"
HOST_FILES = ("video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json")


def edit(directory: Path, change: Callable[[Files, Weights], None]) -> Path:
    """Let `change` alter the JSON files and the tensors of a checkpoint."""
    files: Files = {path.name: json.loads(path.read_text()) for path in directory.glob("*config.json")}
    weights = load_file(directory / WEIGHTS)
    change(files, weights)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def redraw(weights: Weights, name: str, *shape: int, seed: int = 0) -> None:
    """Give a tensor another shape, with values to match."""
    weights[name] = tiny.draw(name, shape, seed)


def qwen_untied(files: Files, weights: Weights) -> None:
    """An untied head, as the 7B has."""
    files["config.json"] |= {"tie_word_embeddings": False, "rope_theta": 5000.0}
    redraw(weights, "lm_head.weight", *weights["model.embed_tokens.weight"].shape)
    weights["lm_head.weight"][264:] *= tiny.MUTED  # special tokens and padding


def llava_long_rope(files: Files, weights: Weights) -> None:
    """Heads whose size does not follow from the width, Llama 3.1's rope, and a feature layer counted from below."""
    head, text = 20, files["config.json"]["text_config"]
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    text |= {"head_dim": head, "rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **scaling}}
    files["config.json"]["vision_feature_layer"] = 1
    for name in [name for name in weights if "language_model" in name and "self_attn" in name]:
        heads = text["num_attention_heads" if re.search("[qo]_proj", name) else "num_key_value_heads"]
        shape = (text["hidden_size"], heads * head)
        redraw(weights, name, *(shape if "o_proj" in name else shape[::-1]))


def llava_full(files: Files, weights: Weights) -> None:
    """With the class token's embedding, from the last layer; larger images; linear rope; the embedding is the head."""
    config, side = files["config.json"], 70
    config |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "tie_word_embeddings": True}
    config["text_config"] |= {"tie_word_embeddings": True, "rope_scaling": {"type": "linear", "factor": 2.0}}
    config["vision_config"] |= {"image_size": side}
    config["image_seq_length"] = 26
    files["processor_config.json"] |= {"vision_feature_select_strategy": "full"}
    files["preprocessor_config.json"] |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    redraw(weights, "vision_tower.vision_model.embeddings.position_embedding.weight", 26, 32)
    del weights["language_model.lm_head.weight"]
    special = [*range(3), *range(354, len(weights["language_model.model.embed_tokens.weight"]))]
    weights["language_model.model.embed_tokens.weight"][special] *= tiny.MUTED


def onevision_untied(files: Files, weights: Weights) -> None:
    """An untied head, as the 7B has; the last layer but one; images scaled down above two crops."""
    config = files["config.json"]
    config |= {"vision_feature_layer": -2, "vision_aspect_ratio": "anyres_max_2"}
    config["text_config"] |= {"tie_word_embeddings": False, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    redraw(weights, "language_model.lm_head.weight", *weights["language_model.model.embed_tokens.weight"].shape)
    weights["language_model.lm_head.weight"][264:] *= tiny.MUTED


def whisper_128_bins(files: Files, weights: Weights) -> None:
    """As many mel bins as large-v3 has, and other heads in the decoder than in the encoder."""
    files["config.json"] |= {"num_mel_bins": 128, "decoder_attention_heads": 6}
    files["preprocessor_config.json"] |= {"feature_size": 128}
    redraw(weights, "model.encoder.conv1.weight", len(weights["model.encoder.conv1.weight"]), 128, 3)


def omni_chunks(files: Files, weights: Weights) -> None:
    """Chunks of an even number of frames that leave an odd number of steps, another interleaving, a faster clock."""
    thinker = files["config.json"]["thinker_config"]
    thinker |= {"position_id_per_seconds": 26, "seconds_per_chunk": 1}
    thinker["audio_config"] |= {"n_window": 17, "encoder_attention_heads": 2}
    thinker["vision_config"] |= {"fullatt_block_indexes": [0], "window_size": 56}


def omni_two_deepstack_layers(files: Files, weights: Weights) -> None:
    """DeepStack after the last layer too, expert weights that do not sum to one, windows of three chunks."""
    thinker = files["config.json"]["thinker_config"]
    thinker["vision_config"] |= {"deepstack_visual_indexes": [1, 2]}
    thinker["text_config"] |= {"norm_topk_prob": False}
    thinker["audio_config"] |= {"n_window_infer": 300}
    for name in [name for name in weights if "merger_list.0." in name]:
        redraw(weights, name.replace("merger_list.0.", "merger_list.1."), *weights[name].shape)


def qwen_wide_windows(files: Files, weights: Weights) -> None:
    """Windows of 4 x 4 embeddings, as published, and the head is the embedding."""
    files["config.json"]["vision_config"] |= {"window_size": 112, "fullatt_block_indexes": [0]}
    files["config.json"]["tie_word_embeddings"] = True
    del weights["lm_head.weight"]
    weights["model.embed_tokens.weight"][264:] *= tiny.MUTED  # special tokens and padding


def qwen3_one_deepstack_layer(files: Files, weights: Weights) -> None:
    """One DeepStack layer, the last but one, and a larger position table."""
    vision, prefix = files["config.json"]["vision_config"], "model.visual."
    vision |= {"deepstack_visual_indexes": [vision["depth"] - 2], "num_position_embeddings": 81}
    redraw(weights, prefix + "pos_embed.weight", 81, vision["hidden_size"])
    for name in [name for name in weights if "deepstack_merger_list.1." in name]:
        del weights[name]


def audio_short_window(files: Files, weights: Weights) -> None:
    """As many mel bins as are published, and a window of one chunk and four steps."""
    audio = files["config.json"]["audio_config"]
    audio |= {"num_mel_bins": 128, "max_source_positions": 100}
    prepare = {"feature_size": 128, "chunk_length": 2, "n_samples": 32000, "nb_max_frames": 200}
    files["preprocessor_config.json"] |= prepare
    redraw(weights, "audio_tower.conv1.weight", len(weights["audio_tower.conv1.weight"]), 128, 3)
    redraw(weights, "audio_tower.embed_positions.weight", 100, weights["audio_tower.conv1.weight"].shape[0])


def ultravox_norm_after(files: Files, weights: Weights) -> None:
    """The projector up to v0.4.1, another stack factor, and an untied head."""
    config, width = files["config.json"], len(weights["multi_modal_projector.linear_2.weight"])
    config |= {"projector_ln_mid": False, "stack_factor": 5}
    files["processor_config.json"] |= {"stack_factor": 5}
    config["text_config"] |= {"tie_word_embeddings": False}
    stacked = 5 * config["audio_config"]["d_model"]
    redraw(weights, "multi_modal_projector.linear_1.weight", config["hidden_size"], stacked)
    redraw(weights, "multi_modal_projector.ln_pre.weight", stacked)
    del weights["multi_modal_projector.ln_mid.weight"]
    redraw(weights, "multi_modal_projector.ln_post.weight", width)
    redraw(weights, "language_model.lm_head.weight", *weights["language_model.model.embed_tokens.weight"].shape)
    weights["language_model.lm_head.weight"][264:] *= tiny.MUTED


ODD = {"layers": 3, "width": 48, "heads": 3, "mlp": 80, "tower_layers": 2, "tower_width": 24, "tower_mlp": 48}
VARIANTS: Mapping[str, tuple[str, dict[str, int], Callable[[Files, Weights], None] | None]] = {
    "qwen2_vl: one kv head, untied": ("qwen2_vl", ODD | {"kv_heads": 1, "tower_heads": 3}, qwen_untied),
    "qwen2_vl: five heads": (
        "qwen2_vl",
        {"layers": 1, "width": 60, "heads": 5, "kv_heads": 5, "tower_layers": 4, "tower_heads": 1},
        None,
    ),
    "qwen2_5_vl: wide windows, tied": ("qwen2_5_vl", ODD | {"kv_heads": 1, "tower_heads": 3}, qwen_wide_windows),
    "qwen3_vl: one deepstack layer": ("qwen3_vl", ODD | {"kv_heads": 1, "tower_heads": 3}, qwen3_one_deepstack_layer),
    "qwen3_vl_moe: one head": ("qwen3_vl_moe", {"layers": 3, "heads": 1, "kv_heads": 1, "tower_heads": 1}, None),
    "qwen3_moe: four layers": ("qwen3_moe", {"layers": 4, "width": 48, "heads": 3, "kv_heads": 3}, None),
    "llava: odd heads, llama3 rope": ("llava", ODD | {"kv_heads": 1, "tower_heads": 3}, llava_long_rope),
    "llava: class token, tied": ("llava", {"kv_heads": 4, "tower_heads": 2}, llava_full),
    "llava_onevision: odd heads, untied": (
        "llava_onevision",
        ODD | {"kv_heads": 1, "tower_heads": 3},
        onevision_untied,
    ),
    "minicpmv: one head in the resampler": (
        "minicpmv",
        {"width": 32, "heads": 4, "kv_heads": 4, "tower_width": 24, "tower_heads": 2, "tower_layers": 2},
        None,
    ),
    "phi3_v: one kv head": (
        "phi3_v",
        ODD | {"kv_heads": 1, "tower_heads": 3, "tower_layers": 4},
        None,
    ),
    "qwen2_5_omni: odd heads, odd chunks": ("qwen2_5_omni", ODD | {"kv_heads": 1, "tower_heads": 3}, omni_chunks),
    "qwen3_omni_moe: two deepstack layers, wide windows": (
        "qwen3_omni_moe",
        {"layers": 3, "kv_heads": 1, "tower_width": 24, "tower_heads": 2, "tower_mlp": 40},
        omni_two_deepstack_layers,
    ),
    "qwen2_audio: 128 bins, short window": ("qwen2_audio", ODD | {"kv_heads": 1, "tower_heads": 3}, audio_short_window),
    "ultravox: norm after, five steps": ("ultravox", ODD | {"kv_heads": 1, "tower_heads": 2}, ultravox_norm_after),
    "whisper: 128 bins": ("whisper", ODD | {"tower_layers": 1}, whisper_128_bins),
    "whisper: deep encoder": ("whisper", {"layers": 1, "tower_layers": 4, "heads": 1, "mlp": 96}, None),
}


def build(name: str, directory: Path, seed: int) -> Path:
    """Make one of VARIANTS."""
    family, sizes, change = VARIANTS[name]
    tiny.make(family, directory, seed=seed, **sizes)
    return edit(directory, change) if change else directory


# -- key layouts -------------------------------------------------------------------------------------------------------

RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {  # published names -> those of transformers since 4.52
    "qwen2_vl": (("model.", "model.language_model."), ("visual.", "model.visual.")),
    "llava": (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
    "llava_onevision": (
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("image_newline", "model.image_newline"),
    ),
    "whisper": (("model.", ""),),
    "qwen2_audio": (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("audio_tower.", "model.audio_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
    "qwen2_5_vl": (("model.", "model.language_model."), ("visual.", "model.visual.")),
    "qwen3_vl": (),  # these are younger
    "qwen3_vl_moe": (),
    "qwen3_moe": (),
    "qwen2_5_omni": (("thinker.", ""),),
    "qwen3_omni_moe": (("thinker.", ""),),
}


def rename(family: str, source: Path, directory: Path) -> Path:
    """The same checkpoint under the names of transformers since 4.52 (Whisper: of a bare WhisperModel)."""
    shutil.copytree(source, directory)

    def change(files: Files, weights: Weights) -> None:
        for name in list(weights):
            old, new = next(((old, new) for old, new in RENAMED[family] if name.startswith(old)), ("", ""))
            weights[new + name.removeprefix(old)] = weights.pop(name)

    return edit(directory, change)


def save(model: "Published", source: Path, directory: Path) -> Path:
    """The same checkpoint as transformers itself saves it: tensors, config.json, preprocessor_config.json."""
    model.model.save_pretrained(directory)
    if hasattr(model, "prepare"):  # a language model alone needs nothing prepared
        model.prepare.save_pretrained(directory)
    if hasattr(model, "feature_extractor"):  # the hub has one file for both
        seen = json.loads((directory / "preprocessor_config.json").read_text())
        audio_options = json.loads(model.feature_extractor.to_json_string())
        (directory / "preprocessor_config.json").write_text(json.dumps(audio_options | seen))
    for name in HOST_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    return directory
