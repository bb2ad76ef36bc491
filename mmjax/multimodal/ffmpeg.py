"""Calls the bundled ffmpeg, restricted for hostile files: no playlists, no network, no other files."""

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

# containers that hold their media; playlist-like formats (hls, concat, dash, …) can refer to other files
DEMUXERS = (
    "mov,matroska,avi,flv,asf,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,nut,gif,apng,"
    "ogg,mp3,aac,flac,wav,w64,aiff,amr,ac3"
)
MAX_PIXELS = 1 << 26  # of a frame, twice as many as 8K has
MAX_ALLOCATION = 1 << 30
NO_TIMESTAMP = -(2**63)  # of a packet or frame without one
DISCARDED = 4  # flag of a packet that is decoded but not shown


class VideoStream(NamedTuple):
    """A video stream, described by its packets. timestamps: of each frame in display order, in units of the container;
    None where the packets have none. rate: frames per second, 0 if unknown."""

    frames: int
    rate: float
    timestamps: list[int] | None
    frame_bytes: int


@functools.cache
def _binary() -> str:
    import imageio_ffmpeg

    binary: str = imageio_ffmpeg.get_ffmpeg_exe()
    return binary


@contextlib.contextmanager
def as_file(source: bytes | Path, folder: Path) -> Iterator[Path]:
    """A path to the media. A pipe does not work, because mp4 may have its index at the end."""
    if isinstance(source, bytes):
        file = folder / "media"
        file.write_bytes(source)
        yield file
        file.unlink()
    else:
        yield source


def _command(file: Path, arguments: list[str], level: str) -> list[str]:
    limits = ["-protocol_whitelist", "file,pipe", "-format_whitelist", DEMUXERS, "-max_pixels", str(MAX_PIXELS)]
    start = [_binary(), "-hide_banner", "-nostdin", "-v", level, "-max_alloc", str(MAX_ALLOCATION)]
    return [*start, *limits, "-copyts", "-max_error_rate", "1", "-i", f"file:{file.resolve()}", *arguments]


def run(file: Path, arguments: list[str], *, level: str = "error") -> tuple[bytes, str]:
    """Run `ffmpeg -i file arguments…`: (stdout, stderr). subprocess.SubprocessError if it fails or takes too long."""
    command = _command(file, arguments, level)
    result = subprocess.run(command, capture_output=True, timeout=FFMPEG_TIMEOUT_S, check=True)
    return result.stdout, result.stderr.decode("utf-8", "replace")


def probe_video(file: Path) -> VideoStream:
    """The first video stream, without decoding it. subprocess.SubprocessError if there is none."""
    listing, log = run(file, ["-map", "0:v:0", "-c", "copy", "-f", "framecrc", "pipe:1"], level="info")
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
    stream = re.search(r"Stream #.*Video: .*", log)
    description = stream[0] if stream else ""
    declared = re.search(r"([\d.]+k?) fps", description) or re.search(r"([\d.]+k?) tbr", description)
    rate = float(declared[1].replace("k", "e3")) if declared else 0.0
    packets.sort()
    timestamps = [timestamp for timestamp, _ in packets]
    timed = 0 < len(set(timestamps)) == len(timestamps) and timestamps[0] != NO_TIMESTAMP
    if timed:
        seconds = (packets[-1][0] - packets[0][0] + packets[-1][1]) * unit
        rate = float((len(packets) / seconds).limit_denominator(1001)) if seconds > 0 else rate
    return VideoStream(len(packets), rate, timestamps if timed else None, 3 * pixels)


def select_expression(name: str, keys: list[int]) -> str:
    """An expression of the `select` filter: is the variable one of these keys, which ascend? A binary search, since
    ffmpeg refuses expressions that are 100 deep, as a sum of 100 comparisons is, and evaluates one for every frame."""
    if len(keys) <= 16:
        return "+".join(f"eq({name},{key})" for key in keys)
    middle = len(keys) // 2
    below, above = select_expression(name, keys[:middle]), select_expression(name, keys[middle:])
    return f"if(lt({name},{keys[middle]}),{below},{above})"


class FrameDecoder:
    """A decoder process over the frames that a `select` expression chooses (None: all).

    Iterating yields (timestamp of the frame, uint8 [H, W, 3]), upright; subprocess.TimeoutExpired if it takes too long.
    A context manager: leaving it before the end stops the process.
    """

    def __init__(self, file: Path, select: str | None):
        chain = ",".join([*([f"select='{select}'"] if select else []), "showinfo=checksum=0"])
        out = ["-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1"]
        command = _command(file, ["-map", "0:v:0", "-vf", chain, *out], "info")
        self._timestamps: list[int] = []
        self._changed, self._ended = threading.Condition(), False
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._timed_out = False
        self._timer = threading.Timer(FFMPEG_TIMEOUT_S, self._stop_late)
        self._log_reader = threading.Thread(target=self._read_log, daemon=True)
        self._timer.start()
        self._log_reader.start()

    def _stop_late(self) -> None:
        self._timed_out = True
        self._process.kill()

    def _read_log(self) -> None:
        """Read the timestamps of frames from the log of the `showinfo` filter."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            match = re.search(rb"Parsed_showinfo.* n: *\d+ pts: *(-?\d+|NOPTS)", line)
            with self._changed:
                if match:
                    self._timestamps.append(NO_TIMESTAMP if match[1] == b"NOPTS" else int(match[1]))
                self._changed.notify()
        with self._changed:
            self._ended = True
            self._changed.notify()

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        pipe = self._process.stdout
        assert pipe is not None
        for count in itertools.count():
            frame = _read_ppm(pipe)
            if frame is None:
                break
            yield self._timestamp(count), frame
        self._log_reader.join()
        if self._timed_out:
            raise subprocess.TimeoutExpired(self._process.args, FFMPEG_TIMEOUT_S)

    def _timestamp(self, count: int) -> int:
        """The timestamp of a frame that has arrived; its log line may not have arrived yet."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._timestamps) > count or self._ended)
            return self._timestamps[count] if len(self._timestamps) > count else NO_TIMESTAMP

    def __enter__(self) -> "FrameDecoder":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._timer.cancel()
        self._process.wait()
        self._log_reader.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()


def _read_ppm(pipe: IO[bytes]) -> np.ndarray | None:
    """The next image of a stream of PPM files, each of which states its size; None at the end."""
    if pipe.readline() != b"P6\n":
        return None
    width, height = map(int, pipe.readline().split())
    pipe.readline()  # the largest value, 255
    data = pipe.read(width * height * 3)
    return np.frombuffer(data, np.uint8).reshape(height, width, 3) if len(data) == width * height * 3 else None


def decodable_timestamps(file: Path) -> list[int]:
    """The timestamps of the frames that can be decoded, in display order."""
    _, log = run(file, ["-map", "0:v:0", "-vf", "showinfo=checksum=0", "-f", "null", "-"], level="info")
    return [int(timestamp) for timestamp in re.findall(r"Parsed_showinfo.* n: *\d+ pts: *(-?\d+)", log)]


def is_damaged(file: Path) -> bool:
    """Whether the decoder reports errors in the video. This is a run of its own, because `FrameDecoder` cannot tell
    errors apart in its log."""
    try:
        return bool(run(file, ["-map", "0:v:0", "-f", "null", "-"])[1].strip())
    except subprocess.CalledProcessError:
        return True
