"""Prompts that want vectors: checked, run to their end, and pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmjax.build import LoadedModel
from mmjax.engine.constraints import LogitsBias
from mmjax.engine.pooled import PoolingState
from mmjax.engine.sequence import Sequence as EngineSequence
from mmjax.render import EngineInput
from mmjax.run import EngineRequest, engine_prompt
from mmjax.types import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingParams,
    PoolingRequestOutput,
    RequestError,
    SamplingParams,
    ValidationError,
)

# what a prompt can be made into -> whether every token's hidden state is wanted, or the last one's
TASKS = {"embed": False, "token_embed": True}
TINY = 1e-12  # a vector shorter than this has no direction


def pooling_params(given: Any, count: int, task: str | None, width: int) -> list[PoolingParams]:
    """One set of checked parameters per prompt. `task` fills in where the parameters name none.

    Raises TypeError for another kind of object, ValueError for a wrong number of them or a wrong value.
    """
    given = PoolingParams() if given is None else given
    if not isinstance(given, PoolingParams | Sequence):
        raise TypeError(f"pooling_params should be PoolingParams, got {type(given).__name__}")
    each = [given] * count if isinstance(given, PoolingParams) else list(given)
    if len(each) != count:
        raise ValueError(f"The lengths of prompts ({count}) and params ({len(each)}) must be the same.")
    out = []
    for params in each:
        if not isinstance(params, PoolingParams):
            raise TypeError(f"pooling_params should be PoolingParams, got {type(params).__name__}")
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


class PoolingRequest(EngineRequest):
    """One prompt in an engine that pools."""

    def __init__(self, model: LoadedModel, request_id: str, engine_input: EngineInput, params: PoolingParams) -> None:
        super().__init__(model, request_id, engine_input)
        self.params = params
        none = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        seq = EngineSequence(
            request_id,
            0,
            engine_prompt(engine_input, model.spec.is_encoder_decoder),
            none,
            seed=0,
            stop_ids=(),
            max_model_len=model.max_model_len,
            logits_processor=LogitsBias(none, model.vocab_size, model.tokenizer),
            needs_all_tokens=TASKS[params.task or "embed"],
        )
        self.pooled = PoolingState(seq, whole=seq.needs_all_tokens)
        self.states = [self.pooled]
        self.engine.add(self.pooled)

    def output(self) -> PoolingRequestOutput:
        """The vector [D], or one per token [T, D]: float32, cut to `dimensions`, of length 1 unless told otherwise."""
        hidden = self.pooled.hidden[:, : self.params.dimensions]
        if self.params.use_activation in (None, True):
            hidden = hidden / np.maximum(np.linalg.norm(hidden, axis=-1, keepdims=True), TINY)
        return PoolingRequestOutput(
            request_id=self.request_id,
            outputs=PoolingOutput(hidden if self.pooled.all_tokens else hidden[0]),
            prompt_token_ids=self.engine_input.token_ids.tolist(),
            finished=self.finished,
            num_cached_tokens=self.pooled.seq.num_cached_tokens or 0,
        )


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
