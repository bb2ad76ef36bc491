"""Clips of any length: frames, chunks, embeddings, prompts, errors; against stored outputs of published processors."""

import importlib
import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from input_processors import load_processor, make_input_processor, read_files
from mmjax.processors import whisper_chunks
from mmjax.processors.base import MediaItem
from mmjax.spec import conv_length
from mmjax.types import RequestError
from prompts import random_chord

Make = Callable[[str], Path]
HOP = 160


def whole(item: MediaItem, window: int = 0) -> np.ndarray:
    """The frames of a window, joined from its chunks: f32[bins, frames]. Overlapping frames of chunks are equal."""
    mine = item.features["window_ids"] == window
    mel, width = item.features["mel"][mine], 2 * whisper_chunks.CHUNK_STEPS
    before, behind = whisper_chunks.FRAMES_BEFORE, whisper_chunks.FRAMES_AFTER
    for left, right in itertools.pairwise(mel):
        np.testing.assert_array_equal(left[-before - behind :], right[: before + behind])
    assert not mel[0, :before].any()
    joined: np.ndarray = mel[:, before : before + width].reshape(-1, mel.shape[-1]).T
    return joined


@pytest.mark.parametrize("case", ["audio", "two_audios", "audio_truncated"])
def test_qwen2_audio_golden(case: str, shared: Path) -> None:
    directory = shared / "reference/qwen2_audio"
    golden, (processor, _) = np.load(directory / "golden.npz"), load_processor("qwen2_audio", directory)
    num_frames = golden[f"{case}/feature_attention_mask"].sum(axis=1)
    for index, frames in enumerate(num_frames.tolist()):
        audio = golden[f"{case}/raw_audio_{index}"]
        item = processor.process_item("audio", audio, {})
        wanted = golden[f"{case}/input_features"][index]
        found = whole(item)[:, : wanted.shape[1]]
        np.testing.assert_allclose(found, wanted[:, : found.shape[1]], rtol=0, atol=1e-4)
        assert int(item.features["audio_steps"].sum()) == conv_length(frames)
        assert item.num_embeds == processor.num_embeds("audio", audio.shape, {}) == (conv_length(frames) - 2) // 2 + 1


@pytest.mark.parametrize("case", ["audio", "audio_two_chunks"])
def test_ultravox_golden(case: str, shared: Path) -> None:
    directory = shared / "reference/ultravox"
    golden, (processor, _) = np.load(directory / "golden.npz"), load_processor("ultravox", directory)
    item = processor.process_item("audio", golden[f"{case}/raw_audio_0"], {})
    lengths = golden[f"{case}/audio_lens"].tolist()
    assert item.num_embeds == golden[f"{case}/audio_token_len"].sum()
    assert int(item.features["window_ids"][-1]) + 1 == golden[f"{case}/audio_num_chunks"][0] == len(lengths)
    for window, frames in enumerate(lengths):
        wanted = golden[f"{case}/audio_values"][window]
        found = whole(item, window)[:, : wanted.shape[1]]
        np.testing.assert_allclose(found, wanted[:, : found.shape[1]], rtol=0, atol=1e-4)
        mine = item.features["window_ids"] == window
        assert item.features["audio_steps"][mine].sum() == conv_length(frames)
        assert item.features["num_frames"][mine][0] == wanted.shape[1]


