"""Checks the parameters of requests against the model, and assigns them to prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmjax.config import env_number
from mmjax.types import PoolingParams, RequestError, RequestTypeError, SamplingParams, ValidationError
from mmjax.types.sampling import MAX_N

# task -> whether the hidden state of every token is returned, or only that of the last one
POOLING_TASKS = {"embed": False, "token_embed": True}


@dataclasses.dataclass(frozen=True)
class ParamsChecker:
    """Checks parameters for one model. Errors are RequestErrors, and RequestTypeErrors for objects of the wrong type.

    max_logprobs: most log-probabilities per token; -1 allows the whole vocabulary. pooling: whether the engine pools.
    """

    vocab_size: int
    hidden_size: int
    max_model_len: int
    max_logprobs: int
    pooling: bool
    has_tokenizer: bool

    def sampling_params(self, given: Any, count: int) -> list[SamplingParams]:
        """Checked parameters, one per prompt. given: parameters for all prompts, or a list of them."""
        params: list[SamplingParams] = _one_per_prompt(given, count)
        for each in {id(each): each for each in params}.values():
            self.check_sampling(each)
        return params

    def check_sampling(self, params: Any) -> None:
        """Raise an error for sampling parameters that this model cannot serve."""
        if self.pooling:
            raise RequestError(
                "LLM.generate() is only supported for generative models. Try passing `--runner generate` to use the "
                "model as a generative model.",
                "wrong_runner",
            )
        if not isinstance(params, SamplingParams):
            raise RequestTypeError(f"sampling_params should be SamplingParams, got {type(params).__name__}")
        params.verify(self.vocab_size, self.max_logprobs)
        if params.n > (max_n := env_number("MAX_N_SEQUENCES", MAX_N)):
            raise ValidationError(f"n must be at most {max_n:g}, got {params.n}.", parameter="n", value=params.n)
        if params.stop and not self.has_tokenizer:
            raise RequestError("stop strings need a tokenizer: do not set skip_tokenizer_init.", "no_tokenizer")

    def check_max_tokens(self, prompt_len: int, params: SamplingParams) -> None:
        """ValidationError if the prompt leaves too little room for max_tokens."""
        if params.max_tokens is not None and prompt_len + params.max_tokens > self.max_model_len:
            raise ValidationError(
                f"This model's maximum context length is {self.max_model_len} tokens, but "
                f"{prompt_len + params.max_tokens} were requested: {prompt_len} in the prompt and {params.max_tokens} "
                "for the output. Shorten either.",
                parameter="max_tokens",
                value=params.max_tokens,
            )

    def check_pooling(self, method: str) -> None:
        """RequestError unless the engine pools. method: the name of the LLM's method, for the message."""
        if not self.pooling:
            raise RequestError(
                f"LLM.{method}() is only supported for pooling models. Try passing `--runner pooling` to use the model "
                "as a pooling model.",
                "wrong_runner",
            )

    def pooling_params(self, given: Any, count: int, task: str | None = None) -> list[PoolingParams]:
        """Checked copies of parameters, one per prompt. given: None, parameters for all prompts, or a list of them.
        task: the task of the call, if it has one."""
        params = _one_per_prompt(PoolingParams() if given is None else given, count)
        return [self._check_pooling_params(each, task) for each in params]

    def _check_pooling_params(self, params: Any, task: str | None) -> PoolingParams:
        if not isinstance(params, PoolingParams):
            raise RequestTypeError(f"pooling_params should be PoolingParams, got {type(params).__name__}")
        params = params.clone()
        if task is not None and params.task not in (None, task):
            raise RequestError(f"pooling_params asks for {params.task!r}, but the call is for {task!r}.", "bad_task")
        params.task = params.task or task or "embed"
        if params.task not in POOLING_TASKS:
            raise RequestError(
                f"Pooling task {params.task!r} is not supported; known: {', '.join(POOLING_TASKS)}.", "bad_task"
            )
        if params.dimensions is not None and params.dimensions > self.hidden_size:
            raise ValidationError(
                f"dimensions must be at most {self.hidden_size}, the width of the model.",
                parameter="dimensions",
                value=params.dimensions,
            )
        return params


def _one_per_prompt(given: Any, count: int) -> list[Any]:
    if not isinstance(given, Sequence):
        return [given] * count
    check_count("params", given, count)
    return list(given)


def check_count(name: str, values: Sequence[Any], count: int) -> None:
    """RequestError unless there is one value per prompt."""
    if len(values) != count:
        raise RequestError(
            f"The lengths of prompts ({count}) and {name} ({len(values)}) must be the same.", "length_mismatch"
        )
