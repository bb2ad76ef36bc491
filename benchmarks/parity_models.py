"""The models of `device_parity.py`: published ones with fewer layers, their weights and their prompts."""

from __future__ import annotations

import dataclasses
import os
import re
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from mmjax.cli.bench.published_configs import PUBLISHED

SEED = 14
LAYERS, TOWER_LAYERS = 2, 3  # towers that are read before their last layer run one less
WIDTHS = ("tiny", "published")
RATE = 16_000

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its prompts. media: of each prompt. image: (width, height). changes: of config.json."""

    name: str
    model: str
    media: tuple[tuple[str, ...], ...] = ((), ())
    image: tuple[int, int] = (336, 336)
    text: int = 60
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quantization: str | None = None


SEEN = (("image",), ("image", "video"))
HEARD = (("audio",), ("audio", "audio"))
ALL = (("image", "audio"), ("video",))
CASES = (
    Case("Qwen3-Omni", "Qwen3-Omni-30B-A3B", ALL, (256, 288)),
    Case("Qwen3-VL-MoE", "Qwen3-VL-30B-A3B", SEEN, (256, 288)),
    Case("Qwen2-Audio", "Qwen2-Audio-7B", HEARD),
    Case("MiniCPM-V", "MiniCPM-V-2_6", (("image",), ("image", "image")), (448, 448)),
    Case("LLaVA-OneVision", "llava-onevision-qwen2-0.5b", (("image",), ("video",)), (384, 384)),
    Case("Qwen2.5-Omni", "Qwen2.5-Omni-3B", ALL, (252, 140)),
    Case("Qwen2.5-VL", "Qwen2.5-VL-3B", SEEN, (252, 140)),
    Case("Qwen3-VL", "Qwen3-VL-2B", SEEN, (256, 288)),
    Case("Qwen2-VL", "Qwen2-VL-2B", SEEN, (252, 140)),
    Case("Qwen2-VL, int8", "Qwen2-VL-2B", SEEN, (252, 140), quantization="int8"),
    Case("LLaVA", "llava-1.5-7b", (("image",), ())),
    Case("Phi-3.5-vision", "Phi-3.5-vision", (("image",), ())),
    Case("Ultravox", "ultravox-v0_5-llama-3_2-1b", HEARD),
    Case("Whisper", "whisper-large-v3-turbo", (("audio",), ("audio",))),
    Case("Llama", "Llama-3.2-1B"),
    Case("Mistral, window of 100", "Mistral-7B-v0.1", text=300, changes={"sliding_window": 100}),
    Case("Phi-3, window of 47", "Phi-3-mini-4k", text=300, changes={"sliding_window": 47}),
)
BY_NAME = {case.name: case for case in CASES}


# -- models ------------------------------------------------------------------------------------------------------------


def overrides(case: Case, width: str) -> Json:
    """The changes of a published config.json: fewer layers, and for `tiny` small widths too."""
    config, _ = PUBLISHED[case.model]
    part = config.get("thinker_config", config)
    text = part.get("text_config", part)
    changed = _text(text, 256 if case.name == "MiniCPM-V" else 64, width) | dict(case.changes)
    if "text_config" in part:
        changed = {"text_config": changed}
    if part is not text and width == "tiny" and "stack_factor" in part:
        changed["hidden_size"] = 64
    for name in ("vision_config", "audio_config"):
        if name in part:
            changed[name] = _tower(part[name], width)
    if "img_processor" in part:  # config.json has the name of this tower only
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
        rest = {"image_size": 336, "patch_size": 14, "projection_dim": 768}
        changed["img_processor"] = {"vision_config": rest | sizes | _tower(sizes, width)}
    return {"thinker_config": changed} if "thinker_config" in config else changed


def _text(text: Json, hidden: int, width: str) -> Json:
    if "decoder_layers" in text:
        return _tower(text, width) | {"decoder_layers": LAYERS}
    changed: Json = {"num_hidden_layers": LAYERS}
    if width == "published":
        return changed
    changed |= {"hidden_size": hidden, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    head_dim = hidden // 4
    if "head_dim" in text:
        changed["head_dim"] = head_dim
    if "num_experts" in text:
        changed |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    scaling = text.get("rope_scaling") or {}
    if "mrope_section" in scaling:
        changed["rope_scaling"] = {"mrope_section": [4, 2, 2]}
    if "short_factor" in scaling:
        factors = ("short_factor", "long_factor")
        changed["rope_scaling"] = {name: scaling[name][: head_dim // 2] for name in factors}
    return changed


def _tower(tower: Json, width: str) -> Json:
    """Changes of a vision or audio tower, and of Whisper."""
    changed: Json = {
        "num_hidden_layers": TOWER_LAYERS, "depth": LAYERS, "encoder_layers": LAYERS, "fullatt_block_indexes": [1],
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    if width == "tiny":
        changed |= dict.fromkeys(("hidden_size", "embed_dim", "d_model", "out_hidden_size", "output_dim"), 64)
        changed |= dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 128)
        heads = ("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
        changed |= dict.fromkeys(heads, 4) | {"downsample_hidden_size": 8}
    return {name: value for name, value in changed.items() if name in tower}


def draw(path: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> np.ndarray:
    """float32 values of a parameter, uniform, of a deviation that lets logits spread over a few units.

    Uniform, because these are bits divided by a power of two: no function that platforms compute differently.
    """
    name = path.rpartition(".")[2]
    fan_in = np.prod([size for size, axis in zip(shape[:-1], axes, strict=False) if axis not in ("pair", "depth")])
    if name in ("embed", "head"):
        deviation = 2.5 / shape[1] ** 0.5
    elif re.search(r"norm\d?$|_bias$", name):
        deviation = 0.1
    elif re.search(r"positions$|embed$|query$|newline$|divider$", name):
        deviation = 0.5
    elif "experts" in axes:
        deviation = 1.4 / shape[1] ** 0.5
    else:
        deviation = 1.4 / fan_in**0.5
    values = np.empty(int(np.prod(shape)), np.float32)
    step = 1 << 22
    parts = [values[begin : begin + step] for begin in range(0, len(values), step)]

    def fill(number: int) -> None:
        generator = np.random.default_rng([SEED, zlib.crc32(path.encode()), number])
        generator.random(dtype=np.float32, out=parts[number])
        parts[number] -= np.float32(0.5)
        parts[number] *= np.float32(12**0.5 * deviation)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(len(parts))))
    return values.reshape(shape) + np.float32(1) if re.search(r"norm\d?$", name) else values.reshape(shape)


# -- prompts -----------------------------------------------------------------------------------------------------------


def make_prompts(case: Case, placeholders: Mapping[str, str], encode: Callable[[str], list[int]]) -> list[Json]:
    """Prompts of random tokens behind their media, which need no resizing."""
    rng = np.random.default_rng(SEED)
    prompts = []
    for modalities in case.media:
        media: dict[str, list[Any]] = {}
        text = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>" if case.name == "Whisper" else ""
        for modality in modalities:
            media.setdefault(modality, []).append(_item(case, modality, rng))
            placeholder = placeholders.get(modality, "").replace("<|image_{i}|>", "<|image|>")  # the token, not text
            text += placeholder.replace("{i}", str(len(media[modality])))
        token_ids = [*encode(text), *rng.integers(300, 30_000, case.text).tolist()]
        prompts.append({"prompt_token_ids": token_ids, "multi_modal_data": media})
    return prompts


def _item(case: Case, modality: str, rng: np.random.Generator) -> Any:
    width, height = case.image
    if modality == "audio":
        return (rng.random(2 * RATE, np.float32) - np.float32(0.5), RATE)
    if modality == "image":
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    frames = rng.integers(0, 256, (4, height, width, 3), np.uint8)
    clip = {"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
    return (frames, clip | {"do_sample_frames": False, "video_backend": "opencv"})
