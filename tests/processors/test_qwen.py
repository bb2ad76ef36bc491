"""Qwen2.5-VL's windows and clock, Qwen3-VL's times in words, and the requests that a text-only model refuses."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_inputs import random_pixels
from input_processors import load_processor, make_input_processor
from mmjax.multimodal.video import Video
from mmjax.processors.base import MediaItem, PlaceholderSpan
from mmjax.processors.qwen_vl import mrope, position_coords, smart_resize
from mmjax.types import RequestError

Make = Callable[[str], Path]
KNOWN = {"fps": 6.0, "frames_indices": [0, 3, 6, 9], "total_num_frames": 12}


def video(frames: int, height: int = 64, width: int = 96, **metadata: Any) -> Video:
    return Video(np.stack([random_pixels(i, height, width) for i in range(frames)]), metadata)


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(56, 56), (84, 140), (60, 300), (28, 28)])
def test_windows(size: tuple[int, int], tiny_dir: Make) -> None:
    """Patches of a window are contiguous; embed_order finds every embedding."""
    processor, _ = load_processor("qwen2_5_vl", tiny_dir("qwen2_5_vl"))
    plain, _ = load_processor("qwen2_vl", tiny_dir("qwen2_vl"))
    clip = video(5, *size)
    item, raster = processor.process_item("video", clip, {}), plain.process_item("video", clip, {})
    f = item.features
    patches = (f["embed_order"][:, None] + np.arange(4)).reshape(-1)
    assert sorted(patches) == list(range(item.num_inputs)) and item.grid == raster.grid
    for name in ("pixels", "patch_coords", "segment_ids"):
        np.testing.assert_array_equal(f[name][patches], raster.features[name])
    changes = np.flatnonzero(np.diff(f["window_ids"]))
    assert len(changes) == f["window_ids"].max() == len(np.unique(f["window_ids"])) - 1, "a window is one run"
    window = 2 * 28  # pixels: the tiny checkpoint's
    cell = np.stack([f["segment_ids"], *(f["patch_coords"] * 14 // window).T], axis=1)
    for number in range(f["window_ids"].max() + 1):
        assert len(np.unique(cell[f["window_ids"] == number], axis=0)) == 1
    assert len(np.unique(cell, axis=0)) == f["window_ids"].max() + 1


@pytest.mark.parametrize(
    ("metadata", "kwargs", "times"),
    [
        ({}, {}, [0, 2, 4]),  # 2 frames a second: a pair lasts one, which is two ticks
        ({"fps": 1.0}, {}, [0, 4, 8]),
        ({}, {"fps": 8}, [0, 0.5, 1]),
        ({"fps": 1.0}, {"fps": 4}, [0, 1, 2]),
        ({"fps": 30.0, "total_num_frames": 100, "frames_indices": [0, 20, 40, 60, 80]}, {}, [0, 8 / 3, 16 / 3]),
    ],
)
def test_clock(metadata: Mapping[str, Any], kwargs: Mapping[str, Any], times: list[float], tiny_dir: Make) -> None:
    processor, _ = load_processor("qwen2_5_vl", tiny_dir("qwen2_5_vl"))
    item = processor.process_item("video", video(5, 56, 84, **metadata), kwargs)
    assert item.frame_times == pytest.approx(times)
    positions, delta = processor.rope_positions([7] * 21, [PlaceholderSpan(1, 18, "video", 0)], {"video": [item]})
    np.testing.assert_array_equal(positions[0, 1:19].reshape(3, 6), np.floor(times)[:, None].repeat(6, 1) + 1)
    largest = max(int(times[-1]), 2) + 1
    assert positions[:, 19].tolist() == [largest + 1] * 3 and delta == largest + 1 - 19


def test_clock_of_images_and_of_clip_embeddings(tiny_dir: Make) -> None:
    processor, _ = load_processor("qwen2_5_vl", tiny_dir("qwen2_5_vl"))
    image = processor.process_item("image", random_pixels(1, 84, 84), {})
    assert (
        image.frame_times == ()
        and processor.span_rope_positions(image, PlaceholderSpan(0, 9, "image", 0))[0].tolist() == [0] * 9
    )
    rows = MediaItem("video", {}, 0, 8, (2, 2, 2))
    assert processor.span_rope_positions(rows, PlaceholderSpan(0, 8, "video", 0))[0].tolist() == [0] * 4 + [2] * 4


@pytest.mark.parametrize("fps", [-1, float("inf"), "fast", True])
def test_a_rate_must_be_a_number(fps: Any, tiny_dir: Make) -> None:
    processor, _ = load_processor("qwen2_5_vl", tiny_dir("qwen2_5_vl"))
    with pytest.raises(RequestError, match="fps must be a positive number"):
        processor.process_item("video", video(2), {"fps": fps})


def test_mrope_without_blocks_and_with_two_side_by_side() -> None:
    np.testing.assert_array_equal(mrope(3, [])[0], [[0, 1, 2]] * 3)
    block = np.array([[0, 0], [0, 0], [0, 1]])
    positions, delta = mrope(5, [(0, block), (2, block)])
    np.testing.assert_array_equal(positions, [[0, 0, 2, 2, 4], [0, 0, 2, 2, 4], [0, 1, 2, 3, 4]])
    assert delta == 0


# -- times in words ----------------------------------------------------------------------------------------------------


def expanded(words: str, clips: list[Any], tiny_dir: Make, **kwargs: Any) -> tuple[str, Any]:
    renderer = make_input_processor("qwen3_vl", tiny_dir("qwen3_vl"))
    media = {"multi_modal_data": {"video": clips}} if clips else {}
    rendered = renderer.process(renderer.parse({"prompt": words, **media, "mm_processor_kwargs": kwargs}))
    assert renderer.tokenizer is not None
    return renderer.tokenizer.decode(rendered.token_ids.tolist(), skip_special_tokens=False), rendered


CLIP = "<|vision_start|><|video_pad|><|vision_end|>"


def frame(seconds: str, rows: int) -> str:
    return f"<{seconds} seconds><|vision_start|>{'<|video_pad|>' * rows}<|vision_end|>"


def test_a_clip_becomes_frames_with_their_times(tiny_dir: Make) -> None:
    clip = (video(4).frames, KNOWN)  # pairs at 0 and 0.5 s, and at 1 and 1.5 s
    text, rendered = expanded(f"a {CLIP} b", [clip], tiny_dir)
    assert text == f"a {frame('0.2', 6)}{frame('1.2', 6)} b"
    assert [(span.length, span.embed_offset) for span in rendered.spans] == [(6, 0), (6, 6)]
    for span in rendered.spans:
        block = rendered.rope_positions[:, span.start : span.start + 6]
        np.testing.assert_array_equal(block - block[:, :1], np.indices((1, 2, 3)).reshape(3, -1))
    kept, _ = expanded(f"a {CLIP} b", [clip], tiny_dir, keep_video_wrapper=True)
    assert kept == f"a <|vision_start|>{frame('0.2', 6)}{frame('1.2', 6)}<|vision_end|> b"
    bare, _ = expanded("a <|video_pad|> b", [clip], tiny_dir)
    assert bare == text


def test_two_clips_odd_frames_and_a_second_request(tiny_dir: Make) -> None:
    clips = [(video(3).frames, {"fps": 1.0}), (video(2, 64, 64).frames, {"fps": 4.0})]
    text, first = expanded(f"{CLIP}and{CLIP}?", clips, tiny_dir)
    assert text == f"{frame('0.5', 6)}{frame('2.0', 6)}and{frame('0.1', 4)}?"  # the last frame counts twice
    again, second = expanded(text, clips, tiny_dir)
    assert again == text and second.spans == first.spans
    np.testing.assert_array_equal(second.rope_positions, first.rope_positions)


def test_without_metadata_two_frames_a_second(tiny_dir: Make, caplog: pytest.LogCaptureFixture) -> None:
    text, _ = expanded(CLIP, [video(4).frames], tiny_dir)
    assert text == f"{frame('0.2', 6)}{frame('1.2', 6)}" and "without metadata" in caplog.text
    text, _ = expanded(CLIP, [video(4).frames], tiny_dir, fps=1)
    assert text == f"{frame('0.5', 6)}{frame('2.5', 6)}"


def test_sampling_where_the_clip_has_every_frame(tiny_dir: Make) -> None:
    """24 frames at 4 a second, 2 a second wanted: 12, spread evenly from the first to the last."""
    processor, _ = load_processor("qwen3_vl", tiny_dir("qwen3_vl"))
    known = {"fps": 4.0, "total_num_frames": 24, "frames_indices": list(range(24)), "do_sample_frames": True}
    item = processor.process_item("video", video(24, **known), {})
    indices = np.linspace(0, 23, 12).round()
    assert item.grid[0] == 6
    assert item.frame_times == pytest.approx(((indices[::2] + indices[1::2]) / 8).tolist())
    assert processor.process_item("video", video(24, **known), {"fps": 0.1}).grid[0] == 2, (
        "never fewer than four frames"
    )
    # as many frames as transformers 5.24 samples; it bounds only the number that a rate gives
    for num_frames, steps in ((8, 4), (2, 1), (1, 1), (24, 12), (32, 16), (768, 384)):
        assert processor.process_item("video", video(24, **known), {"num_frames": num_frames}).grid[0] == steps
    with pytest.raises(RequestError, match=r"num_frames is 769, but the video has 24 frames\. Lower it to at most 768"):
        processor.process_item("video", video(24, **known), {"num_frames": 769})
    assert processor.process_item("video", video(24, **known), {"do_sample_frames": False}).grid[0] == 12
    with pytest.raises(RequestError, match="exclude each other"):
        processor.process_item("video", video(24, **known), {"num_frames": 8, "fps": 1})


@pytest.mark.parametrize("words", ["none", f"{CLIP}{CLIP}", "<|video_pad|>" * 7, "<|video_pad|>a" * 12])
def test_placeholders_that_do_not_fit(words: str, tiny_dir: Make) -> None:
    with pytest.raises(RequestError, match="video items") as caught:
        expanded(words, [(video(4).frames, KNOWN)], tiny_dir)
    assert caught.value.code == "placeholder_mismatch"


def test_sizes_of_clips_count_all_frames(tiny_dir: Make) -> None:
    processor, _ = load_processor("qwen3_vl", tiny_dir("qwen3_vl"))
    assert smart_resize(64, 96, 32, 4096, 10_000, frames=8) == (32, 32)
    assert smart_resize(64, 96, 32, 4096, 10_000) == (64, 96)
    assert processor.num_embeds("video", (40, 1080, 1920), {}) <= 25165824 // 2 // 32**2
    assert processor.num_embeds("video", (1, 10, 40), {}) == 4  # never less than one row high
    item = processor.process_item("video", video(40, 100, 70), {})
    assert item.num_embeds == processor.num_embeds("video", (40, 100, 70), {})


def test_position_ids_reach_from_corner_to_corner() -> None:
    coords = np.array([[0, 0], [3, 5], [1, 5], [3, 2]])
    np.testing.assert_allclose(
        position_coords(coords, (1, 4, 6), 48), [[0, 0], [47, 47], [47 / 3, 47], [47, 18.8]], rtol=1e-6
    )


def test_a_language_model_alone_takes_no_media(tiny_dir: Make) -> None:
    renderer = make_input_processor("qwen3_moe", tiny_dir("qwen3_moe"))
    assert renderer.process(renderer.parse("hello")).spans == []
    with pytest.raises(RequestError, match="image"):
        renderer.parse({"prompt": "hello", "multi_modal_data": {"image": random_pixels(1)}})
