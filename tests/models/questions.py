"""What the tiny checkpoints are asked, by family: everything made from seeds, so that it is the same everywhere."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engine_inputs import chat_text, random_pixels

IMAGE, VIDEO = ("<|vision_start|><|" + kind + "_pad|><|vision_end|>" for kind in ("image", "video"))
PICTURE = "(<image>./</image>)"
TASK = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
RATE = 16000

Question = dict[str, Any]

HOMELESS = ("minicpmv", "ultravox", "phi3_v")  # families that transformers does not have; reference_*.py stands for it


def clip(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """A random image that drifts: u8[frames, height, width, 3]."""
    still = random_pixels(seed, height, width)
    return np.stack([np.roll(still, 5 * frame, axis=1) for frame in range(frames)])


def timed_clip(seed: int, frames: int, height: int, width: int) -> Any:
    """The same with metadata: every third frame of a source that has 6 a second."""
    return clip(seed, frames, height, width), {"fps": 6.0, "frames_indices": list(range(0, 3 * frames, 3))}


def sound(seed: int, seconds: float) -> np.ndarray:
    """Three tones that come and go, over noise: f32[n] at 16 kHz."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    tones = [np.sin(2 * np.pi * (hz * t + rng.random())) * np.sin(np.pi * t * rng.random()) for hz in (220, 770, 2400)]
    return (0.2 * np.sum(tones, axis=0) + 0.02 * rng.standard_normal(len(t))).astype(np.float32)


def qwen2_vl(words: str, **media: list[np.ndarray]) -> Question:
    return {"prompt": chat_text(words), "multi_modal_data": media}


def llava(words: str, *images: np.ndarray) -> Question:
    prompt = f"USER: {'<image>' * len(images)}\n{words} ASSISTANT:"
    return {"prompt": prompt, "multi_modal_data": {"image": list(images)} if images else {}}


def phi3_v(words: str, *images: np.ndarray, **kwargs: Any) -> Question:
    media = {"multi_modal_data": {"image": list(images)}} if images else {}
    return {"prompt": f"<|user|>\n{words}<|end|>\n<|assistant|>\n", **media, **kwargs}


def chatml(words: str, **media: list[np.ndarray]) -> Question:
    """LLaVA-OneVision's format; MiniCPM-V's is Qwen2-VL's without a vision tag."""
    return {"prompt": f"<|im_start|>user {words}<|im_end|><|im_start|>assistant\n", "multi_modal_data": media}


def whisper(prompt: str | list[int], seed: int, seconds: float) -> Question:
    key = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
    return {key: prompt, "multi_modal_data": {"audio": sound(seed, seconds)}}


SEEN, SHOWN = ("<|vision_bos|><|" + kind + "|><|vision_eos|>" for kind in ("IMAGE", "VIDEO"))
HEARD, AUDIO = "<|audio_bos|><|AUDIO|><|audio_eos|>", "<|audio_start|><|audio_pad|><|audio_end|>"
SMALL_CLIPS = {"videos_kwargs": {"min_pixels": 3136}}  # else every frame becomes 128 rows at least


LISTEN, SOUND = "Audio {}: <|audio_bos|><|AUDIO|><|audio_eos|>\n", "<|audio|>"


def llama3(words: str, **media: list[np.ndarray]) -> Question:
    head, tail = "<|begin_of_text|><|start_header_id|>user", "<|eot_id|><|start_header_id|>assistant"
    ends = "<|end_header_id|>\n\n"
    return {"prompt": f"{head}{ends}{words}{tail}{ends}", "multi_modal_data": media}


def omni(words: str, *, together: bool = False, **media: list[np.ndarray]) -> Question:
    """`together`: the sound of a video is among the audio."""
    kwargs = SMALL_CLIPS | ({"use_audio_in_video": True} if together else {})
    return {"prompt": chat_text(words), "multi_modal_data": media, "mm_processor_kwargs": kwargs}


