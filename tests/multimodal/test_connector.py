"""Media in data and file URLs, and the options and environment variables of a connector."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmjax.multimodal import network, url_sources
from mmjax.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, VideoMediaIO
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.multimodal.network import FetchPolicy
from mmjax.types import RequestError, ValidationError
from web import PIXELS, Site, connector, fetch_error, fetch_pixels, png, to_base64, wav

# --- data URLs


def test_data_urls() -> None:
    for head in ("image/png", "", "image/png;charset=utf-8", "text/plain", "IMAGE/PNG"):
        np.testing.assert_array_equal(fetch_pixels(f"data:{head};base64,{to_base64(png())}"), PIXELS)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64", "comma"),
        ("data:image/png,abc", "Only base64"),
        ("data:,abc", "Only base64"),
        ("data:image/png;base64;x,AAAA", "Only base64"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,AAA", "not valid base64"),
        ("data:image/png;base64,AA A", "not valid base64"),
        ("data:image/png;base64,AA\nAA\r\n", "Failed to load image"),
        ("data:image/png;base64,AA\nA", "not valid base64"),
        ("data:image/png;base64,AA-_", "not valid base64"),
        ("data:image/png;base64,ä", "not valid base64"),
        ("data:image/png;base64,AAAA", "Failed to load image"),
        ("", "HTTP, data or file URL"),
        ("a.png", "HTTP, data or file URL"),
        ("/etc/passwd", "HTTP, data or file URL"),
        ("ftp://host/a.png", "HTTP, data or file URL"),
        ("javascript:alert(1)", "HTTP, data or file URL"),
        ("http://", "HTTP, data or file URL"),
        ("http:///a.png", "HTTP, data or file URL"),
        ("http://[bad/", "malformed"),
        ("http://ho st/", "malformed"),
        ("http://host:99999/", "malformed"),
        ("http://a\x00b/", "malformed"),
        ("http://" + "a" * 70_000, "malformed"),
        (None, "must be a string"),
        (b"data:,", "must be a string"),
        ({"url": "x"}, "must be a string"),
    ],
)
def test_invalid_urls(url: Any, words: str) -> None:
    error = fetch_error(url, FetchPolicy(attempts=1))
    assert words in str(error), error


def test_data_urls_have_a_limit() -> None:
    error = fetch_error(f"data:image/png;base64,{'A' * 4_000_000}", limits=MediaLimits(source_bytes=1_000_000))
    assert error.code == "media_too_large"


# --- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inside" / "deep").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for name in ("inside/a.png", "inside/with blank.png", "inside/deep/a.png", "outside/a.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "inside-not").symlink_to(tmp_path / "outside")
    (tmp_path / "inside/link.png").symlink_to(tmp_path / "outside/a.png")
    (tmp_path / "inside/up").symlink_to(tmp_path / "outside")
    (tmp_path / "inside/own.png").symlink_to("a.png")
    (tmp_path / "inside/circle").symlink_to("circle")
    (tmp_path / "alias").symlink_to("inside")
    os.mkfifo(tmp_path / "inside/pipe")
    return tmp_path


@pytest.mark.parametrize(
    "path", ["a.png", "with blank.png", "with%20blank.png", "deep/a.png", "deep/../a.png", "own.png", "a.png?x#y"]
)
@pytest.mark.parametrize("start", ["file://", "file://localhost", "FILE://", "file:"])
def test_files(folder: Path, path: str, start: str) -> None:
    url = f"{start}{folder}/inside/{path}"
    np.testing.assert_array_equal(
        np.asarray(connector(allowed_local_media_path=str(folder / "inside")).fetch_image(url)), PIXELS
    )


def test_the_allowed_directory_may_be_a_link_or_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for allowed in (str(folder / "alias"), "alias", "inside"):
        made = connector(allowed_local_media_path=allowed)
        for url in (f"file://{folder}/inside/a.png", f"file://{folder}/alias/a.png"):
            assert made.fetch_image(url).size == (9, 6)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/outside/a.png", "forbidden_url"),
        ("/inside/../outside/a.png", "forbidden_url"),
        ("/inside/%2e%2e/outside/a.png", "forbidden_url"),
        ("/inside/..%2foutside/a.png", "forbidden_url"),
        ("/inside-not/a.png", "forbidden_url"),
        ("/inside/link.png", "forbidden_url"),
        ("/inside/up/a.png", "forbidden_url"),
        ("/inside/circle", "bad_path"),
        ("/inside/pipe", "bad_path"),
        ("/inside/deep", "bad_path"),
        ("/inside", "bad_path"),
        ("/inside/none.png", "bad_path"),
        ("/inside/a%00.png", "bad_path"),
        ("/inside/" + "a" * 300, "bad_path"),
    ],
)
def test_files_that_are_refused(folder: Path, path: str, code: str) -> None:
    assert fetch_error(f"file://{folder}{path}", allowed_local_media_path=str(folder / "inside")).code == code


def test_files_are_off_unless_allowed(folder: Path) -> None:
    error = fetch_error(f"file://{folder}/inside/a.png")
    assert isinstance(error, RuntimeError) and "Cannot load local files without" in str(error)
    assert "no other host" in str(fetch_error(f"file://evil.test{folder}/inside/a.png", allowed_local_media_path="/"))
    for wrong, words in ((folder / "none", "does not exist"), (folder / "inside/a.png", "must be a directory")):
        with pytest.raises(RequestError, match=words):
            MediaConnector(allowed_local_media_path=str(wrong))


def test_files_have_a_limit(folder: Path) -> None:
    error = fetch_error(
        f"file://{folder}/inside/a.png", allowed_local_media_path=str(folder), limits=MediaLimits(source_bytes=10)
    )
    assert error.code == "media_too_large"


def test_a_file_that_becomes_a_link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, or a directory above it, is replaced between the check of its path and its opening."""
    really = os.open

    def exchanged(path: Any, *arguments: Any) -> int:
        name = Path(path)
        target = name if name.name == "a.png" else name.parent
        if target.parent.name == "inside":
            os.rename(target, f"{target}.old")
            os.symlink(folder / "outside" / target.name if target is name else folder / "outside", target)
        return really(path, *arguments)

    monkeypatch.setattr(url_sources.os, "open", exchanged)
    allowed = str(folder / "inside")
    assert fetch_error(f"file://{folder}/inside/a.png", allowed_local_media_path=allowed).code == "bad_path"
    (folder / "inside/deep/b.png").write_bytes(png())
    (folder / "outside/b.png").write_bytes(png())
    assert fetch_error(f"file://{folder}/inside/deep/b.png", allowed_local_media_path=allowed).code == "forbidden_url"


