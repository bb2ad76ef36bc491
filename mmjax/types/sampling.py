"""How a request wants its tokens chosen, and the checks on it."""

from __future__ import annotations

import copy
import enum
import numbers
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmjax.types.errors import ValidationError

MAX_N = 16384  # more answers than this to one prompt is a mistake or an attack
MIN_TEMPERATURE = 0.01  # below it logits / temperature leaves float32's useful range
MAX_BIAS = 100.0
MAX_FLOAT = 3.4e38  # what the device computes with is no larger

# generation_config.json -> SamplingParams
GENERATION_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


class RequestOutputKind(enum.Enum):
    """What each output of a running request holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # nothing until the end


def _number(name: str, value: Any) -> None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not -MAX_FLOAT <= value <= MAX_FLOAT:
        raise ValidationError(f"{name} must be a finite number, got {value!r}.", parameter=name, value=value)


def _integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValidationError(f"{name} must be an integer, got {type(value).__name__}.", parameter=name, value=value)


def _require(ok: bool, name: str, value: Any, rule: str) -> None:
    if not ok:
        raise ValidationError(f"{name} must be {rule}, got {value}.", parameter=name, value=value)


@dataclass
class SamplingParams:
    """Sampling of one request. Field names, order and defaults are vLLM's, so code written for it keeps working.

    temperature: 0 = greedy, and then `top_p`, `top_k`, `min_p` are reset to "off". top_k: 0 or -1 = off.
    max_tokens: None = as many as the model's length allows. logprobs: how many of the most likely tokens to report
    beside the sampled one; -1 = the whole vocabulary. stop: strings that end the answer. min_tokens: no stop (string,
    stop token or end-of-sequence) happens before so many tokens. bad_words: strings that may not be produced.
    structured_outputs: a dictionary (or object) with one of json (a schema), json_object, regex, choice, grammar.
    extra_args: carried, not interpreted.

    Raises ValidationError (a ValueError) for an unusable value, TypeError for an unknown keyword.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: Any = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    bad_words: list[str] | None = None

    def __post_init__(self) -> None:
        self.stop = _texts("stop", self.stop)
        self.bad_words = _texts("bad_words", self.bad_words)
        self.stop_token_ids = _ids("stop_token_ids", self.stop_token_ids or ())
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:  # the OpenAI spelling of "just the sampled token's best rival"
                setattr(self, name, 1)
        if self.seed == -1:
            self.seed = None
        self._check_numbers()
        self._check_lengths()
        self._check_ids()
        if 0 < self.temperature < MIN_TEMPERATURE:
            warnings.warn(
                f"temperature {self.temperature} is too small to compute with; using {MIN_TEMPERATURE}", stacklevel=3
            )
            self.temperature = MIN_TEMPERATURE
        if self.greedy:
            _require(self.n == 1, "n", self.n, "1 when using greedy sampling")
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0

    def _check_numbers(self) -> None:
        _integer("n", self.n)
        _require(self.n >= 1, "n", self.n, "at least 1")
        _require(self.n <= MAX_N, "n", self.n, f"at most {MAX_N}")
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p"):
            _number(name, getattr(self, name))
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "in [-2, 2]")
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "in [-2, 2]")
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "greater than zero")
        _require(self.temperature >= 0, "temperature", self.temperature, "non-negative")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _integer("top_k", self.top_k)
        _require(self.top_k >= -1, "top_k", self.top_k, "0 or -1 (disabled), or at least 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        if self.seed is not None:
            _integer("seed", self.seed)

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens)
            _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _integer("min_tokens", self.min_tokens)
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "greater than or equal to 0")
        if self.max_tokens is not None:
            rule = f"less than or equal to max_tokens={self.max_tokens}"
            _require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, rule)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _integer(name, value)
                _require(value >= -1, name, value, "non-negative or -1")

    def _check_ids(self) -> None:
        if self.stop and not self.detokenize:
            raise ValidationError(
                "stop strings are only supported when detokenize is True. Set detokenize=True to use stop.",
                parameter="stop",
                value=self.stop,
            )
        if self.logit_bias is not None:
            self.logit_bias = _bias(self.logit_bias)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise ValidationError("allowed_token_ids must not be empty.", parameter="allowed_token_ids", value=[])

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def clone(self) -> SamplingParams:
        """A copy that shares no mutable state, except what `structured_outputs` and `extra_args` hold."""
        twin = copy.copy(self)
        for name in ("stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "extra_args", "bad_words"):
            setattr(twin, name, copy.copy(getattr(self, name)))
        return twin

    def verify(self, vocab_size: int, max_logprobs: int) -> None:
        """Check what depends on the model: token ids in [0, vocab_size), logprobs within the engine's limit.

        `max_logprobs` -1 = no limit. The construction-time checks run again: fields may have been assigned since.
        Raises ValidationError.
        """
        self.__post_init__()
        limit = vocab_size if max_logprobs == -1 else max_logprobs
        for name, what in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
            value = getattr(self, name)
            asked = vocab_size if value == -1 else value
            if asked is not None and asked > limit:
                raise ValidationError(
                    f"Requested {what} logprobs of {asked}, which is greater than max allowed: {limit}",
                    parameter=name,
                    value=value,
                )
        for name in ("logit_bias", "allowed_token_ids"):
            bad = [token for token in getattr(self, name) or () if not 0 <= token < vocab_size]
            if bad:
                raise ValidationError(
                    f"{name} contains out-of-vocab token ids {bad[:8]}. Vocabulary size: {vocab_size}",
                    parameter=name,
                    value=bad[0],
                )

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """The defaults of a model: SamplingParams() overlaid with its generation_config values that are not None."""
        return cls(**{ours: config[key] for key, ours in GENERATION_KEYS.items() if config.get(key) is not None})


def _ids(name: str, value: Any) -> list[int]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ValidationError(f"{name} must be a list of integers, got {value!r}.", parameter=name, value=value)
    ids = list(value)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise ValidationError(f"{name} must contain only integers, got {token!r}.", parameter=name, value=value)
    return [int(token) for token in ids]


def _texts(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        value = [value]
    if value is not None and not isinstance(value, Iterable):
        raise ValidationError(f"{name} must be a list of strings, got {value!r}.", parameter=name, value=value)
    texts = list(value or ())
    for text in texts:
        if not isinstance(text, str):
            raise ValidationError(f"{name} must contain only strings, got {text!r}.", parameter=name, value=value)
        if not text:
            raise ValidationError(f"{name} cannot contain an empty string.", parameter=name, value=value)
    return texts


def _bias(given: Any) -> dict[int, float]:
    """Integer keys (JSON writes them as strings) and values clamped to +-100."""
    if not isinstance(given, Mapping):
        raise ValidationError(
            f"logit_bias must be a dictionary by token id, got {type(given).__name__}.", parameter="logit_bias"
        )
    bias = {}
    for token, value in given.items():
        try:
            key = int(token)
        except (TypeError, ValueError, OverflowError):
            raise ValidationError(
                f"logit_bias keys must be token ids, got {token!r}.", parameter="logit_bias", value=token
            ) from None
        _number("logit_bias", value)
        bias[key] = min(MAX_BIAS, max(-MAX_BIAS, float(value)))
    return bias


@dataclass
class PoolingParams:
    """What a pooling request wants. dimensions: keep only the first so many entries of the vector (None = all).

    use_activation: normalise the vector (None = the model's habit). Raises ValidationError.
    """

    dimensions: int | None = None
    use_activation: bool | None = None
    task: str | None = None
    extra_kwargs: dict[str, Any] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY

    def __post_init__(self) -> None:
        if self.dimensions is not None:
            _integer("dimensions", self.dimensions)
            _require(self.dimensions >= 1, "dimensions", self.dimensions, "at least 1")

    def clone(self) -> PoolingParams:
        return copy.deepcopy(self)
