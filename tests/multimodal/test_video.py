"""Videos: forms of frames, sampling rules, and files written here by the bundled ffmpeg."""

import json
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from mmjax.multimodal import video
from mmjax.multimodal.limits import Limits
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


def test_metadata_travels() -> None:
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


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 frames, 10 per second, 64x48; frame i is grey of about 8 * i."""
    file = tmp_path_factory.mktemp("video") / "clip with blank.mp4"
    grey = b"".join(bytes([8 * i]) * (64 * 48) for i in range(26))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "gray", "-s", "64x48"]
    command += ["-r", "10", "-i", "-", "-c:v", "libx264", "-crf", "1", "-pix_fmt", "yuv420p", str(file)]
    subprocess.run(command, input=grey, check=True)
    return file


def shades(decoded: video.Video) -> list[int]:
    return [round(float(frame.mean()) / 8) for frame in decoded.frames]


@pytest.mark.parametrize("as_bytes", [True, False])
def test_file_uniform(clip: Path, as_bytes: bool) -> None:
    decoded = video.load(clip.read_bytes() if as_bytes else clip, num_frames=8)
    assert decoded.frames.shape == (8, 48, 64, 3)
    assert decoded.metadata == {
        "total_num_frames": 26, "fps": 10.0, "duration": 2.6, "video_backend": "opencv",
        "frames_indices": [0, 3, 7, 10, 14, 17, 21, 25], "do_sample_frames": False,
    }  # fmt: skip
    assert shades(decoded) == decoded.metadata["frames_indices"]


def test_file_whole_and_dynamic(clip: Path) -> None:
    whole = video.load(clip, num_frames=-1)
    assert shades(whole) == list(range(26)) and whole.metadata["do_sample_frames"] is True
    timed = video.load(clip, video_backend="opencv_dynamic", fps=4)
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
        ({"limits": Limits(video_bytes=10_000)}, "Lower num_frames or fps"),
    ],
)
def test_sampling_options_are_checked(clip: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        video.load(clip, **options)
    assert words in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"no video", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n"])
def test_files_that_are_no_video(data: bytes) -> None:
    with pytest.raises(RequestError, match="Could not open video stream"):
        video.load(data)


def test_sound_alone_is_no_video(shared: Path) -> None:
    with pytest.raises(RequestError, match="Could not open video stream"):
        video.load(shared / "media/audio/aac.m4a")


def test_real_file(shared: Path) -> None:
    decoded = video.load(shared / "media/video/bunny_2s_320.mp4", num_frames=4)
    assert decoded.frames.shape == (4, 180, 320, 3) and decoded.metadata["frames_indices"] == [0, 16, 32, 49]
