"""Videos: forms of frames, sampling rules, and files written here by the bundled ffmpeg."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from mmjax.multimodal import ffmpeg, video
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.multimodal.video import FrameSampling
from mmjax.types import RequestError

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), np.uint8)


@pytest.mark.parametrize(
    "media",
    [
        FRAMES,
        FRAMES.transpose(0, 3, 1, 2),
        FRAMES.astype(np.float32),
        list(FRAMES),
        [frame.transpose(2, 0, 1) for frame in FRAMES],
        [Image.fromarray(frame) for frame in FRAMES],
        [Image.fromarray(FRAMES[0]), *FRAMES[1:]],
        (FRAMES, {}),
        ([Image.fromarray(frame) for frame in FRAMES], {}),
    ],
)
def test_forms_of_frames(media: Any) -> None:
    decoded = video.decode(media)
    assert decoded.frames.dtype == np.uint8 and decoded.metadata == {}
    np.testing.assert_array_equal(decoded.frames, FRAMES)


def test_metadata_are_returned() -> None:
    metadata = {"fps": 2.0, "frames_indices": [0, 1, 2], "do_sample_frames": False}
    assert video.decode((FRAMES, metadata)).metadata == metadata


@pytest.mark.parametrize(
    ("media", "words"),
    [
        ([], "empty list"),
        (np.zeros((0, 4, 4, 3), np.uint8), "empty"),
        (np.zeros((4, 4, 3), np.uint8), "frames, height, width"),
        (np.zeros((2, 5, 5, 5), np.uint8), "1, 3 or 4 channels"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], "same size"),
        ([np.zeros((4, 4, 3)), np.zeros((4, 5, 3))], "same size"),
        ((FRAMES, 2.0), "metadata must be a dictionary"),
        ("clip.mp4", "must be an array"),
        (["a.png", "b.png"], "Open files first"),
    ],
)
def test_refusals(media: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        video.decode(media)
    assert words in str(caught.value)


def test_sampling_reference(shared: Path) -> None:
    cases = json.loads((shared / "reference/frame_sampling.json").read_text())
    for case in cases["opencv"]:
        assert video.uniform_indices(case["total"], case["src_fps"], case["num_frames"], case["fps"]) == case["indices"]
    for case in cases["opencv_dynamic"]:
        found = video.timed_indices(case["total"], case["src_fps"], case["fps"], case["max_duration"])
        assert found == case["indices"]


def test_sampling_edges() -> None:
    assert video.uniform_indices(26, 30, 8, -1) == [0, 3, 7, 10, 14, 17, 21, 25]
    assert video.uniform_indices(5, 0, -1, -1) == [0, 1, 2, 3, 4]
    assert video.uniform_indices(5, 0, 32, 2) == [0]  # no rate, no duration
    assert video.timed_indices(1, 30, 2, 300) == [0]
    for fps in (1e9, 1e308, sys.float_info.max):  # no list is made of as many
        assert video.timed_indices(90, 30, fps, 300) == video.timed_indices(90, 30, fps, 2) == list(range(90))
        assert video.uniform_indices(90, 30, -1, fps) == list(range(90))
    assert video.timed_indices(90, 30, 31, 300) == video.timed_indices(90, 30, 30, 300) == list(range(90))
    for wrong in ({"fps": 10**400}, {"max_duration": 10**400}, {"fps": math.inf}):
        with pytest.raises(RequestError, match="must be a finite number"):
            FrameSampling(**wrong)


def write(file: Path, options: list[str], rate: str = "10") -> Path:
    """26 frames of 64x48; frame i is grey of about 8 * i."""
    grey = b"".join(bytes([8 * i]) * (64 * 48) for i in range(26))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "gray", "-s", "64x48"]
    subprocess.run([*command, "-r", rate, "-i", "-", *options, str(file)], input=grey, check=True)
    return file


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clip at 10 frames per second."""
    file = tmp_path_factory.mktemp("video") / "clip with blank.mp4"
    return write(file, ["-c:v", "libx264", "-crf", "1", "-pix_fmt", "yuv420p"])


def shades(decoded: video.Video) -> list[int]:
    return [round(float(frame.mean()) / 8) for frame in decoded.frames]


@pytest.mark.parametrize("as_bytes", [True, False])
def test_file_uniform(clip: Path, as_bytes: bool) -> None:
    decoded = video.load(clip.read_bytes() if as_bytes else clip, FrameSampling(num_frames=8))
    assert decoded.frames.shape == (8, 48, 64, 3)
    assert decoded.metadata == {
        "total_num_frames": 26, "fps": 10.0, "duration": 2.6, "video_backend": "opencv",
        "frames_indices": [0, 3, 7, 10, 14, 17, 21, 25], "do_sample_frames": False,
    }  # fmt: skip
    assert shades(decoded) == decoded.metadata["frames_indices"]


