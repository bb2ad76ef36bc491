"""The bundled ffmpeg, called so that a hostile file can only be decoded: no playlists, no network, no other files."""

import contextlib
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from mmjax.multimodal.limits import FFMPEG_TIMEOUT_S

# containers that hold their media themselves; playlist-like formats (hls, concat, dash, …) can name other files
DEMUXERS = (
    "mov,matroska,avi,flv,asf,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,nut,gif,apng,"
    "ogg,mp3,aac,flac,wav,w64,aiff,amr,ac3"
)


@functools.cache
def _binary() -> str:
    import imageio_ffmpeg

    binary: str = imageio_ffmpeg.get_ffmpeg_exe()
    return binary


@contextlib.contextmanager
def as_file(source: bytes | Path, folder: Path) -> Iterator[Path]:
    """A path to the media: mp4 may keep its index at the end, so a pipe will not do."""
    if isinstance(source, bytes):
        file = folder / "media"
        file.write_bytes(source)
        yield file
        file.unlink()
    else:
        yield source


def run(file: Path, arguments: list[str], *, loud: bool = False) -> tuple[bytes, str]:
    """ffmpeg -i file arguments… -> (stdout, stderr). `loud` keeps the report on streams and progress in stderr.

    subprocess.SubprocessError on failure or after the time limit.
    """
    guard = ["-protocol_whitelist", "file", "-format_whitelist", DEMUXERS]
    level = "info" if loud else "error"
    command = [_binary(), "-hide_banner", "-nostdin", "-v", level, *guard, "-i", f"file:{file.resolve()}"]
    done = subprocess.run([*command, *arguments], capture_output=True, timeout=FFMPEG_TIMEOUT_S, check=True)
    return done.stdout, done.stderr.decode("utf-8", "replace")


def probe_video(file: Path) -> tuple[int, float, int]:
    """(frames, frames per second or 0, bytes of one RGB frame) of the first video stream, without decoding."""
    _, report = run(file, ["-map", "0:v:0", "-c", "copy", "-f", "null", "-"], loud=True)
    counts = re.findall(r"frame=\s*(\d+)", report)
    stream = re.search(r"Stream #.*Video: .*", report)
    about = stream[0] if stream else ""
    size = re.search(r", (\d+)x(\d+)\b", about)
    rate = re.search(r"([\d.]+k?) fps", about) or re.search(r"([\d.]+k?) tbr", about)
    return (
        int(counts[-1]) if counts else 0,
        float(rate[1].replace("k", "e3")) if rate else 0.0,
        3 * int(size[1]) * int(size[2]) if size else 0,
    )
