"""Sample videos."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmjax.assets.audio import AudioAsset
from mmjax.multimodal import audio, video
from mmjax.types import RequestError

RATE = 12.0
SIZE = (320, 180)
TOTAL = 60
DRAWN = "baby_reading"


@dataclasses.dataclass(frozen=True)
class VideoAsset:
    """A video by name, `baby_reading`, or by the path of a file. num_frames: frames to sample, evenly spaced; -1 for
    all. ValueError for other names."""

    name: str
    num_frames: int = -1

    def __post_init__(self) -> None:
        if self.name != DRAWN and not Path(self.name).is_file():
            raise RequestError(
                f"Unknown video asset {self.name!r}; there is {DRAWN!r}, and files by their paths.", "unknown_name"
            )
        video.FrameSampling(self.num_frames)

    @property
    def _video(self) -> video.Video:
        return _load(self.name, self.num_frames)

    @property
    def np_ndarrays(self) -> np.ndarray:
        """Frames uint8 [T, H, W, 3]."""
        return self._video.frames.copy()

    @property
    def pil_images(self) -> list[Image.Image]:
        """The frames as PIL images."""
        return [Image.fromarray(frame) for frame in self._video.frames]

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of the source; see `mmjax.multimodal.video.Video`."""
        return dict(self._video.metadata)

    def get_audio(self, sampling_rate: float | None = None) -> np.ndarray:
        """The audio track, mono float32, at the given sampling rate or its own."""
        if self.name == DRAWN:
            samples, rate = AudioAsset("mary_had_lamb").audio_and_sample_rate
            samples = samples[: round(TOTAL / RATE * rate)]
        else:
            samples, rate = audio.load(Path(self.name))
        return samples if sampling_rate is None else audio.resample(samples, rate, sampling_rate)


@functools.lru_cache(4)
def _load(name: str, num_frames: int) -> video.Video:
    if name != DRAWN:
        return video.load(Path(name), video.FrameSampling(num_frames))
    indices = video.uniform_indices(TOTAL, RATE, num_frames, -1)
    metadata = {
        "total_num_frames": TOTAL,
        "fps": RATE,
        "duration": TOTAL / RATE,
        "video_backend": "opencv",
        "frames_indices": indices,
        "do_sample_frames": len(indices) == TOTAL,
    }
    return video.Video(np.stack([_frame(index / TOTAL) for index in indices]), metadata)


def _frame(time: float) -> np.ndarray:
    """A round head that nods over an open book, whose page turns."""
    picture = Image.new("RGB", SIZE, (235, 225, 205))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 140, 320, 180), fill=(150, 110, 80))
    nod = 6 * np.sin(4 * np.pi * time)
    draw.ellipse((120, 20 + nod, 200, 100 + nod), fill=(240, 200, 170))
    for x in (142, 172):
        draw.ellipse((x, 60 + nod, x + 8, 68 + nod), fill=(40, 30, 30))
    draw.arc((145, 68 + nod, 177, 90 + nod), 20, 160, fill=(150, 60, 60), width=3)
    draw.polygon([(90, 125), (160, 115), (230, 125), (230, 165), (160, 155), (90, 165)], fill=(250, 250, 245))
    edge = 230 - 140 * (2 * time % 1)
    draw.polygon([(160, 115), (edge, 105), (edge, 145), (160, 155)], fill=(230, 235, 250))
    draw.line((160, 115, 160, 155), fill=(120, 120, 120), width=2)
    return np.asarray(picture)
