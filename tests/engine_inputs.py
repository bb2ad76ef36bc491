"""Small inputs and shorthands for tests that run an engine."""

from typing import Any

import numpy as np

from mmjax import SamplingParams

# One size for small engines, so that they take over each other's programs.
SMALL: dict[str, Any] = {
    "max_model_len": 384,
    "block_size": 16,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "num_decode_steps": 4,
}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def random_pixels(seed: int, height: int = 60, width: int = 84) -> np.ndarray:
    """A random image u8[height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def greedy(n: int = 12, **kwargs: Any) -> SamplingParams:
    """Greedy for n tokens, whatever is said."""
    return SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, **kwargs)


def output_ids(outputs: Any) -> list[list[int]]:
    """The token ids of the first answer of each output."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def chat_text(words: str) -> str:
    """A question without media in Qwen2-VL's format."""
    return f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n"


def image_prompt(*images: np.ndarray, words: str = "What is this?") -> dict[str, Any]:
    """A Qwen2-VL prompt about some images."""
    return {"prompt": chat_text(IMAGE * len(images) + words), "multi_modal_data": {"image": list(images)}}