# --- options


@pytest.mark.parametrize(
    "options",
    [
        {"image": {"rgba_background_color": [0, 0, 256]}},
        {"image": {"image_mode": "CMYK"}},
        {"image": {"image_mode": ["RGB"]}},
        {"video": {"num_frames": 0}},
        {"video": {"num_frames": "many"}},
        {"video": {"fps": float("nan")}},
        {"video": {"video_backend": "magic"}},
        {"video": {"video_backend": ["opencv"]}},
        {"image": "RGB"},
        {"video": [8]},
    ],
)
def test_options_are_checked_when_the_connector_is_made(options: Any) -> None:
    with pytest.raises(RequestError):
        MediaConnector(media_io_kwargs=options)


def test_unknown_options_have_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    odd = {"image": {"self": 1, "limits": 0}, "smell": {"a": 1}, "video": {"image_io": 3}}
    assert MediaConnector(media_io_kwargs=odd).limits == MediaLimits()
    assert "'self' is unknown" in caplog.text


def test_background_and_mode(site: Site) -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    site.pages["/clear.png"] = png(clear)
    made = connector(media_io_kwargs={"image": {"rgba_background_color": (1, 2, 3)}})
    assert np.asarray(made.fetch_image(site.url("/clear.png")))[0, 0].tolist() == [1, 2, 3]
    assert made.fetch_image(site.url("/clear.png"), image_mode="RGBA").mode == "RGBA"
    assert made.fetch_image(site.url("/clear.png"), image_mode="L").mode == "L"


