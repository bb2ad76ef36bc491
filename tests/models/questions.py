"""What the tiny checkpoints are asked, by family: everything made from seeds, so that it is the same everywhere."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from small import picture, text

IMAGE, VIDEO = ("<|vision_start|><|" + kind + "_pad|><|vision_end|>" for kind in ("image", "video"))
TASK = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
RATE = 16000

Question = dict[str, Any]


def clip(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """A random picture that drifts: u8[frames, height, width, 3]."""
    still = picture(seed, height, width)
    return np.stack([np.roll(still, 5 * frame, axis=1) for frame in range(frames)])


def sound(seed: int, seconds: float) -> np.ndarray:
    """Three tones that come and go, over noise: f32[n] at 16 kHz."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    tones = [np.sin(2 * np.pi * (hz * t + rng.random())) * np.sin(np.pi * t * rng.random()) for hz in (220, 770, 2400)]
    return (0.2 * np.sum(tones, axis=0) + 0.02 * rng.standard_normal(len(t))).astype(np.float32)


def qwen2_vl(words: str, **media: list[np.ndarray]) -> Question:
    return {"prompt": text(words), "multi_modal_data": media}


def llava(words: str, *images: np.ndarray) -> Question:
    prompt = f"USER: {'<image>' * len(images)}\n{words} ASSISTANT:"
    return {"prompt": prompt, "multi_modal_data": {"image": list(images)} if images else {}}


def whisper(prompt: str | list[int], seed: int, seconds: float) -> Question:
    key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
    return {key: prompt, "multi_modal_data": {"audio": sound(seed, seconds)}}


QUESTIONS: Mapping[str, Mapping[str, Callable[[], Question]]] = {
    "qwen2_vl": {
        "text": lambda: qwen2_vl("Where is the station?"),
        "image": lambda: qwen2_vl(IMAGE + "What is this?", image=[picture(1)]),
        "two_images": lambda: qwen2_vl(f"{IMAGE}One. {IMAGE}Two.", image=[picture(2, 97, 141), picture(3, 30, 45)]),
        "video": lambda: qwen2_vl(VIDEO + "Who wins?", video=[clip(4, 5, 56, 84)]),
        "long_video": lambda: qwen2_vl(VIDEO + "Who is it?", video=[clip(8, 16, 56, 84)]),
        "image_and_video": lambda: qwen2_vl(
            f"{VIDEO}Is {IMAGE} in it?", image=[picture(6, 84, 28)], video=[clip(7, 4, 60, 30)]
        ),
    },
    "llava": {
        "text": lambda: llava("Where is the station?"),
        "image": lambda: llava("What is this?", picture(1, 100, 60)),
        "two_images": lambda: llava("Which is older?", picture(2, 45, 133), picture(3, 56, 56)),
    },
    "whisper": {
        "short": lambda: whisper(TASK, 1, 1.3),
        "full": lambda: whisper("<|startoftranscript|><|de|><|translate|>", 2, 4.0),
        "too_long": lambda: whisper("", 3, 5.7),
        "ids": lambda: whisper([5, 6, 7, 8, 9], 4, 0.2),
    },
}
