"""Hostile media: files, arrays and URLs, each with the words that the refusal must contain.

A case is a name, a modality, what is sent (a URL for the chat, or a value of `multi_modal_data`; made when it is
needed, by a function of the web site and a folder), and words of the answer.
"""

import base64
import io
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import imageio_ffmpeg
import numpy as np
import soundfile
from PIL import Image

from web import Site, png

CLIP = np.zeros((2, 28, 28, 3), np.uint8)


class Case(NamedTuple):
    name: str
    kind: str
    make: Callable[[Site, Path], Any]
    words: str


class Url(str):
    """To be fetched; other strings are sent as they are."""


def url(value: Any) -> Callable[[Site, Path], Any]:
    """A URL, sent unchanged; functions are called for it."""
    return lambda *_: Url(value() if callable(value) else value)


def served(answer: Any, path: str = "/x") -> Callable[[Site, Path], Url]:
    """A page with this response, and its URL."""

    def make(site: Site, _: Path) -> Url:
        site.pages[path] = answer
        return Url(site.url(path))

    return make


def inline(data: bytes | Callable[[], bytes], kind: str = "image/png") -> Callable[[Site, Path], Url]:
    """A file in a data URL."""

    def make(*_: Any) -> Url:
        content = data if isinstance(data, bytes) else data()
        return Url(f"data:{kind};base64,{base64.b64encode(content).decode()}")

    return make


def given(value: Any) -> Callable[[Site, Path], Any]:
    """A value of `multi_modal_data`; functions are called for it."""
    return lambda *_: value() if callable(value) else value


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(kind: str) -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), kind)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_file(width: int, height: int, content: bytes, *more: bytes) -> bytes:
    """An 8-bit RGB PNG with this header, and any data."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def sound(samples: np.ndarray, kind: str = "WAV", rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    return buffer.getvalue()


def wav_head(rate: int = 16_000, channels: int = 1, bits: int = 16, claimed: int = 2**32 - 100) -> bytes:
    """A WAV file that claims these things and has 100 samples."""
    step = channels * bits // 8
    head = struct.pack("<HHIIHH", 1, channels, rate, (rate * step) & 0xFFFFFFFF, step & 0xFFFF, bits)
    return (
        b"RIFF"
        + b"\xff" * 4
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + head
        + b"data"
        + struct.pack("<I", claimed)
        + bytes(200)
    )


def clip(*options: str, count: int = 6, source: str = "testsrc=s=64x48:r=10", kind: str = "mp4") -> bytes:
    """A video written by ffmpeg."""
    out = ["-frames:v", str(count), *options, "-f", kind]
    out += ["-movflags", "frag_keyframe+empty_moov"] if kind == "mp4" else []
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", source, *out, "pipe:1"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def with_claimed_size(data: bytes, width: int, height: int) -> bytes:
    """An AVI whose headers give a wrong frame size."""
    at = data.index(b"strf") + 8 + 4
    data = data[:at] + struct.pack("<ii", width, height) + data[at + 8 :]
    at = data.index(b"avih") + 8 + 32
    return data[:at] + struct.pack("<ii", width, height) + data[at + 8 :]


def link(target: str) -> Callable[[Site, Path], Url]:
    """A link in the allowed folder to another place."""

    def make(_: Site, folder: Path) -> Url:
        path = folder / "link"
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        return Url(f"file://{path}")

    return make


def local(path: str, content: bytes | None = None) -> Callable[[Site, Path], Url]:
    """A path in the allowed folder, with a file if there is content."""

    def make(_: Site, folder: Path) -> Url:
        if content is not None:
            (folder / path).write_bytes(content)
        return Url(f"file://{folder}/{path}")

    return make


class Shaped:
    """Claims to be an array, but is not."""

    def __init__(self, shape: tuple[int, ...], result: Any):
        self.shape, self.dtype, self.ndim, self.result = shape, np.dtype("u1"), len(shape), result

    def __array__(self, *_: Any, **__: Any) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def closed() -> Image.Image:
    picture = Image.open(io.BytesIO(png()))
    picture.close()
    return picture


def zeroed(data: bytes) -> bytes:
    """A file of JPEG frames whose frames contain only zeros."""
    start, end = data.index(b"\xff\xd8\xff"), data.rindex(b"\xff\xd9")
    return data[:start] + bytes(end - start) + data[end:]
