"""Which Whisper checkpoints know English only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from input_processors import load_processor, read_files
from mmjax.processors.whisper import ENGLISH_START_ID, ENGLISH_VOCAB_SIZE, Processor


@pytest.mark.parametrize(
    ("stated", "config", "multilingual"),
    [
        ({}, {}, True),
        ({"is_multilingual": None}, {}, True),
        ({"is_multilingual": False}, {}, False),
        ({}, {"vocab_size": ENGLISH_VOCAB_SIZE}, False),
        ({}, {"vocab_size": ENGLISH_VOCAB_SIZE + 8, "decoder_start_token_id": ENGLISH_START_ID}, False),  # padded
        ({}, {"vocab_size": ENGLISH_VOCAB_SIZE + 1, "decoder_start_token_id": ENGLISH_START_ID + 1}, True),
        ({"is_multilingual": True}, {"vocab_size": ENGLISH_VOCAB_SIZE}, True),
    ],
)
def test_english_only(
    tiny_dir: Callable[[str], Path], stated: dict[str, Any], config: dict[str, Any], multilingual: bool
) -> None:
    files = read_files(tiny_dir("whisper"))
    generation = {name: value for name, value in files["generation_config.json"].items() if name != "is_multilingual"}
    _, tokenizer = load_processor("whisper", tiny_dir("whisper"))
    processor = Processor(
        files["config.json"] | config, {**files, "generation_config.json": generation | stated}, tokenizer
    )
    assert processor.is_multilingual is multilingual
