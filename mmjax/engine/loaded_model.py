"""A model ready to answer: its engines and all that stands before and behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from mmjax.chat import ChatRenderer
from mmjax.engine.buckets import BucketConfig
from mmjax.engine.engine import Engine
from mmjax.engine.logits.structured_output import GrammarCompiler
from mmjax.inputs.input_processor import InputProcessor
from mmjax.spec import ModelSpec
from mmjax.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass
class LoadedModel:
    """A built model. eos: end tokens, the primary one first. generation: the sampling defaults in force."""

    engines: list[Engine]
    input_processor: InputProcessor
    chat: ChatRenderer
    tokenizer: Tokenizer | None
    grammar_compiler: GrammarCompiler
    spec: ModelSpec
    buckets: BucketConfig
    generation_config: dict[str, Any]
    eos_ids: tuple[int, ...]
    max_model_len: int
    startup_s: float
    compile_s: float
    seeds: Iterator[int]

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    def next_seed(self) -> int:
        """The seed of the next request that names none."""
        return next(self.seeds)
