"""Ids, pixels, mel features and positions against the stored outputs of the published processors."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from input_processors import load_processor, read_files
from mmjax.multimodal.video import Video
from mmjax.nn.audio.mel import log_mel
from mmjax.processors import whisper
from mmjax.processors.base import MediaItem, Processor

CASES = {
    "llava": ("text", "image", "two_images", "vllm_prompt"),
    "qwen2_vl": ("text", "image", "two_images", "video", "image_video", "video_long"),
    "qwen2_5_vl": ("text", "image", "two_images", "video", "image_video", "video_long"),
    "qwen3_vl": ("text", "image", "two_images", "video", "image_video", "video_v457_prompt"),
    "whisper": ("short", "full", "long"),
    "whisper_turbo": ("short", "full", "long"),
}
PAIRS = [(family, case) for family, cases in CASES.items() for case in cases]


def normalize(item: MediaItem, files: dict[str, dict[str, Any]]) -> np.ndarray:
    """What the model does on the device: scale to 0..1, then subtract the mean and divide by the deviation."""
    prepare = files["preprocessor_config.json"]
    mean, std = (np.asarray(prepare[f"image_{name}"], np.float32)[:, None] for name in ("mean", "std"))
    pixels = item.features["pixels"]
    if "embed_order" in item.features:  # windows have moved them
        pixels = pixels[(item.features["embed_order"][:, None] + np.arange(4)).reshape(-1)]
    flat = pixels.reshape(len(pixels), 3, -1).astype(np.float32)
    return ((flat / 255 - mean) / std).reshape(pixels.shape)


def process(
    processor: Processor, golden: dict[str, np.ndarray], case: str, fps: float | None = None
) -> dict[str, list[MediaItem]]:
    kwargs = {"keep_video_wrapper": not case.endswith("v457_prompt")}
    items: dict[str, list[MediaItem]] = {}
    for name, media in golden.items():
        if name.startswith(f"{case}/raw_"):
            kind = name.split("_")[-2]
            if kind == "video":
                media = Video(media, {"fps": fps} if fps else {})
            items.setdefault(kind, []).append(processor.process_item(kind, media, kwargs))
    return items


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_golden(shared: Path, family: str, case: str) -> None:
    directory = shared / "reference" / family
    processor, tokenizer = load_processor(family.removesuffix("_turbo"), directory)
    golden, files = dict(np.load(directory / "golden.npz")), read_files(directory)
    speech = family.startswith("whisper")
    told = json.loads((directory / "golden.json").read_text())["cases"][case]

    items = process(processor, golden, case, told.get("video_fps"))
    expanded = processor.expand_prompt(tokenizer.encode(told["prompt"], add_special_tokens=not speech), items)
    positions, delta = processor.rope_positions(expanded.token_ids, expanded.spans, items)

    assert expanded.token_ids == golden[f"{case}/{'decoder_' if speech else ''}input_ids"].tolist()
    if f"{case}/position_ids" in golden:
        np.testing.assert_array_equal(positions, golden[f"{case}/position_ids"])
        assert delta == golden[f"{case}/rope_delta"]
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if kind in items:
            pixels = np.concatenate([normalize(item, files) for item in items[kind]])
            np.testing.assert_allclose(pixels, golden[f"{case}/{name}"], rtol=0, atol=3e-7)
            assert sum(item.num_inputs for item in items[kind]) == len(golden[f"{case}/{name}"])
            if family.startswith("qwen"):
                grids = [(t, 2 * h, 2 * w) for t, h, w in (item.grid for item in items[kind])]
                assert grids == [tuple(grid) for grid in golden[f"{case}/{kind}_grid_thw"].tolist()]
    if speech:
        assert isinstance(processor, whisper.Processor)
        mel = np.asarray(log_mel(jnp.asarray(items["audio"][0].features["samples"]), processor.mel))
        np.testing.assert_allclose(mel.swapaxes(1, 2), golden[f"{case}/input_features"], rtol=0, atol=1e-4)


def test_first_token_after_a_long_clip(shared: Path) -> None:
    """The classic rule: text goes on after the largest position of the clip, here its 7 pairs of frames."""
    golden = np.load(shared / "reference/qwen2_vl/golden.npz")
    processor, _ = load_processor("qwen2_vl", shared / "reference/qwen2_vl")
    items = process(processor, dict(golden), "video_long")
    expanded = processor.expand_prompt(golden["video_long/input_ids"].tolist(), items)
    positions, _ = processor.rope_positions(expanded.token_ids, expanded.spans, items)
    span = expanded.spans[0]
    start = positions[0, span.start - 1] + 1
    assert items["video"][0].grid == (7, 2, 3)
    assert positions[:, span.start + span.length].tolist() == [start + 7] * 3
