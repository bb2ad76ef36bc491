"""The page's section on video inputs, offline: arrays, tensors, frames with metadata, clips in messages."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from engine_inputs import chat_text
from mmjax import LLM
from prompts import base64_image, chat_one, generate_one, random_image, same_outputs, user_messages

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
FRAMES = np.random.default_rng(5).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Looks like a tensor of torch, which is not installed everywhere."""

    array: Any

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self.array, dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.array, name)


def asking(video: Any) -> dict[str, Any]:
    return {"prompt": chat_text(VIDEO + "What happens?"), "multi_modal_data": {"video": video}}


def test_every_form_of_one_video(qwen: LLM) -> None:
    """A list of NumPy frames is one video, as are tensors with channels first, which `process_vision_info` returns."""
    first = np.ascontiguousarray(FRAMES.transpose(0, 3, 1, 2)).astype(np.float32)
    forms = [
        FRAMES,
        list(FRAMES),
        [FRAMES],
        [list(FRAMES)],
        (FRAMES, {"fps": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3], "do_sample_frames": False}),
        [(FRAMES, {"fps": 2.0})],
        [Tensor(first)],
        [jnp.asarray(first)],
        jnp.asarray(FRAMES)[None],
        [pil_of(frame) for frame in FRAMES],
    ]
    answers = [generate_one(qwen, asking(form)) for form in forms]
    assert same_outputs(*answers)
    assert not same_outputs(answers[0], generate_one(qwen, asking(FRAMES[::-1].copy())))


def pil_of(frame: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(frame)


def test_two_videos_and_an_image(qwen: LLM) -> None:
    prompt = chat_text(f"{VIDEO}<|vision_start|><|image_pad|><|vision_end|>{VIDEO}Compare.")
    data = {"video": [FRAMES, list(FRAMES[:2])], "image": random_image(1)}
    out = generate_one(qwen, {"prompt": prompt, "multi_modal_data": data})
    marks = [qwen.model.tokenizer.id_of(f"<|{kind}_pad|>") for kind in ("video", "image")]  # type: ignore[union-attr]
    tokens = out.prompt_token_ids or []
    assert [tokens.count(mark) for mark in marks] == [2 * 6 + 6, 6]


def test_videos_in_messages(qwen: LLM) -> None:
    """`video_url` with a sequence of JPEG images; `num_frames` of the call bounds it."""
    frames = ",".join(base64_image(random_image(i), "JPEG") for i in range(4))
    part = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}
    four = chat_one(qwen, user_messages(part, "What happens?"))
    two = chat_one(qwen, user_messages(part, "What happens?"), media_io_kwargs={"video": {"num_frames": 2}})
    assert len(four.prompt_token_ids or []) - len(two.prompt_token_ids or []) == 6
    assert str(four.prompt).count("<|video_pad|>") == 1 and not same_outputs(four, two)


def test_audio_of_a_video(make_llm: Callable[..., LLM], shared: Path) -> None:
    """`use_audio_in_video`: a video part adds its audio track, also from the cache; local files if allowed."""
    folder = shared / "media" / "video"
    io_kwargs = {"video": {"num_frames": 2}}
    llm = make_llm("qwen2_5_omni", allowed_local_media_path=str(folder), media_io_kwargs=io_kwargs)
    clip = {"type": "video_url", "video_url": {"url": f"file://{folder}/bunny_with_speech.mp4"}, "uuid": "clip"}
    silent = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 4}
    kwargs = {**silent, "use_audio_in_video": True}
    heard = chat_one(llm, user_messages(clip, "What?"), mm_processor_kwargs=kwargs)
    again = chat_one(llm, user_messages({**clip, "video_url": None}, "What?"), mm_processor_kwargs=kwargs)
    seen = chat_one(llm, user_messages(clip, "What?"), mm_processor_kwargs=silent)
    sound = llm.model.input_processor.processor.placeholder_ids["audio"]  # type: ignore[union-attr]
    tokens = [(out.prompt_token_ids or []).count(sound) for out in (heard, seen)]
    assert same_outputs(heard, again) and tokens[0] > 100 and tokens[1] == 0