@pytest.mark.parametrize("samples", [321, 640, 16000, 61440, 61441, 64000, 90000])
def test_qwen2_audio_chunks(samples: int, tiny_dir: Make, caplog: pytest.LogCaptureFixture) -> None:
    processor, _ = load_processor("qwen2_audio", tiny_dir("qwen2_audio"))
    with caplog.at_level(logging.WARNING):
        item = processor.process_item("audio", random_chord(1, samples / 16000)[:samples], {})
    steps = conv_length(min(-(-samples // HOP), 400))
    assert item.num_embeds == steps // 2 == processor.num_embeds("audio", (samples,), {})
    assert item.num_inputs == -(-steps // 96) and item.features["first_step"].tolist() == [
        96 * i for i in range(item.num_inputs)
    ]
    assert item.features["num_frames"].tolist() == [400 - 192 * i for i in range(item.num_inputs)]
    assert item.features["step_index"].tolist() == list(range(0, 2 * item.num_embeds, 2))
    assert ("is cut to the model's window" in caplog.text) == (samples > 64000)


def test_clips_too_short_for_an_embedding(tiny_dir: Make) -> None:
    processor, _ = load_processor("qwen2_audio", tiny_dir("qwen2_audio"))
    with pytest.raises(RequestError, match=r"The audio \(len=320\) is too short to be represented inside the model"):
        processor.process_item("audio", random_chord(1, 1)[:320], {})
    assert processor.num_embeds("audio", (320,), {}) == 0


@pytest.mark.parametrize(
    ("samples", "num_embeds"), [(1, 1), (160 * 16, 1), (160 * 16 + 1, 2), (64000, 25), (64001, 26)]
)
def test_ultravox_embeds(samples: int, num_embeds: int, tiny_dir: Make) -> None:
    processor, _ = load_processor("ultravox", tiny_dir("ultravox"))
    item = processor.process_item("audio", random_chord(1, 5)[:samples], {})
    assert item.num_embeds == num_embeds == processor.num_embeds("audio", (samples,), {})
    assert len(item.features["step_index"]) == len(item.features["num_steps"]) == num_embeds


def test_ultravox_windows_after_the_first(tiny_dir: Make) -> None:
    """They are as long as the window, and their last embedding has steps after the end of the audio."""
    processor, _ = load_processor("ultravox", tiny_dir("ultravox"))
    item = processor.process_item("audio", random_chord(1, 9)[: 64000 * 2 + 160 * 30], {})
    later = item.features["window_ids"] == 2
    assert item.features["num_frames"][item.features["first_step"] == 0].tolist() == [400, 400, 400]
    assert (item.features["audio_steps"][later], item.features["output_steps"][later]) == (15, 16)
    assert item.features["num_steps"].tolist() == [8] * 52
    first = np.array([8 * i + base for base, n in ((0, 25), (3 * 96, 25), (6 * 96, 2)) for i in range(n)])
    np.testing.assert_array_equal(item.features["step_index"], first)
    assert not whole(item, 2)[:, 30:].any()


def test_prompts(tiny_dir: Make) -> None:
    """Placeholders of every form; Ultravox' marker lies past the vocabulary."""
    given = {"audio": [random_chord(1, 0.5), random_chord(2, 1.0)]}
    for family, own in (
        ("qwen2_audio", "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>Audio 2: <|audio_bos|><|AUDIO|><|audio_eos|>x"),
        ("ultravox", "<|audio|><|audio|>x"),
    ):
        renderer = make_input_processor(family, tiny_dir(family))
        plain, generic = (
            renderer.process(renderer.parse({"prompt": text, "multi_modal_data": given}))
            for text in (own, "<audio><audio>x")
        )
        assert plain.token_ids.tolist() == generic.token_ids.tolist()
        assert [span.length for span in plain.spans] == [entry.item.num_embeds for entry in plain.items]
        again = renderer.process(
            renderer.parse({"prompt_token_ids": plain.token_ids.tolist(), "multi_modal_data": given})
        )
        assert again.token_ids.tolist() == plain.token_ids.tolist() and again.spans == plain.spans
        with pytest.raises(RequestError, match="2 placeholder tokens"):
            renderer.process(renderer.parse({"prompt": own, "multi_modal_data": {"audio": given["audio"][:1]}}))
        beyond = read_files(tiny_dir(family))["config.json"]["vocab_size"] + 1
        with pytest.raises(RequestError, match="out of vocabulary"):
            renderer.process(renderer.parse({"prompt_token_ids": [1, beyond]}))


def test_ultravox_prompts_bring_their_own_first_token(tiny_dir: Make) -> None:
    renderer = make_input_processor("ultravox", tiny_dir("ultravox"))
    tokens = renderer.process(renderer.parse("<|begin_of_text|>hello")).token_ids.tolist()
    assert tokens[0] == renderer.tokenizer.id_of("<|begin_of_text|>") and tokens.count(tokens[0]) == 1  # type: ignore[union-attr]


def test_files_of_two_checkpoints(tiny_dir: Make) -> None:
    files = read_files(tiny_dir("qwen2_audio"))
    files["preprocessor_config.json"]["chunk_length"] = 30
    module = importlib.import_module("mmjax.processors.qwen2_audio")
    with pytest.raises(ValueError, match="belong to different checkpoints"):
        module.Processor(files["config.json"], files, None)
