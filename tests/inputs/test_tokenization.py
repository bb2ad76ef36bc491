"""`tokenization_kwargs`: the part of a prompt that is used, in every form of prompt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from input_processors import make_input_processor
from mmjax.inputs.input_processor import EngineInput, InputProcessor
from mmjax.inputs.tokenization import TokenizationOptions
from mmjax.types import ValidationError


def _process(input_processor: InputProcessor, prompt: Any, **options: Any) -> EngineInput:
    return input_processor.process(input_processor.parse(prompt), **options)


def test_truncation_of_every_form(tiny_dir: Callable[[str], Path]) -> None:
    directory = tiny_dir("llava")
    input_processor = make_input_processor("llava", directory, max_model_len=10, prompt_embeds_dim=4, mm_embed_dim=4)
    vectors = make_input_processor("llava", directory, max_model_len=10, generates=False)
    text = "Hello there, how are you?"
    whole = make_input_processor("llava", directory).tokenizer.encode(text)  # type: ignore[union-attr]
    embeds = np.arange(4 * len(whole), dtype=np.float32).reshape(-1, 4)
    assert len(whole) > 10
    for kwargs, kept in (
        ({"truncate_prompt_tokens": 4}, slice(-4, None)),
        ({"truncate_prompt_tokens": 4, "truncation_side": "left"}, slice(-4, None)),
        ({"truncate_prompt_tokens": 4, "truncation_side": "right"}, slice(4)),
        ({"truncate_prompt_tokens": -1, "truncation_side": "right"}, slice(9)),
        ({"truncation": True, "max_length": 5}, slice(-5, None)),
        ({"truncation": True}, slice(-9, None)),
        ({"truncation": True, "max_length": 5, "truncate_prompt_tokens": 3}, slice(-3, None)),
    ):
        for prompt in (text, whole):
            assert _process(input_processor, prompt, tokenization_kwargs=kwargs).token_ids.tolist() == whole[kept]
        given = _process(input_processor, {"prompt_embeds": embeds}, tokenization_kwargs=kwargs).items
        np.testing.assert_array_equal(
            np.concatenate([entry.item.embeds for entry in given])[:, :4],  # type: ignore[misc]
            embeds[kept],
        )
    # what is embedded keeps its start, as vLLM's pooling runner does, and all of the model's length
    for prompt in (text, whole):
        used = _process(vectors, prompt, tokenization_kwargs={"truncate_prompt_tokens": -1}).token_ids.tolist()
        assert used == whole[:10]
    for prompt in (text, whole, {"prompt_embeds": embeds}):
        for wrong in ({"truncation": False, "truncate_prompt_tokens": 4}, {}):
            with pytest.raises(ValidationError, match=r"^This model's maximum context length is 10 tokens\. "):
                _process(input_processor, prompt, tokenization_kwargs=wrong)
    with pytest.raises(ValidationError, match=r"maximum context length is 10 tokens, and `max_length` allows 5"):
        _process(input_processor, whole[:6], tokenization_kwargs={"max_length": 5})
    assert len(_process(input_processor, whole[:5], tokenization_kwargs={"max_length": 5}).token_ids) == 5
    for wrong in ({"truncation_side": "top"}, {"max_length": 0}, {"max_length": True}, {"truncation": "longest"}):
        with pytest.raises(ValidationError, match=r"^Must be"):
            _process(input_processor, whole[:4], tokenization_kwargs=wrong)


def test_what_the_tokenizer_appends_is_not_cut() -> None:
    options = TokenizationOptions(max_used=3, from_start=True)
    assert options.truncate([1, 2, 3, 4, 9], 1) == [1, 2, 9]
    assert options.truncate([1, 9], 1) == [1, 9]
    assert TokenizationOptions(max_used=1, from_start=True).truncate([1, 2, 9], 1) == [1]
    assert TokenizationOptions(max_used=3).truncate([1, 2, 3, 4, 9], 1) == [3, 4, 9]
