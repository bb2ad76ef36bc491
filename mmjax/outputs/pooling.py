"""Embeddings of prompts: the output of a pooled sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmjax.engine.output_processor import PromptChunk, StepResult
from mmjax.engine.sequence import EngineSequence
from mmjax.types import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingRequestOutput,
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
