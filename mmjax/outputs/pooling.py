"""Prompts that want vectors: checked, run to their end, and pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.engine.output_processor import PromptChunk, StepResult
from mmjax.engine.sequence import Sequence as EngineSequence
from mmjax.types import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingParams,
    PoolingRequestOutput,
    RequestError,
    RequestTypeError,
    ValidationError,
)

# what a prompt can be made into -> whether every token's hidden state is wanted, or the last one's
TASKS = {"embed": False, "token_embed": True}


def pooling_params(given: Any, count: int, task: str | None, width: int) -> list[PoolingParams]:
    """One set of checked parameters per prompt. `task` fills in where the parameters name none.

    Raises RequestTypeError for another kind of object, RequestError for a wrong number of them or a wrong value.
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
    """The same with plain lists of numbers."""
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
    """The hidden states of a prompt's last token, or with `all_tokens` of every token, as the device hands them over.

    An `OutputProcessor` beside `CompletionState`, for engines that pool.
    """

    def __init__(self, seq: EngineSequence, *, all_tokens: bool) -> None:
        self.seq = seq
        self.all_tokens = all_tokens
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._parts: list[np.ndarray] = []

    def take_prompt(self, result: StepResult, chunk: PromptChunk) -> None:
        """Take the hidden states of a chunk of the prompt."""
        self._parts.append(result.prompt_hidden(chunk))

    def take(self, result: StepResult, column: int, steps: int) -> None:
        """The prompt has run to its end: take the last hidden state, unless there are those of all tokens."""
        if not self.all_tokens:
            self._parts.append(result.last_hidden(column))
        self.finish("stop", None)

    def finish(self, reason: str, stop: int | str | None) -> None:
        """All of the prompt has run, or none of it will."""
        self.finish_reason, self.stop_reason = reason, stop

    @property
    def hidden(self) -> np.ndarray:
        """f32[T, D], T = 1 unless `all_tokens`."""
        return np.concatenate(self._parts)
