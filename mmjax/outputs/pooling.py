"""Embeddings of prompts: the output of a pooled sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.engine.output_processor import PromptChunk, StepResult
from mmjax.engine.sequence import EngineSequence
from mmjax.types import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingParams,
    PoolingRequestOutput,
    RequestError,
    RequestTypeError,
    ValidationError,
)

# task -> whether the hidden state of every token is wanted, or only that of the last one
TASKS = {"embed": False, "token_embed": True}


def pooling_params(given: Any, count: int, task: str | None, width: int) -> list[PoolingParams]:
    """Checked parameters, one per prompt. given: None, parameters for all prompts, or a list of them. task: of
    parameters that name none.

    RequestTypeError for other objects, RequestError for too few or too many parameters and for a wrong value.
    """
    given = PoolingParams() if given is None else given
    if not isinstance(given, PoolingParams | Sequence):
        raise RequestTypeError(f"pooling_params should be PoolingParams, got {type(given).__name__}")
    each = [given] * count if isinstance(given, PoolingParams) else list(given)
    if len(each) != count:
        raise RequestError(
            f"The lengths of prompts ({count}) and params ({len(each)}) must be the same.", "length_mismatch"
        )
    out = []
    for params in each:
        if not isinstance(params, PoolingParams):
            raise RequestTypeError(f"pooling_params should be PoolingParams, got {type(params).__name__}")
        params = params.clone()
        if task is not None and params.task not in (None, task):
            raise RequestError(f"pooling_params asks for {params.task!r}, but the call is for {task!r}.", "bad_task")
        params.task = params.task or task or "embed"
        if params.task not in TASKS:
            raise RequestError(f"Pooling task {params.task!r} is not supported; known: {', '.join(TASKS)}.", "bad_task")
        if params.dimensions is not None and params.dimensions > width:
            raise ValidationError(
                f"dimensions must be at most {width}, the width of the model.",
                parameter="dimensions",
                value=params.dimensions,
            )
        out.append(params)
    return out


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
