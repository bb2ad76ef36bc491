"""The bundled ffmpeg, called so that a hostile file can only be decoded: no playlists, no network, no other files."""

import contextlib
import functools
import itertools
import re
import subprocess
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mmjax.multimodal.media_limits import FFMPEG_TIMEOUT_S

# containers that hold their media themselves; playlist-like formats (hls, concat, dash, …) can name other files
DEMUXERS = (
    "mov,matroska,avi,flv,asf,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,nut,gif,apng,"
    "ogg,mp3,aac,flac,wav,w64,aiff,amr,ac3"
)
MOST_PIXELS = 1 << 26  # of a frame, twice those of 8K
LARGEST_ALLOCATION = 1 << 30
UNTIMED = -(2**63)  # time of a packet or frame that has none
DISCARDED = 4  # flag of a packet that is decoded but not shown


class Stream(NamedTuple):
    """A video stream, as its packets tell. `stamps`: time of each frame in the order shown, in units of the container;
    None where the packets do not say. `rate`: frames per second, 0 if unknown."""

    frames: int
    rate: float
    stamps: list[int] | None
    frame_bytes: int


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


def _command(file: Path, arguments: list[str], level: str) -> list[str]:
    guard = ["-protocol_whitelist", "file,pipe", "-format_whitelist", DEMUXERS, "-max_pixels", str(MOST_PIXELS)]
    start = [_binary(), "-hide_banner", "-nostdin", "-v", level, "-max_alloc", str(LARGEST_ALLOCATION)]
    return [*start, *guard, "-copyts", "-max_error_rate", "1", "-i", f"file:{file.resolve()}", *arguments]


def run(file: Path, arguments: list[str], *, level: str = "error") -> tuple[bytes, str]:
    """ffmpeg -i file arguments… -> (stdout, stderr). subprocess.SubprocessError on failure or after the time limit."""
    command = _command(file, arguments, level)
    done = subprocess.run(command, capture_output=True, timeout=FFMPEG_TIMEOUT_S, check=True)
    return done.stdout, done.stderr.decode("utf-8", "replace")


def probe_video(file: Path) -> Stream:
    """The first video stream, without decoding it. subprocess.SubprocessError if there is none."""
    listing, report = run(file, ["-map", "0:v:0", "-c", "copy", "-f", "framecrc", "pipe:1"], level="info")
    unit, pixels = Fraction(0), 0
    packets = []
    for line in listing.decode("ascii", "replace").splitlines():
        name, _, value = line.partition(" 0: ")
        if name == "#tb":
            unit = Fraction(value)
        elif name == "#dimensions":
            width, height = map(int, value.split("x"))
            pixels = width * height
        elif line[:1] == "0":
            fields = line.split(",")
            flags = int(fields[6].partition("=")[2], 16) if len(fields) > 6 and "F=" in fields[6] else 0
            if not flags & DISCARDED:
                packets.append((int(fields[2]), int(fields[3])))
    stream = re.search(r"Stream #.*Video: .*", report)
    about = stream[0] if stream else ""
    told = re.search(r"([\d.]+k?) fps", about) or re.search(r"([\d.]+k?) tbr", about)
    rate = float(told[1].replace("k", "e3")) if told else 0.0
    packets.sort()
    stamps = [stamp for stamp, _ in packets]
    timed = 0 < len(set(stamps)) == len(stamps) and stamps[0] != UNTIMED
    if timed:
        seconds = (packets[-1][0] - packets[0][0] + packets[-1][1]) * unit
        rate = float((len(packets) / seconds).limit_denominator(1001)) if seconds > 0 else rate
    return Stream(len(packets), rate, stamps if timed else None, 3 * pixels)


class Decoding:
    """One run of the decoder over the frames that a `select` expression picks (None: all).

    Iterating gives (time of the frame, uint8 [H, W, 3]), upright. Must be closed; closing before the end stops the
    decoder.
    """

    def __init__(self, file: Path, select: str | None):
        chain = ",".join([*([f"select='{select}'"] if select else []), "showinfo=checksum=0"])
        out = ["-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1"]
        command = _command(file, ["-map", "0:v:0", "-vf", chain, *out], "info")
        self._stamps: list[int] = []
        self._news, self._ended = threading.Condition(), False
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._timer = threading.Timer(FFMPEG_TIMEOUT_S, self._process.kill)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._timer.start()
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            found = re.search(rb"Parsed_showinfo.* n: *\d+ pts: *(-?\d+|NOPTS)", line)
            with self._news:
                if found:
                    self._stamps.append(UNTIMED if found[1] == b"NOPTS" else int(found[1]))
                self._news.notify()
        with self._news:
            self._ended = True
            self._news.notify()

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        pipe = self._process.stdout
        assert pipe is not None
        for count in itertools.count():
            frame = _read_ppm(pipe)
            if frame is None:
                break
            yield self._stamp(count), frame
        self._listener.join()

    def _stamp(self, count: int) -> int:
        """The time of a frame that has arrived; what tells of it may still be on its way."""
        with self._news:
            self._news.wait_for(lambda: len(self._stamps) > count or self._ended)
            return self._stamps[count] if len(self._stamps) > count else UNTIMED

    def __enter__(self) -> "Decoding":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._timer.cancel()
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()


def _read_ppm(pipe: IO[bytes]) -> np.ndarray | None:
    """The next image of a stream of PPM files; None at its end. Every image says its own size."""
    if pipe.readline() != b"P6\n":
        return None
    width, height = map(int, pipe.readline().split())
    pipe.readline()  # the largest value, 255
    data = pipe.read(width * height * 3)
    return np.frombuffer(data, np.uint8).reshape(height, width, 3) if len(data) == width * height * 3 else None


def decodable(file: Path) -> list[int]:
    """Times of the frames that can be decoded, in the order shown."""
    _, report = run(file, ["-map", "0:v:0", "-vf", "showinfo=checksum=0", "-f", "null", "-"], level="info")
    return [int(stamp) for stamp in re.findall(r"Parsed_showinfo.* n: *\d+ pts: *(-?\d+)", report)]


def is_damaged(file: Path) -> bool:
    """Whether the decoder complains about the video. (Apart from `Decoding`, in whose report lines run together.)"""
    try:
        return bool(run(file, ["-map", "0:v:0", "-f", "null", "-"])[1].strip())
    except subprocess.CalledProcessError:
        return True
