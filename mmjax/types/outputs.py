"""What comes back from a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

FINISH_REASONS = ("stop", "length", "abort")


@dataclass
class Logprob:
    """Natural-log probability of one token under the model's raw distribution.

    `rank` is 1-based among the whole vocabulary (None when it was not computed); `decoded_token` is the token's own
    text (None without a tokenizer).
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


SampleLogprobs: TypeAlias = list[dict[int, Logprob]]
PromptLogprobs: TypeAlias = list[dict[int, Logprob] | None]


def _brief(value: Any, limit: int = 16) -> str:
    """repr() that does not flood the screen: long lists keep their head and tell their length."""
    if isinstance(value, (list, tuple)) and len(value) > limit:
        return f"[{', '.join(map(repr, value[:limit]))}, … {len(value)} in all]"
    return repr(value)


@dataclass(repr=False)
class CompletionOutput:
    """One of the `n` answers to a request.

    `text` leaves out the stop string and the end token, `token_ids` includes the end token. `finish_reason` is "stop",
    "length", "abort" or None while running. `stop_reason` is the stop string or stop token id that ended the answer;
    None for the end-of-sequence token and for every other reason.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any = None

    def finished(self) -> bool:
        return self.finish_reason is not None

    def __repr__(self) -> str:
        return (
            f"CompletionOutput(index={self.index}, text={self.text!r}, token_ids={_brief(self.token_ids)}, "
            f"cumulative_logprob={self.cumulative_logprob}, logprobs={_brief(self.logprobs, 2)}, "
            f"finish_reason={self.finish_reason!r}, stop_reason={self.stop_reason!r})"
        )


@dataclass
class RequestMetrics:
    """Times of a request, in seconds of the engine's monotonic clock; None = not reached. max_tokens: the parameter."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    max_tokens: int | None = None

    @property
    def time_in_queue(self) -> float | None:
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time


@dataclass(repr=False)
class RequestOutput:
    """The answers to one prompt, sorted by index.

    `prompt_token_ids` are the expanded ids (every media token shown). `prompt_logprobs` has one entry per prompt token,
    the first None. `num_cached_tokens` counts prompt tokens whose keys and values were found in the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    lora_request: Any = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    num_cached_tokens: int | None = None
    kv_transfer_params: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return (
            f"RequestOutput(request_id={self.request_id!r}, prompt={self.prompt!r}, "
            f"prompt_token_ids={_brief(self.prompt_token_ids)}, outputs={self.outputs!r}, finished={self.finished}, "
            f"num_cached_tokens={self.num_cached_tokens})"
        )


@dataclass(repr=False)
class EmbeddingOutput:
    """One vector for a prompt."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)

    def __repr__(self) -> str:
        return f"EmbeddingOutput(hidden_size={self.hidden_size})"


@dataclass
class PoolingOutput:
    """Raw pooled activations, as a NumPy array."""

    data: Any = field(repr=False)


@dataclass(repr=False)
class PoolingRequestOutput:
    """What a pooling model returns for one prompt."""

    request_id: str
    outputs: Any
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(request_id={self.request_id!r}, outputs={self.outputs!r}, "
            f"prompt_token_ids={_brief(self.prompt_token_ids)}, finished={self.finished})"
        )


class EmbeddingRequestOutput(PoolingRequestOutput):
    """`PoolingRequestOutput` whose `outputs` is an `EmbeddingOutput`."""

    outputs: EmbeddingOutput


@dataclass(repr=False)
class ScoringOutput:
    """How alike two prompts are: the cosine of their vectors."""

    score: float

    def __repr__(self) -> str:
        return f"ScoringOutput(score={self.score})"


class ScoringRequestOutput(PoolingRequestOutput):
    """`PoolingRequestOutput` whose `outputs` is a `ScoringOutput`."""

    outputs: ScoringOutput