def test_file_whole_and_dynamic(clip: Path) -> None:
    whole = video.load(clip, FrameSampling(num_frames=-1))
    assert shades(whole) == list(range(26)) and whole.metadata["do_sample_frames"] is True
    timed = video.load(clip, FrameSampling(video_backend="opencv_dynamic", fps=4))
    assert shades(timed) == timed.metadata["frames_indices"] == [0, 3, 5, 8, 10, 13, 15, 18, 20, 23]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_frames": 0}, "num_frames must be greater than 0 or -1"),
        ({"num_frames": -2}, "num_frames must be greater than 0 or -1"),
        ({"num_frames": 2.5}, "num_frames must be greater than 0 or -1"),
        ({"num_frames": "8"}, "num_frames must be greater than 0 or -1"),
        ({"fps": "fast"}, "fps must be a finite number"),
        ({"fps": float("inf")}, "fps must be a finite number"),
        ({"video_backend": "opencv_dynamic", "fps": 0}, "above 0"),
        ({"video_backend": "opencv_dynamic", "max_duration": 0}, "above 0"),
        ({"video_backend": "magic"}, "Extension class magic not found"),
        ({"frame_recovery": "yes"}, "true or false"),
    ],
)
def test_sampling_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        FrameSampling(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize("limits", [MediaLimits(video_bytes=10_000), MediaLimits(video_frames=5)])
def test_limits(clip: Path, limits: MediaLimits) -> None:
    with pytest.raises(RequestError, match="Lower num_frames or fps") as caught:
        video.load(clip, limits=limits)
    assert caught.value.code == "media_too_large"


@pytest.mark.parametrize("chars", [10, 40])
def test_more_frames_than_fit_a_filter(clip: Path, monkeypatch: pytest.MonkeyPatch, chars: int) -> None:
    monkeypatch.setattr(video, "MAX_FILTER_CHARS", chars)
    assert shades(video.load(clip, FrameSampling(num_frames=4))) == [0, 8, 16, 25]


@pytest.mark.parametrize(
    ("container", "samplings"),
    [
        ("mp4", [{"num_frames": 101}, {"num_frames": 768}, {"video_backend": "opencv_dynamic", "fps": 4}]),
        ("h264", [{"num_frames": 101}]),  # without timestamps
    ],
)
def test_more_frames_than_a_sum_may_have_terms(tmp_path: Path, container: str, samplings: list[dict[str, Any]]) -> None:
    """ffmpeg refuses expressions that are 100 deep."""
    file = tmp_path / f"long.{container}"
    source = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=25:duration=32", "-c:v", "libx264", "-preset", "ultrafast"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, str(file)], check=True)
    whole = video.load(file, FrameSampling(num_frames=5000))
    assert whole.metadata["total_num_frames"] == len(whole.frames) == 800 and whole.metadata["fps"] == 25
    for options in samplings:
        sampling = FrameSampling(**options)
        some = video.load(file, sampling)
        indices = some.metadata["frames_indices"]
        assert indices == sampling.indices(800, 25) and len(indices) > 100
        np.testing.assert_array_equal(some.frames, whole.frames[indices])


def test_decoding_that_takes_too_long(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffmpeg, "FFMPEG_TIMEOUT_S", 0.0)
    monkeypatch.setattr(ffmpeg, "probe_video", lambda file: ffmpeg.VideoStream(26, 10.0, None, 64 * 48 * 3))
    with pytest.raises(RequestError, match=r"takes more than 0 seconds. Send a shorter one") as caught:
        video.load(clip)
    assert caught.value.code == "media_too_large"


@pytest.fixture(scope="module")
def make_damaged(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_damaged(17, 25)`: the clip as one JPEG per frame, with these frames overwritten by zeros."""
    folder = tmp_path_factory.mktemp("damaged")
    whole = write(folder / "whole.mov", ["-c:v", "mjpeg", "-q:v", "1", "-pix_fmt", "yuvj420p"]).read_bytes()
    starts = [match.start() for match in re.finditer(b"\xff\xd8\xff", whole)]
    assert len(starts) == 26
    ends = [*starts[1:], whole.index(b"moov") - 4]

    def make(*broken: int) -> Path:
        data = bytearray(whole)
        for index in broken:
            data[starts[index] : ends[index]] = bytes(ends[index] - starts[index])
        file = folder / f"{'-'.join(map(str, broken))}.mov"
        file.write_bytes(data)
        return file

    return make


@pytest.mark.parametrize(
    ("broken", "without", "recovered"),
    [
        ([17], [0, 3, 7, 10, 14, 21, 25], [0, 3, 7, 10, 14, 18, 21, 25]),
        ([3, 10, 17], [0, 7, 14, 21, 25], [0, 4, 7, 11, 14, 18, 21, 25]),
        ([25], [0, 3, 7, 10, 14, 17, 21], [0, 3, 7, 10, 14, 17, 21, 24]),  # the last: nothing follows
        ([22, 23, 24, 25], [0, 3, 7, 10, 14, 17, 21], [0, 3, 7, 10, 14, 17, 21]),
        ([14, 15, 16, 17], [0, 3, 7, 10, 21, 25], [0, 3, 7, 10, 18, 21, 25]),  # nothing before the next target
        ([4, 5], [0, 3, 7, 10, 14, 17, 21, 25], [0, 3, 7, 10, 14, 17, 21, 25]),
        ([*range(19, 26)], [0, 3, 7, 10, 14, 17], [0, 3, 7, 10, 14, 17, 18]),
    ],
)
def test_frame_recovery(
    make_damaged: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    broken: list[int],
    without: list[int],
    recovered: list[int],
) -> None:
    file = make_damaged(*broken)
    plain, mended = (video.load(file, FrameSampling(num_frames=8, frame_recovery=mend)) for mend in (False, True))
    assert plain.metadata["frames_indices"] == shades(plain) == without
    assert mended.metadata["frames_indices"] == shades(mended) == recovered
    assert mended.metadata["total_num_frames"] == 26 and mended.metadata["do_sample_frames"] is False
    assert ("could not be decoded" in caplog.text) == (len(without) < 8)


def test_nothing_to_recover(make_damaged: Callable[..., Path]) -> None:
    with pytest.raises(RequestError, match="Could not open video stream"):
        video.load(make_damaged(*range(26)), FrameSampling(frame_recovery=True))


def test_choice_of_replacements() -> None:
    choose = video.replacements
    assert choose([0, 5, 9], [0, 5, 9], []) == []
    assert choose([0, 5, 9], [0, 5], [2, 3, 6, 9]) == [2, 6]
    assert choose([0, 5, 9], [5, 9], [0, 1, 2]) == [2]  # once
    assert choose([0, 5, 9], [0, 5, 9], [9]) == []


@pytest.mark.parametrize("kind", ["mkv", "avi", "mp4", "ts", "webm"])
def test_containers(kind: str, tmp_path: Path) -> None:
    codec = {"avi": "mpeg4", "webm": "libvpx"}.get(kind, "libx264")
    quality = ["-q:v", "1"] if kind == "avi" else ["-b:v", "2M"]
    file = write(tmp_path / f"clip.{kind}", ["-c:v", codec, *quality, "-pix_fmt", "yuv420p"])
    decoded = video.load(file, FrameSampling(num_frames=8))
    assert decoded.metadata["frames_indices"] == [0, 3, 7, 10, 14, 17, 21, 25]
    assert np.abs(np.subtract(shades(decoded), decoded.metadata["frames_indices"])).max() <= 1
    assert decoded.metadata["fps"] == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation(clip: Path, tmp_path: Path, turn: int) -> None:
    file = tmp_path / "turned.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", str(turn), "-i", str(clip)]
    subprocess.run([*command, "-c", "copy", str(file)], check=True)
    decoded = video.load(file, FrameSampling(num_frames=2))
    assert decoded.frames.shape == ((2, 48, 64, 3) if turn == 180 else (2, 64, 48, 3))


def test_rate_is_exact(tmp_path: Path) -> None:
    file = write(tmp_path / "clip.mp4", ["-c:v", "libx264", "-pix_fmt", "yuv420p"], rate="30000/1001")
    assert video.load(file, FrameSampling(num_frames=1)).metadata["fps"] == 30000 / 1001


def test_truncated_stream(tmp_path: Path, clip: Path) -> None:
    file = write(tmp_path / "clip.mkv", ["-c:v", "libx264", "-crf", "1", "-pix_fmt", "yuv420p", "-bf", "0"])
    data = file.read_bytes()
    decoded = video.load(data[: len(data) * 2 // 3], FrameSampling(num_frames=8, frame_recovery=True))
    indices = decoded.metadata["frames_indices"]
    assert len(indices) > 1 and shades(decoded) == indices == sorted(set(indices))


@pytest.mark.parametrize("data", [b"", b"no video", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n"])
def test_files_that_are_not_videos(data: bytes) -> None:
    with pytest.raises(RequestError, match="Could not open video stream"):
        video.load(data)


def test_audio_alone_is_not_a_video(shared: Path) -> None:
    with pytest.raises(RequestError, match="Could not open video stream"):
        video.load(shared / "media/audio/aac.m4a")


def test_real_file(shared: Path) -> None:
    decoded = video.load(shared / "media/video/bunny_2s_320.mp4", FrameSampling(num_frames=4))
    assert decoded.frames.shape == (4, 180, 320, 3) and decoded.metadata["frames_indices"] == [0, 16, 32, 49]
