"""Options that the page passes to an engine: those that would make every request fail are refused before loading."""

from collections.abc import Callable
from typing import Any

import pytest

from engine_inputs import IMAGE, chat_text
from mmjax import LLM
from prompts import generate_one, random_image

PROCESSOR: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2_vl", {"max_pixels": -3}, "max_pixels must be a positive integer, got -3"),
    ("qwen2_vl", {"min_pixels": 0}, "min_pixels must be a positive integer"),
    ("qwen2_vl", {"min_pixels": 10**6, "max_pixels": 10**3}, r"min_pixels \(1000000\) is above max_pixels \(1000\)"),
    ("qwen2_vl", {"size": {"shortest_edge": "4"}}, "shortest_edge must be a positive integer"),
    ("qwen2_vl", {"size": 448}, "size must be a dictionary"),
    ("qwen2_vl", {"do_resize": "no"}, "do_resize must be true or false"),
    ("qwen2_vl", {"fps": 0}, "fps must be a positive number"),
    ("qwen2_vl", {"fps": float("nan")}, "fps must be a positive number"),
    ("qwen3_vl", {"num_frames": 2.5}, "num_frames must be a positive integer"),
    ("qwen2_5_omni", {"videos_kwargs": {"fps": -1}}, "fps must be a positive number"),
    ("phi3_v", {"num_crops": True}, "num_crops must be a positive integer"),
    ("llava_onevision", {"vision_aspect_ratio": "wide"}, "vision_aspect_ratio must be"),
]
DECODERS: list[tuple[dict[str, Any], str]] = [
    ({"video": {"num_frames": 0}}, "num_frames must be greater than 0 or -1"),
    ({"video": {"num_frames": "8"}}, "num_frames"),
    ({"video": {"fps": "fast"}}, "fps must be a finite number"),
    ({"video": {"frame_recovery": 1}}, "frame_recovery must be true or false"),
    ({"video": {"video_backend": "none"}}, "Extension class none not found"),
    ({"video": 8}, r"\['video'\] must be a dictionary"),
    ({"image": {"rgba_background_color": [0, 0, 256]}}, "3 integers in the range"),
    ({"image": {"rgba_background_color": [True, 0, 0]}}, "3 integers in the range"),
]


@pytest.mark.parametrize(("family", "kwargs", "words"), PROCESSOR)
def test_options_of_the_processor(make_llm: Callable[..., LLM], family: str, kwargs: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"--mm-processor-kwargs: {words}"):
        make_llm(family, mm_processor_kwargs=kwargs, load_format="dummy")


@pytest.mark.parametrize(("kwargs", "words"), DECODERS)
def test_options_of_the_decoders(make_llm: Callable[..., LLM], kwargs: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"--media-io-kwargs: .*{words}"):
        make_llm("qwen2_vl", media_io_kwargs=kwargs, load_format="dummy")


def test_options_of_a_prompt(qwen: LLM) -> None:
    asked = {"prompt": chat_text(IMAGE), "multi_modal_data": {"image": random_image(1)}}
    for family, kwargs, words in PROCESSOR:
        if family == "qwen2_vl":
            with pytest.raises(ValueError, match=words):
                generate_one(qwen, {**asked, "mm_processor_kwargs": kwargs})
    for io_kwargs, words in DECODERS[-2:]:
        with pytest.raises(ValueError, match=words):
            generate_one(qwen, {**asked, "media_io_kwargs": io_kwargs})
    assert generate_one(qwen, {**asked, "mm_processor_kwargs": {"fps": None, "max_pixels": None}}).finished
