"""The Omni processors: clips of any length, the clock, and videos with audio in all forms of prompts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from input_processors import load_processor
from mmjax.multimodal.video import Video
from mmjax.processors.base import MediaItem, PlaceholderSpan
from mmjax.processors.qwen_omni import OmniProcessor
from mmjax.types import RequestError

Make = Callable[[str], Path]
FAMILIES = ("qwen2_5_omni", "qwen3_omni_moe")
AREA = {"qwen2_5_omni": {"min_pixels": 784}, "qwen3_omni_moe": {"min_pixels": 1024}}
BOS, EOS, TEXT = -3, -4, 7  # in `prompt`: the tokens around sound, and any other


@pytest.fixture(params=FAMILIES)
def omni(request: pytest.FixtureRequest, tiny_dir: Make) -> OmniProcessor:
    return _load(request.param, tiny_dir)


def _load(family: str, tiny_dir: Make) -> OmniProcessor:
    processor = load_processor(family, tiny_dir(family))[0]
    assert isinstance(processor, OmniProcessor)
    return processor


def sound(omni: OmniProcessor, seconds: float) -> MediaItem:
    return omni.process_item(
        "audio", np.random.default_rng(0).standard_normal(int(seconds * 16000)).astype(np.float32), {}
    )


def clip(omni: OmniProcessor, frames: int, **kwargs: Any) -> MediaItem:
    side = omni.patch_size * omni.merge_size
    options = {"use_audio_in_video": True, "min_pixels": side**2, **kwargs}
    return omni.process_item("video", Video(np.zeros((frames, side, 2 * side, 3), np.uint8), {}), options)


def prompt(omni: OmniProcessor, *parts: str | int) -> list[int]:
    """Tokens: a modality is its marker, numbers are themselves."""
    named = {BOS: omni.audio_bos_id, EOS: omni.audio_eos_id}
    return [omni.placeholder_ids[part] if isinstance(part, str) else named.get(part, part) for part in parts]


@pytest.mark.parametrize("samples", [1, 159, 160, 320, 321, 480, 4801, 16000, 16001, 40000])
def test_embeds_and_chunks_of_clips(omni: OmniProcessor, samples: int) -> None:
    audio = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    rows = omni.num_audio_embeds(samples)
    assert omni.num_embeds("audio", (samples,), {}) == rows
    if rows < 1:
        with pytest.raises(RequestError, match="too short to be represented"):
            omni.process_item("audio", audio, {})
        return
    item = omni.process_item("audio", audio, {})
    frames = samples // 160 if omni.fps == 1 else -(-samples // 160)
    mel, length = item.features["mel"], item.features["audio_frames"]
    assert (
        (item.num_embeds, item.num_inputs) == (rows, len(mel))
        and length.sum() == frames
        and not mel.reshape(-1, 32)[frames:].any()
    )
    assert item.features["step_index"].shape == (rows,)
    steps = (frames + 1) // 2 // 2 if omni.fps == 2 else None
    if steps is None:  # thirteen of each full chunk, and an eighth of the rest
        steps = frames // 100 * 13 + -(-(frames % 100) // 8)
    assert rows == steps


def test_longer_clips_are_cut_at_the_end_of_the_window(tiny_dir: Make, caplog: pytest.LogCaptureFixture) -> None:
    omni = _load("qwen2_5_omni", tiny_dir)
    assert (
        sound(omni, 9.0).num_embeds == sound(omni, 8.0).num_embeds == 200
        and "is cut to the model's window" in caplog.text
    )
    assert sound(_load("qwen3_omni_moe", tiny_dir), 40.0).num_embeds == 40 * 13


def test_a_short_last_chunk_is_followed_by_silence_but_a_single_one_is_not(tiny_dir: Make) -> None:
    omni = _load("qwen3_omni_moe", tiny_dir)
    assert sound(omni, 0.5).features["num_frames"].tolist() == [50]
    long = sound(omni, 3.5).features
    assert long["num_frames"].tolist() == [100] * 4 and long["audio_frames"].tolist() == [100, 100, 100, 50]
    assert long["window_ids"].tolist() == [0, 0, 1, 1]


def test_turns_of_two_seconds(tiny_dir: Make) -> None:
    omni = _load("qwen2_5_omni", tiny_dir)
    assert omni.interleave(clip(omni, 6), sound(omni, 2.6)) == [
        ("video", 0, 4),
        ("audio", 0, 50),
        ("video", 4, 2),
        ("audio", 50, 15),
    ]
    assert omni.interleave(clip(omni, 2), sound(omni, 4.2))[-2:] == [("audio", 50, 50), ("audio", 100, 5)]
    slow = omni.interleave(clip(omni, 6, fps=0.5), sound(omni, 1.0))  # steps four seconds apart, as published
    assert slow == [
        ("video", 0, 2),
        ("audio", 0, 25),
        ("video", 2, 1),
        ("video", 3, 1),
        ("video", 4, 1),
        ("video", 5, 1),
    ]


def test_turns_by_time(tiny_dir: Make) -> None:
    omni = _load("qwen3_omni_moe", tiny_dir)
    assert omni.interleave(clip(omni, 6), sound(omni, 5.0)) == [
        ("video", 0, 2),
        ("audio", 0, 26),
        ("video", 2, 2),
        ("audio", 26, 26),
        ("video", 4, 2),
        ("audio", 52, 13),
    ]
    assert omni.interleave(clip(omni, 6), sound(omni, 1.0)) == [
        ("video", 0, 2),
        ("audio", 0, 13),
        ("video", 2, 4),
    ]
    assert omni.interleave(clip(omni, 4, fps=4.0), sound(omni, 1.0))[1] == (
        "audio",
        0,
        7,
    )  # 6.5 positions come after 6


def test_audio_goes_to_placeholders_and_videos_in_the_order_of_the_prompt(omni: OmniProcessor) -> None:
    items = {
        "video": [clip(omni, 2), clip(omni, 4)],
        "audio": [sound(omni, 0.3), sound(omni, 0.7), sound(omni, 1.1), sound(omni, 0.5)],
        "image": [omni.process_item("image", np.zeros((60, 60, 3), np.uint8), {})],
    }
    tokens = prompt(omni, TEXT, "video", TEXT, BOS, "audio", EOS, "video", "image", TEXT, "audio", TEXT)
    expanded = omni.expand_prompt(tokens, items)
    rows: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for span in expanded.spans:
        assert (
            expanded.token_ids[span.start : span.start + span.length]
            == [omni.placeholder_ids[span.modality]] * span.length
        )
        rows.setdefault((span.modality, span.item_index), []).append((span.embed_offset, span.length))
    assert {key: sum(n for _, n in parts) for key, parts in rows.items()} == {
        (kind, index): item.num_embeds for kind, group in items.items() for index, item in enumerate(group)
    }
    for parts in rows.values():  # every row once, in order
        assert [first for first, _ in parts] == np.cumsum([0, *(n for _, n in parts[:-1])]).tolist()
    order = [(span.modality, span.item_index) for span in expanded.spans if span.embed_offset == 0]
    assert order == [("video", 0), ("audio", 0), ("audio", 1), ("video", 1), ("audio", 2), ("image", 0), ("audio", 3)]
    assert omni.expand_prompt(expanded.token_ids, items) == expanded  # what is expanded stays as it is


def test_videos_without_audio_are_ordinary(omni: OmniProcessor) -> None:
    items = {"video": [clip(omni, 2, use_audio_in_video=False)], "audio": [sound(omni, 0.3)]}
    expanded = omni.expand_prompt(prompt(omni, "video", TEXT, "audio"), items)
    assert expanded.spans == [
        PlaceholderSpan(0, 2, "video", 0),
        PlaceholderSpan(3, items["audio"][0].num_embeds, "audio", 0),
    ]
    renamed = clip(omni, 2, use_audio_in_video=False, load_audio_from_video=True)
    nested = omni.process_item(
        "video", Video(np.zeros((2, 64, 64, 3), np.uint8), {}), {"videos_kwargs": {"use_audio_in_video": True}}
    )
    assert renamed.with_audio and nested.with_audio


@pytest.mark.parametrize(
    ("parts", "videos", "sounds", "words"),
    [
        (("video",), 1, 0, "1 video(s) need an audio item each"),
        (("video", "video"), 2, 1, "2 video(s) need an audio item each"),
        (("video",), 1, 2, "corresponding to 1 audio items, but instead found 0"),
        (("video", "audio"), 1, 1, "audio items"),
        (("video", "video"), 1, 1, "corresponding to 1 video items, but instead found 2"),
        ((TEXT,), 1, 1, "corresponding to 1 video items, but instead found 0"),
        ((BOS, "video", "video", "audio", EOS), 1, 1, "corresponding to 1 video items, but instead found 2"),
        (("video", "image"), 1, 1, "remove"),
    ],
)
def test_mismatches(omni: OmniProcessor, parts: tuple[Any, ...], videos: int, sounds: int, words: str) -> None:
    items = {"video": [clip(omni, 2)] * videos, "audio": [sound(omni, 0.3)] * sounds}
    with pytest.raises(RequestError) as caught:
        omni.expand_prompt(prompt(omni, *parts), items)
    assert words in str(caught.value)


def test_positions_of_a_video_with_audio(omni: OmniProcessor) -> None:
    """By hand: 4 frames at the default rate, one second of audio, text before and after."""
    items = {"video": [clip(omni, 4)], "audio": [sound(omni, 1.0)]}
    expanded = omni.expand_prompt(prompt(omni, TEXT, 5, "video", 6, TEXT, TEXT), items)
    positions, delta = omni.rope_positions(expanded.token_ids, expanded.spans, items)
    heard, second = items["audio"][0].num_embeds, int(omni.positions_per_second * 2 / omni.fps)
    assert heard == {2.0: 25, 1.0: 13}[omni.fps]
    base = 2 if omni.shared_bos_position else 3
    tail = list(positions[0, -4:])
    assert positions[:, :3].tolist() == [[0, 1, 1 if omni.shared_bos_position else 2]] * 3
    for span in expanded.spans:
        block = positions[:, span.start : span.start + span.length] - base
        if span.modality == "audio":
            assert block.tolist() == [list(range(span.embed_offset, span.embed_offset + span.length))] * 3
        else:
            rows = np.arange(span.embed_offset, span.embed_offset + span.length)
            assert block.tolist() == [(rows // 2 * second).tolist(), [0] * span.length, (rows % 2).tolist()]
    last = expanded.spans[-1]
    free = positions[:, last.start : last.start + last.length].max() + 1
    assert tail == ([free, free, free + 1, free + 2] if omni.shared_bos_position else list(range(free, free + 4)))
    assert delta == tail[-1] + 1 - len(expanded.token_ids)


def test_positions_of_ordinary_media_follow_the_clock(omni: OmniProcessor) -> None:
    items = {"video": [clip(omni, 5, use_audio_in_video=False, fps=1.0)], "audio": [sound(omni, 0.3)]}
    expanded = omni.expand_prompt(prompt(omni, "video", TEXT, "audio", TEXT), items)
    positions, delta = omni.rope_positions(expanded.token_ids, expanded.spans, items)
    step = int(omni.positions_per_second * 2)
    assert positions[0, :6].tolist() == [0, 0, step, step, 2 * step, 2 * step]
    assert positions[:, 6].tolist() == [2 * step + 1] * 3
    assert (np.diff(positions[:, 6:]) == 1).all() and delta == positions[0, -1] + 1 - len(expanded.token_ids)


def test_clip_embeddings_keep_their_time_and_audio(omni: OmniProcessor) -> None:
    for kwargs in ({}, {"use_audio_in_video": True}, {"fps": 4.0}):
        seen = omni.process_item("video", Video(np.zeros((6, 64, 128, 3), np.uint8), {}), kwargs)
        told = omni.item_for_embeds("video", (seen.grid[0], 2 * seen.grid[1], 2 * seen.grid[2]), kwargs)
        assert (told.num_embeds, told.grid, told.frame_times, told.with_audio) == (
            seen.num_embeds,
            seen.grid,
            seen.frame_times,
            seen.with_audio,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_goldens(shared: Path, family: str) -> None:
    directory = shared / "reference" / family
    omni, tokenizer = load_processor(family, directory)
    golden = dict(np.load(directory / "golden.npz"))
    for case, told in json.loads((directory / "golden.json").read_text())["cases"].items():
        items: dict[str, list[MediaItem]] = {}
        for name, media in golden.items():
            if name.startswith(f"{case}/raw_"):
                kind = name.split("_")[-2]
                media = Video(media, {"fps": 30.0}) if kind == "video" else media
                items.setdefault(kind, []).append(omni.process_item(kind, media, told["proc_kwargs"]))
        expanded = omni.expand_prompt(tokenizer.encode(told["prompt"], add_special_tokens=True), items)
        positions, delta = omni.rope_positions(expanded.token_ids, expanded.spans, items)
        assert expanded.token_ids == golden[f"{case}/input_ids"].tolist()
        np.testing.assert_array_equal(positions, golden[f"{case}/position_ids"])
        assert delta == golden[f"{case}/rope_delta"]
        for index, item in enumerate(items.get("audio", ())):
            frames = int(golden[f"{case}/feature_attention_mask"][index].sum())
            mel = item.features["mel"].reshape(-1, 32)
            exact = frames - (case == "two_audios" and index == 1 and family == "qwen3_omni_moe")  # see there
            np.testing.assert_allclose(
                mel[:exact], golden[f"{case}/input_features"][index].T[:exact], rtol=0, atol=1e-4
            )
            assert item.features["audio_frames"].sum() == frames
