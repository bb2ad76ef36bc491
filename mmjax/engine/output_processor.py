"""What the engine hands to those who make outputs, and what it asks of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import numpy as np

from mmjax.engine.programs import StepOutput
from mmjax.engine.sampler import PromptLogprobs, SamplerOutput
from mmjax.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class PromptChunk:
    """Prompt tokens [first, first + num_tokens) of a sequence that wants something of each; `offset` is where their
    results lie in the dispatch."""

    seq: Sequence
    offset: int
    first: int
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class LogprobsChunk:
    """The log-probabilities of n tokens: token_ids i32[n], logprobs f32[n], ranks i32[n], and the most likely tokens
    beside them, top_ids i32[n, top] and top_logprobs f32[n, top]."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class StepResult:
    """A dispatch that has run, read by the host: arrays are copied when they are first asked for."""

    def __init__(self, output: StepOutput, prompt_logprobs: PromptLogprobs | None = None) -> None:
        self._output = output
        self._prompt_logprobs = prompt_logprobs

    def wait(self) -> None:
        """Return once the device has finished the dispatch."""
        _ = self._token_ids if self._output.sampled is not None else self._last_hidden

    def token_ids(self, column: int, steps: int) -> np.ndarray:
        """i32[n]: the tokens of the sequence in this column, n <= steps; a row that had stopped has no more."""
        tokens = self._token_ids[:steps, column]
        return tokens[tokens >= 0]

    def logprobs(self, column: int, token_ids: np.ndarray) -> LogprobsChunk:
        """The report on the tokens i32[n] that `token_ids` gave for this column."""
        s, n = self._sampled, len(token_ids)
        arrays = (s.logprobs, s.ranks, s.top_ids, s.top_logprobs)
        if np.ndim(s.token_ids) == 1:  # a prefill samples once
            return LogprobsChunk(token_ids, *(np.asarray(x)[column][None] for x in arrays))
        return LogprobsChunk(token_ids, *(np.asarray(x)[:n, column] for x in arrays))

    def prompt_logprobs(self, chunk: PromptChunk) -> LogprobsChunk:
        """The report on the tokens of a chunk of a prompt."""
        assert self._prompt_logprobs is not None
        at = slice(chunk.offset, chunk.offset + chunk.num_tokens)
        tokens = chunk.seq.token_ids[chunk.first : chunk.first + chunk.num_tokens]
        return LogprobsChunk(tokens, *(np.asarray(x)[at] for x in self._prompt_logprobs))

    def last_hidden(self, column: int) -> np.ndarray:
        """f32[1, D]: the hidden state of the last token of the prompt in this column."""
        return self._last_hidden[column : column + 1]

    def prompt_hidden(self, chunk: PromptChunk) -> np.ndarray:
        """f32[n, D]: the hidden states of a chunk of a prompt."""
        return self._hidden[chunk.offset : chunk.offset + chunk.num_tokens]

    @property
    def _sampled(self) -> SamplerOutput:
        assert self._output.sampled is not None
        return self._output.sampled

    @functools.cached_property
    def _token_ids(self) -> np.ndarray:
        tokens = np.asarray(self._sampled.token_ids)
        return tokens.reshape(-1, tokens.shape[-1])

    @functools.cached_property
    def _last_hidden(self) -> np.ndarray:
        return np.asarray(self._output.last_hidden)

    @functools.cached_property
    def _hidden(self) -> np.ndarray:
        return np.asarray(self._output.hidden).astype(np.float32)


class OutputProcessor(Protocol):
    """Makes the output of one sequence out of what the device computed for it. Lives on the engine's thread."""

    seq: Sequence
    finish_reason: str | None
    stop_reason: int | str | None

    def take_prompt(self, result: StepResult, chunk: PromptChunk) -> None:
        """A chunk of the prompt has run, and the sequence wants something of each of its tokens."""
        ...

    def take(self, result: StepResult, column: int, steps: int) -> None:
        """A dispatch has sampled for this sequence (or has reached the end of its prompt), at most `steps` tokens.

        Sets finish_reason when the output is complete.
        """
        ...

    def finish(self, reason: str, stop: int | str | None) -> None:
        """The output is complete, or will never be."""
        ...