@pytest.mark.parametrize(
    ("default", "asked", "merged"),
    [
        ({"num_frames": 40, "fps": 2}, {"num_frames": 8}, {"num_frames": 8}),
        ({"num_frames": 40, "fps": 2}, {"fps": 1}, {"fps": 1}),
        ({"num_frames": 40, "fps": 2}, {"fps": 1, "num_frames": 5}, {"fps": 1, "num_frames": 5}),
        ({"num_frames": 40, "fps": 2}, {"frame_recovery": True}, {"num_frames": 40, "fps": 2, "frame_recovery": True}),
        (None, {"fps": 1}, {"fps": 1}),
        ({"fps": 1}, None, {"fps": 1}),
    ],
)
def test_precedence_of_video_options(default: Any, asked: Any, merged: Any) -> None:
    assert VideoMediaIO.merge_kwargs(default, asked) == merged


def jpegs(*arrays: np.ndarray) -> str:
    parts = []
    for array in arrays:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "JPEG")
        parts.append(to_base64(buffer.getvalue()))
    return ",".join(parts)


def test_a_video_of_jpegs() -> None:
    frames = [np.full((8, 8, 3), shade, np.uint8) for shade in (0, 100, 200)]
    url = f"data:video/jpeg;base64,{jpegs(*frames)}"
    made, metadata = connector().fetch_video(url)
    np.testing.assert_allclose(made.astype(int), np.stack(frames), atol=3)
    assert metadata == {
        "total_num_frames": 3, "fps": 1.0, "duration": 3.0, "video_backend": "jpeg_sequence",
        "frames_indices": [0, 1, 2], "do_sample_frames": False,
    }  # fmt: skip
    two, metadata = connector(media_io_kwargs={"video": {"num_frames": 2, "fps": 4}}).fetch_video(url)
    assert len(two) == 2 and metadata["duration"] == 0.5
    assert len(connector(media_io_kwargs={"video": {"num_frames": -1}}).fetch_video(url)[0]) == 3
    with pytest.raises(RequestError, match="over the limit of 2"):
        connector(limits=MediaLimits(video_frames=2)).fetch_video(url)
    for wrong in (jpegs(frames[0], frames[1][:4]), to_base64(wav()), jpegs(frames[0]) + ",", "%"):
        with pytest.raises(RequestError):
            connector().fetch_video(f"data:video/jpeg;base64,{wrong}")


# --- the environment


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_VIDEO_FETCH_TIMEOUT", "60")
    monkeypatch.setenv("MMJAX_AUDIO_FETCH_TIMEOUT", "7.5")
    monkeypatch.setenv("VLLM_AUDIO_FETCH_TIMEOUT", "99")
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "5")
    monkeypatch.setenv("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", "2")
    monkeypatch.setenv("VLLM_VIDEO_LOADER_BACKEND", "opencv_dynamic")
    made = MediaConnector()
    assert made.timeouts == {"image": 5, "video": 60, "audio": 7.5}
    assert made.policy == FetchPolicy(attempts=5, max_bytes=2 << 20)
    assert made.video_io.sampling.video_backend == "opencv_dynamic"


@pytest.mark.parametrize(
    "name", ["IMAGE_FETCH_TIMEOUT", "MEDIA_FETCH_MAX_RETRIES", "MAX_IMAGE_PIXELS", "MEDIA_URL_ALLOW_REDIRECTS"]
)
@pytest.mark.parametrize("value", ["soon", "-1", "inf", ""])
def test_variables_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"MMJAX_{name}", value)
    with pytest.raises(ValidationError, match=f"MMJAX_{name}"):
        MediaConnector()


def test_other_connectors(monkeypatch: pytest.MonkeyPatch) -> None:
    @MEDIA_CONNECTOR_REGISTRY.register("mine")
    class Mine(MediaConnector):
        pass

    assert type(MEDIA_CONNECTOR_REGISTRY.load()) is MediaConnector
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "mine")
    assert type(MEDIA_CONNECTOR_REGISTRY.load(allowed_media_domains=["a.test"])) is Mine
    with pytest.raises(RequestError, match="Extension class other not found"):
        MEDIA_CONNECTOR_REGISTRY.load("other")


def test_after_a_fork(site: Site) -> None:
    """A child process has none of its parent's threads, and must not wait for them."""
    assert fetch_pixels(site.url("/a.png")).shape == (6, 9, 3)
    assert network._background.loop is not None
    network._background.__init__()  # type: ignore[misc]  # what the child does first
    assert network._background.loop is None
    assert fetch_pixels(site.url("/a.png")).shape == (6, 9, 3)
