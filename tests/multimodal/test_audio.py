"""Audio: layouts, number types, rates, files, damage, and splitting at quiet points."""

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mmjax.multimodal import audio
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.types import RequestError

RATE = 16000
LEFT, RIGHT = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 4000)).astype(np.float32)
STEREO = np.stack([LEFT, RIGHT])


def tone(rate: int, seconds: float, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("layout", [STEREO, STEREO.T], ids=["channels first", "time first"])
@pytest.mark.parametrize("rate", [None, RATE])
def test_stereo_of_both_layouts_is_averaged(layout: np.ndarray, rate: int | None) -> None:
    np.testing.assert_allclose(audio.decode((layout, rate), RATE), (LEFT + RIGHT) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 9), 9), ((9, 1), 9), ((1, 2), 2), ((2, 1), 2), ((6, 50), 50), ((50, 6), 50), ((2, 2), 2), ((1, 1), 1)],
)
def test_mono_of_any_shape(shape: tuple[int, int], expected: int) -> None:
    assert audio.to_mono(np.ones(shape, np.float32)).shape == (expected,)


@pytest.mark.parametrize(
    "samples",
    [
        np.array([-32768, 0, 16384], np.int16),
        np.array([-(2**31), 0, 2**30], np.int32),
        np.array([-128, 0, 64], np.int8),
        np.array([0, 128, 192], np.uint8),
        np.array([-1, 0, 0.5], np.float64),
        np.array([-1, 0, 0.5], np.float16),
        [-1, 0, 0.5],
    ],
)
def test_full_scale(samples: Any) -> None:
    decoded = audio.decode((samples, None), RATE)
    assert decoded.dtype == np.float32 and decoded.tolist() == [-1.0, 0.0, 0.5]


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 44100.0, 48000, np.int64(48000), 96000])
def test_resampling_keeps_a_tone_and_its_length(rate: Any) -> None:
    source = tone(int(rate), 0.5)
    decoded = audio.decode((source, rate), RATE)
    assert len(decoded) == -(-len(source) * RATE // int(rate)) and decoded.dtype == np.float32
    middle = slice(1000, 7000)
    np.testing.assert_allclose(decoded[middle], tone(RATE, 0.5)[middle], atol=0.01)


def test_resampling_filters_above_the_new_nyquist_frequency() -> None:
    assert np.abs(audio.decode((tone(48000, 0.2, 15_000), 48000), RATE)[500:-500]).max() < 0.01


def test_stereo_is_resampled_along_time() -> None:
    one = audio.decode((tone(44100, 0.3), 44100), RATE)
    two = audio.decode((np.stack([tone(44100, 0.3)] * 2, axis=1), 44100), RATE)
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_equal_rates_share_the_samples() -> None:
    assert audio.resample(LEFT, RATE, RATE + 1e-9) is LEFT


@pytest.mark.parametrize(
    ("media", "words"),
    [
        (np.zeros(0, np.float32), "empty"),
        (([], RATE), "empty"),
        (np.zeros((2, 0), np.float32), "empty"),
        (np.array([0.0, np.nan]), "NaN or infinite"),
        ((np.array([0.0, np.inf]), RATE), "NaN or infinite"),
        (np.zeros((2, 2, 2)), "Unsupported audio shape"),
        (np.zeros(4, np.int64), "full scale"),
        (np.zeros(4, bool), "cannot be bool"),
        (np.zeros(4, complex), "cannot be complex128"),
        ((LEFT, 0), "sampling rate"),
        ((LEFT, -16000), "sampling rate"),
        ((LEFT, float("nan")), "sampling rate"),
        ((LEFT, "16000"), "sampling rate"),
        ((LEFT, True), "sampling rate"),
        (["a", "b"], "numbers only"),
        ("speech.wav", "Read files first"),
        (b"RIFF", "Read files first"),
        (None, "must be samples"),
    ],
)
def test_refusals(media: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        audio.decode(media, RATE)
    assert words in str(caught.value)


def test_no_target_rate() -> None:
    with pytest.raises(RequestError, match="`target_sr` is not provided"):
        audio.decode((LEFT, 8000), None)


def as_file(samples: np.ndarray, kind: str, rate: int = 22050) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_audio_files(kind: str, tmp_path: Path) -> None:
    left, right = tone(22050, 0.3), tone(22050, 0.3, 700.0)
    data = as_file(np.stack([left, right], axis=1), kind)
    loaded, rate = audio.load(data)
    assert rate == 22050
    np.testing.assert_allclose(loaded, (left + right) / 2, atol=0.05 if kind == "OGG" else 1e-4)
    (tmp_path / "file").write_bytes(data)
    np.testing.assert_array_equal(audio.load(tmp_path / "file")[0], loaded)


@pytest.mark.parametrize("data", [b"", b"no sound at all", b"RIFF\0\0\0\0WAVE", b"#EXTM3U\nfile:///etc/hostname\n"])
def test_files_that_are_not_audio(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="Invalid or unsupported audio file"):
        audio.load(data)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="Invalid or unsupported audio file"):
        audio.load(tmp_path / "none.wav")


def test_limits_stop_a_decompression_bomb() -> None:
    data = as_file(np.zeros(10 * 22050, np.float32), "FLAC")
    assert len(data) < 50_000
    for limits in (MediaLimits(audio_seconds=9), MediaLimits(audio_bytes=500_000)):
        with pytest.raises(RequestError, match="longer than") as caught:
            audio.load(data, limits=limits)
        assert caught.value.code == "media_too_large"
    assert len(audio.load(data, limits=MediaLimits(audio_seconds=0, audio_bytes=0))[0]) == 220_500


def test_a_header_with_a_wrong_length() -> None:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(b"\0\0" * 100)
    data = bytearray(buffer.getvalue())
    data[40:44] = (2**32 - 2).to_bytes(4, "little")
    assert len(audio.load(bytes(data))[0]) == 100


def test_containers_of_video_and_odd_encodings(shared: Path) -> None:
    pairs = [("audio/aac.m4a", "audio/stereo_44k1.wav")]
    pairs += [(f"audio/{name}", "speech/jfk.flac") for name in ("opus.ogg", "mulaw_8k.wav")]
    for names in pairs:
        loaded = [audio.load((shared / "media" / name).read_bytes()) for name in names]
        mono, reference = (audio.resample(samples, rate, 8000) for samples, rate in loaded)
        assert len(mono) == len(reference)
        assert np.corrcoef(mono, reference)[0, 1] > 0.98, names
    track, own = audio.load(shared / "media/video/bunny_with_speech.mp4")
    assert own == 16000 and len(track) == 176_000


def test_split_audio_reference(shared: Path) -> None:
    for case in json.loads((shared / "reference/split_audio.json").read_text()):
        if "n" not in case:
            continue
        rng, n, rate = np.random.default_rng(case["seed"]), case["n"], case["sample_rate"]
        noise = rng.standard_normal(n).astype(np.float32)
        wave_ = noise * (0.2 + 0.8 * np.abs(np.sin(np.arange(n) / rate * 0.9))).astype(np.float32)
        names = ("max_clip_duration_s", "overlap_duration_s", "min_energy_window_size")
        clips = audio.split_audio(wave_, rate, *(case[name] for name in names))
        assert [len(clip) for clip in clips] == case["lengths"]
        np.testing.assert_array_equal(np.concatenate(clips), wave_)


def test_split_points() -> None:
    wave_ = np.ones(40_000, np.float32)
    wave_[20_000:21_600] = 0
    assert audio.find_split_point(wave_, 16_000, 28_000, 1600) == 19_200  # the first of a tie
    assert audio.find_split_point(wave_, 0, 8_000, 1600) == 0
    assert audio.find_split_point(wave_, 0, 1600, 1600) == 1600  # no window fits


def test_split_audio_edges() -> None:
    def split(wave_: np.ndarray, clip: float = 1.0, overlap: float = 0.25, window: int = 100) -> list[int]:
        return [len(part) for part in audio.split_audio(wave_, 1000, clip, overlap, window)]

    assert split(np.zeros(0)) == []
    assert split(np.ones(1000)) == [1000]
    assert split(np.ones(2000)) == [750, 750, 500]  # uniform: the first window
    assert split(np.ones(2100), overlap=0.05) == [1000, 1000, 100]  # no window fits: full clips, and progress
    assert split(np.ones(2100), overlap=0) == [1000, 1000, 100]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"audio_data": np.zeros((2, 9))}, "mono"),
        ({"audio_data": np.array([np.nan] * 9)}, "NaN"),
        ({"max_clip_duration_s": 0}, "positive"),
        ({"overlap_duration_s": -1}, "positive"),
        ({"min_energy_window_size": 0}, "positive"),
        ({"overlap_duration_s": 2}, "below max_clip_duration_s"),
    ],
)
def test_split_audio_refusals(options: dict[str, Any], words: str) -> None:
    good = {
        "audio_data": np.zeros(9), "sample_rate": 4, "max_clip_duration_s": 1, "overlap_duration_s": 0.5,
        "min_energy_window_size": 1,
    }  # fmt: skip
    with pytest.raises(RequestError, match=words):
        audio.split_audio(**{**good, **options})
