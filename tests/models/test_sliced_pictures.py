"""Families that slice images: on two devices, in chunks that end inside images, from the prefix cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine_inputs import greedy, output_ids
from mmjax import LLM
from models.questions import QUESTIONS
from models.test_recorded import RECORDED

BLOCK_SIZE = 16
CASES = ("text", "image", "image_and_video")
OPTIONS: dict[str, Any] = {
    "max_model_len": 384,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 64,
    "num_decode_steps": 4,
    "block_size": BLOCK_SIZE,
}


@pytest.mark.usefixtures("one_decode_size")
@pytest.mark.parametrize("family", ["llava_onevision", "minicpmv"])
def test_two_devices_chunks_and_prefixes_give_the_recorded_outputs(
    family: str, tiny_dir: Callable[[str], Path]
) -> None:
    """All prompts at once, text among images; then again, when all but the last block of each is cached."""
    llm = LLM(str(tiny_dir(family)), **OPTIONS, tensor_parallel_size=2, enforce_eager=True)
    asked = [QUESTIONS[family][case]() for case in CASES]
    wanted = [RECORDED[family][case]["ids"] for case in CASES]
    first = llm.generate(asked, greedy(12), use_tqdm=False)
    assert output_ids(first) == wanted
    again = llm.generate(asked, greedy(12), use_tqdm=False)
    assert output_ids(again) == wanted
    for before, after in zip(first, again, strict=True):
        length = len(before.prompt_token_ids or ())
        assert after.num_cached_tokens == (length - 1) // BLOCK_SIZE * BLOCK_SIZE
    upside_down = [picture[::-1].copy() for picture in asked[1]["multi_modal_data"]["image"]]
    other = {**asked[1], "multi_modal_data": {"image": upside_down}}
    output = llm.generate(other, greedy(12), use_tqdm=False)[0]
    assert output.num_cached_tokens in (0, BLOCK_SIZE) and output_ids([output]) != wanted[1:2], (
        "only what precedes it is cached"
    )