QUESTIONS: Mapping[str, Mapping[str, Callable[[], Question]]] = {
    "qwen2_vl": {
        "text": lambda: qwen2_vl("Where is the station?"),
        "image": lambda: qwen2_vl(IMAGE + "What is this?", image=[random_pixels(1)]),
        "two_images": lambda: qwen2_vl(
            f"{IMAGE}One. {IMAGE}Two.", image=[random_pixels(2, 97, 141), random_pixels(3, 30, 45)]
        ),
        "video": lambda: qwen2_vl(VIDEO + "Who wins?", video=[clip(4, 5, 56, 84)]),
        "long_video": lambda: qwen2_vl(VIDEO + "Who is it?", video=[clip(8, 16, 56, 84)]),
        "image_and_video": lambda: qwen2_vl(
            f"{VIDEO}Is {IMAGE} in it?", image=[random_pixels(6, 84, 28)], video=[clip(7, 4, 60, 30)]
        ),
    },
    "qwen2_5_vl": {
        "text": lambda: qwen2_vl("Where is the station?"),
        "image": lambda: qwen2_vl(IMAGE + "What is this?", image=[random_pixels(1, 120, 190)]),
        "two_images": lambda: qwen2_vl(
            f"{IMAGE}One. {IMAGE}Two.", image=[random_pixels(2, 97, 141), random_pixels(3, 30, 45)]
        ),
        "video": lambda: qwen2_vl(VIDEO + "Who wins?", video=[clip(4, 5, 84, 84)]),
        "long_video": lambda: qwen2_vl(VIDEO + "Who is it?", video=[clip(8, 16, 56, 84)]),
        "image_and_video": lambda: qwen2_vl(
            f"{VIDEO}Is {IMAGE} in it?", image=[random_pixels(6, 84, 28)], video=[clip(7, 4, 60, 130)]
        ),
    },
    "qwen3_vl": {
        "text": lambda: qwen2_vl("Where is the station?"),
        "image": lambda: qwen2_vl(IMAGE + "What is this?", image=[random_pixels(1, 120, 190)]),
        "two_images": lambda: qwen2_vl(
            f"{IMAGE}One. {IMAGE}Two.", image=[random_pixels(2, 97, 141), random_pixels(3, 30, 45)]
        ),
        "video": lambda: qwen2_vl(VIDEO + "Who wins?", video=[timed_clip(4, 5, 64, 96)]),
        "image_and_videos": lambda: qwen2_vl(
            f"{VIDEO}Is {IMAGE} in {VIDEO}?",
            image=[random_pixels(6, 84, 32)],
            video=[timed_clip(7, 4, 60, 70), timed_clip(8, 2, 64, 64)],
        ),
    },
    "qwen3_vl_moe": {
        "text": lambda: qwen2_vl("Where is the station?"),
        "image": lambda: qwen2_vl(IMAGE + "What is this?", image=[random_pixels(1, 120, 190)]),
        "image_and_video": lambda: qwen2_vl(
            f"{VIDEO}Is {IMAGE} in it?", image=[random_pixels(6, 84, 32)], video=[timed_clip(7, 4, 60, 70)]
        ),
    },
    "qwen3_moe": {
        "question": lambda: {"prompt": chat_text("Where is the station?")},
        "words": lambda: {"prompt": "The station is in the town, and the sea is near. " * 3},
    },
    "llava": {
        "text": lambda: llava("Where is the station?"),
        "image": lambda: llava("What is this?", random_pixels(1, 100, 60)),
        "two_images": lambda: llava("Which is older?", random_pixels(2, 45, 133), random_pixels(3, 56, 56)),
    },
    "llava_onevision": {
        "text": lambda: chatml("Where is the station?"),
        "image": lambda: chatml("<image>\nWhat is this?", image=[random_pixels(1, 100, 60)]),
        "large_image": lambda: chatml("<image>\nWhat is this?", image=[random_pixels(2, 210, 224)]),
        "two_images": lambda: chatml(
            "<image> or <image>?", image=[random_pixels(3, 56, 56), random_pixels(4, 20, 133)]
        ),
        "video": lambda: chatml("<video>\nWho wins?", video=[clip(5, 3, 56, 56)]),
        "image_and_video": lambda: chatml(
            "Is <image> in <video>?", image=[random_pixels(6, 84, 28)], video=[clip(7, 2, 60, 30)]
        ),
    },
    "minicpmv": {
        "text": lambda: qwen2_vl("Where is the station?"),
        "image": lambda: qwen2_vl(f"{PICTURE}\nWhat is this?", image=[random_pixels(1, 90, 100)]),
        "sliced_image": lambda: qwen2_vl(f"Look at {PICTURE}, what is it?", image=[random_pixels(2, 170, 230)]),
        "two_images": lambda: qwen2_vl(
            f"{PICTURE}{PICTURE} Which?", image=[random_pixels(3, 30, 400), random_pixels(4, 56, 56)]
        ),
        "video": lambda: qwen2_vl("(<video>./</video>) Who wins?", video=[clip(5, 3, 60, 90)]),
        "image_and_video": lambda: qwen2_vl(
            f"(<video>./</video>) and {PICTURE}.", image=[random_pixels(6, 84, 28)], video=[clip(7, 2, 60, 30)]
        ),
    },
    "phi3_v": {
        "text": lambda: phi3_v("Where is the station?"),
        "image": lambda: phi3_v("<|image_1|>\nWhat is this?", random_pixels(1, 60, 100)),
        "tall_image": lambda: phi3_v("What is this? <|image_1|>", random_pixels(2, 200, 61)),
        "two_images": lambda: phi3_v(
            "<|image_1|>\n<|image_2|>\nWhich?", random_pixels(3, 30, 110), random_pixels(4, 56, 56)
        ),
        "crossed_images": lambda: phi3_v(
            "<|image_2|> or <|image_1|>?", random_pixels(3, 30, 110), random_pixels(5, 90, 40)
        ),
        "many_crops": lambda: phi3_v(
            "<|image_1|>Who?", random_pixels(6, 150, 170), mm_processor_kwargs={"num_crops": 9}
        ),
    },
    "whisper": {
        "short": lambda: whisper(TASK, 1, 1.3),
        "full": lambda: whisper("<|startoftranscript|><|de|><|translate|><|notimestamps|>", 2, 4.0),
        "too_long": lambda: whisper("", 3, 5.7),
        "ids": lambda: whisper([5, 6, 7, 8, 9], 4, 0.2),
    },
    "qwen2_audio": {
        "text": lambda: qwen2_vl("Where is the station?"),
        "sound": lambda: qwen2_vl(LISTEN.format(1) + "Who speaks?", audio=[sound(1, 1.37)]),
        "sounds": lambda: qwen2_vl(
            f"{LISTEN.format(1)}{LISTEN.format(2)}{LISTEN.format(3)}Which is louder?",
            audio=[sound(2, 0.05), sound(3, 3.93), sound(4, 1.925)],
        ),
        "too_long": lambda: qwen2_vl(LISTEN.format(1) + "Who speaks?", audio=[sound(5, 5.3)]),
    },
    "ultravox": {
        "text": lambda: llama3("Where is the station?"),
        "sound": lambda: llama3(SOUND + "\nWho speaks?", audio=[sound(1, 1.37)]),
        "sounds": lambda: llama3(
            f"{SOUND}, {SOUND} and {SOUND}: which is louder?", audio=[sound(2, 0.05), sound(3, 3.93), sound(4, 4.0)]
        ),
        "two_windows": lambda: llama3(f"Say again: {SOUND}", audio=[sound(5, 6.13)]),
        "three_windows": lambda: llama3(f"{SOUND}{SOUND}", audio=[sound(6, 0.4), sound(7, 10.9)]),
    },
    "qwen2_5_omni": {
        "text": lambda: omni("Where is the station?"),
        "image": lambda: omni(SEEN + "What is this?", image=[random_pixels(2, 84, 140)]),
        "sounds": lambda: omni(f"{HEARD}One. {HEARD}Two.", audio=[sound(1, 1.37), sound(2, 0.2)]),
        "too_long": lambda: omni(HEARD + "Who speaks?", audio=[sound(3, 8.3)]),
        "video": lambda: omni(SHOWN + "Who wins?", video=[clip(4, 5, 56, 140)]),
        "everything": lambda: omni(
            f"{HEARD}Is {SEEN} in {SHOWN}?",
            image=[random_pixels(6, 84, 28)],
            video=[clip(7, 4, 60, 30)],
            audio=[sound(5, 0.7)],
        ),
        "sound_of_video": lambda: omni(
            SHOWN + "What happens?", together=True, video=[clip(8, 10, 56, 84)], audio=[sound(6, 4.63)]
        ),
        "sound_of_one_of_two": lambda: omni(
            f"{HEARD}{SHOWN}{SEEN}What happens?",
            together=True,
            image=[random_pixels(9, 56, 56)],
            video=[clip(9, 6, 30, 60)],
            audio=[sound(7, 0.4), sound(8, 1.1)],
        ),
    },
    "qwen3_omni_moe": {
        "text": lambda: omni("Where is the station?"),
        "image": lambda: omni(IMAGE + "What is this?", image=[random_pixels(1, 97, 141)]),
        "short_sound": lambda: omni(AUDIO + "Who speaks?", audio=[sound(3, 0.33)]),
        "sounds": lambda: omni(f"{AUDIO}One. {AUDIO}Two.", audio=[sound(1, 2.345), sound(2, 1.01)]),
        "video": lambda: omni(VIDEO + "Who wins?", video=[clip(4, 5, 64, 160)]),
        "everything": lambda: omni(
            f"{AUDIO}Is {IMAGE} in {VIDEO}?",
            image=[random_pixels(6, 84, 28)],
            video=[clip(7, 4, 60, 30)],
            audio=[sound(5, 0.7)],
        ),
        "sound_of_video": lambda: omni(
            VIDEO + "What happens?", together=True, video=[clip(8, 10, 64, 96)], audio=[sound(6, 7.63)]
        ),
        "sound_of_one_of_two": lambda: omni(
            f"{AUDIO}{VIDEO}{IMAGE}What happens?",
            together=True,
            image=[random_pixels(9, 64, 64)],
            video=[clip(9, 6, 32, 64)],
            audio=[sound(7, 1.4), sound(8, 2.1)],
        ),
    },
}
