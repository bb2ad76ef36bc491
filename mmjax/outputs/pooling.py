"""Embeddings of prompts: the output of a pooled sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmjax.engine.output_processor import PromptChunk, StepResult
from mmjax.engine.sequence import EngineSequence
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingRequestOutput,
    RequestError,
    ScoringOutput,
    ScoringRequestOutput,
)


def as_embeddings(outputs: Sequence[PoolingRequestOutput]) -> list[EmbeddingRequestOutput]:
    """The same outputs with lists of floats in place of arrays."""
    return [
        EmbeddingRequestOutput(
            request_id=output.request_id,
            outputs=EmbeddingOutput(output.outputs.data.tolist()),
            prompt_token_ids=output.prompt_token_ids,
            finished=output.finished,
            num_cached_tokens=output.num_cached_tokens,
        )
        for output in outputs
    ]


def check_pairs(first: int, second: int) -> None:
    """RequestError unless as many prompts can be compared: 1 with N, or N with N."""
    if first not in (1, second) or not second:
        raise RequestError(f"score compares 1 prompt with N, or N with N, got {first} and {second}.", "length_mismatch")


def score_pairs(
    first: Sequence[PoolingRequestOutput], second: Sequence[PoolingRequestOutput], tokenizer: Tokenizer | None
) -> list[ScoringRequestOutput]:
    """The cosine of each pair of vectors [D]. One vector in `first` is compared with all of `second`."""
    between = [] if tokenizer is None or tokenizer.pad_id is None else [tokenizer.pad_id]
    return [
        ScoringRequestOutput(
            request_id=f"{one.request_id}_{other.request_id}",
            outputs=ScoringOutput(_cosine(one.outputs.data, other.outputs.data)),
            prompt_token_ids=[*one.prompt_token_ids, *between, *other.prompt_token_ids],
            num_cached_tokens=one.num_cached_tokens + other.num_cached_tokens,
        )
        for one, other in zip([*first] * len(second) if len(first) == 1 else first, second, strict=True)
    ]


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """The cosine of two vectors [D]; 0 for a vector of length 0."""
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.dot(one, other)) / norms if norms else 0.0


class PoolingState:
    """The `OutputProcessor` of a pooled sequence. It collects the hidden state of the last token, or of every token if
    the sequence has `needs_all_tokens`."""

    def __init__(self, seq: EngineSequence) -> None:
        self.seq = seq
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: Exception | None = None
        self._hidden: list[np.ndarray] = []

    def take_prompt(self, result: StepResult, chunk: PromptChunk) -> None:
        """Take the hidden states of a chunk of the prompt."""
        self._hidden.append(result.prompt_hidden(chunk))

    def take(self, result: StepResult, column: int, steps: int) -> None:
        """Take the hidden state at the end of the prompt, unless those of all tokens have been taken."""
        if not self.seq.needs_all_tokens:
            self._hidden.append(result.last_hidden(column))
        self.finish("stop", None)

    def finish(self, reason: str, stop: int | str | None) -> None:
        """End the output, because the whole prompt has run or its request was aborted."""
        self.finish_reason, self.stop_reason = reason, stop

    @property
    def hidden(self) -> np.ndarray:
        """f32[T, D]; T = 1 unless the sequence has `needs_all_tokens`."""
        return np.concatenate(self._hidden)
