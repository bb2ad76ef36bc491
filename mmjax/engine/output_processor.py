"""The interface between engine and outputs: the results of a dispatch, and the protocol that outputs implement."""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import numpy as np

from mmjax.engine.programs import StepOutput
from mmjax.engine.sampler import PromptLogprobs, SamplerOutput
from mmjax.engine.sequence import EngineSequence


@dataclasses.dataclass(frozen=True)
class PromptChunk:
    """Prompt tokens [first, first + num_tokens) of a sequence that needs a result for each of them. offset: where these
    results start in the dispatch's arrays."""

    seq: EngineSequence
    offset: int
    first: int
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class LogprobsChunk:
    """The log-probabilities of n tokens. token_ids: i32[n]. logprobs: f32[n]. ranks: i32[n], from 1. top_ids: i32[n,
    top] and top_logprobs: f32[n, top], the likeliest tokens at each of the n positions, the most likely first."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class StepResult:
    """The results of a dispatch. Arrays are copied to the host when they are first read."""

    def __init__(self, output: StepOutput, prompt_logprobs: PromptLogprobs | None = None) -> None:
        self._output = output
        self._prompt_logprobs = prompt_logprobs

    def wait(self) -> None:
        """Return once the device has finished the dispatch."""
        _ = self._token_ids if self._output.sampled is not None else self._last_hidden

    def token_ids(self, column: int, steps: int) -> np.ndarray:
        """i32[n], n <= steps: the tokens sampled for the sequence in this column; fewer where it stopped."""
        tokens = self._token_ids[:steps, column]
        return tokens[tokens >= 0]

    def logprobs(self, column: int, token_ids: np.ndarray) -> LogprobsChunk:
        """The log-probabilities of the tokens i32[n] that `token_ids` returned for this column."""
        sampled, n = self._sampled, len(token_ids)
        arrays = (sampled.logprobs, sampled.ranks, sampled.top_ids, sampled.top_logprobs)
        if np.ndim(sampled.token_ids) == 1:  # a prefill samples once
            return LogprobsChunk(token_ids, *(np.asarray(x)[column][None] for x in arrays))
        return LogprobsChunk(token_ids, *(np.asarray(x)[:n, column] for x in arrays))

    def prompt_logprobs(self, chunk: PromptChunk) -> LogprobsChunk:
        """The log-probabilities of a chunk of a prompt."""
        assert self._prompt_logprobs is not None
        tokens = slice(chunk.offset, chunk.offset + chunk.num_tokens)
        token_ids = chunk.seq.token_ids[chunk.first : chunk.first + chunk.num_tokens]
        return LogprobsChunk(token_ids, *(np.asarray(x)[tokens] for x in self._prompt_logprobs))

    def last_hidden(self, column: int) -> np.ndarray:
        """f32[1, D]: the hidden state of the last prompt token of the sequence in this column."""
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
    """Makes the output of one sequence from what the device computes for it. Only the engine's thread calls it.

    finish_reason: None until the output is complete. stop_reason: the stop token or stop string that ended it. error:
    set by the engine if the output could not be made.
    """

    seq: EngineSequence
    finish_reason: str | None
    stop_reason: int | str | None
    error: Exception | None

    def take_prompt(self, result: StepResult, chunk: PromptChunk) -> None:
        """Take the results for a chunk of the prompt. Only called for sequences with `needs_all_tokens`."""
        ...

    def take(self, result: StepResult, column: int, steps: int) -> None:
        """Take what a dispatch computed for the sequence in this column: at most `steps` tokens, or the hidden state at
        the end of its prompt. Sets finish_reason when the output is complete."""
        ...

    def finish(self, reason: str, stop: int | str | None) -> None:
        """End the output, because it is complete or its request was aborted."""
        ...
