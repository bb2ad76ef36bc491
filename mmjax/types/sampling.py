"""The sampling parameters of a request, each declared once, and their checks."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import numbers
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from mmjax.types.errors import ValidationError

T = TypeVar("T")

MAX_N = 16384  # a request for more outputs per prompt is a mistake or an attack
MIN_TEMPERATURE = 0.01  # below it logits / temperature leaves float32's useful range
MAX_BIAS = 100.0
MAX_FLOAT = 3.4e38  # close to the largest float32, in which the device computes

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
    """What each output of a running request contains."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # nothing until the end


@dataclass(frozen=True)
class Bounds:
    """The range of a number, and the same in words: an error message says that the parameter "must be" `rule`."""

    rule: str
    minimum: float = -float("inf")
    maximum: float = float("inf")
    exclusive_minimum: float = -float("inf")

    def __contains__(self, value: float) -> bool:
        return self.minimum <= value <= self.maximum and value > self.exclusive_minimum


@dataclass(frozen=True)
class SamplingParameter:
    """One field of `SamplingParams`: what the HTTP API, its description, the documentation and the engine know of it.

    type: of its value. help: its meaning. bounds: of a number. dtype: of its values in a packed batch, if the sampler
    reads them there. off: the value with which it changes nothing.
    """

    name: str
    type: Any
    default: Any
    help: str
    bounds: Bounds | None
    dtype: Literal["f32", "i32"] | None
    off: float | None

    @functools.cached_property
    def is_optional(self) -> bool:
        return type(None) in typing.get_args(self.type)

    @functools.cached_property
    def number(self) -> type[int] | type[float] | None:
        """int or float if the value is a number, or a number or None."""
        for number in (int, float):
            if self.type in (number, number | None):
                return number
        return None


def sampling_parameter(
    default: T,
    help: str,
    *,
    bounds: Bounds | None = None,
    dtype: Literal["f32", "i32"] | None = None,
    off: float | None = None,
) -> T:
    """Declares a field of `SamplingParams`; the arguments are those of `SamplingParameter`."""
    field: Any = dataclasses.field(
        default=default, metadata={"help": help, "bounds": bounds, "dtype": dtype, "off": off}
    )
    return field


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
    """How to sample the output of one request. Field names, order and defaults are vLLM's, so code written for it keeps
    working. `SAMPLING_PARAMETERS` says what each field means.

    Raises ValidationError (a ValueError) for an unusable value, TypeError for an unknown keyword.
    """

    n: int = sampling_parameter(1, "outputs for each prompt", bounds=Bounds("at least 1", minimum=1))
    presence_penalty: float = sampling_parameter(
        0.0,
        "subtracted from the logit of each token that the output contains; 0 is off",
        bounds=Bounds("in [-2, 2]", minimum=-2, maximum=2),
        dtype="f32",
        off=0.0,
    )
    frequency_penalty: float = sampling_parameter(
        0.0,
        "subtracted from a token's logit for each time that the output contains the token; 0 is off",
        bounds=Bounds("in [-2, 2]", minimum=-2, maximum=2),
        dtype="f32",
        off=0.0,
    )
    repetition_penalty: float = sampling_parameter(
        1.0,
        "divides the positive logits of tokens that the prompt or the output contains, and multiplies their negative "
        "ones; 1 is off",
        bounds=Bounds("greater than zero", exclusive_minimum=0),
        dtype="f32",
        off=1.0,
    )
    temperature: float = sampling_parameter(
        1.0,
        "divides the logits; 0 is greedy sampling, for which `top_p`, `top_k` and `min_p` are off",
        bounds=Bounds("non-negative", minimum=0),
        dtype="f32",
        off=0.0,
    )
    top_p: float = sampling_parameter(
        1.0,
        "sample from the fewest most likely tokens whose probabilities add up to this; 1 is off",
        bounds=Bounds("in (0, 1]", exclusive_minimum=0, maximum=1),
        dtype="f32",
        off=1.0,
    )
    top_k: int = sampling_parameter(
        0,
        "sample from this many of the most likely tokens; 0 or -1 is off",
        bounds=Bounds("0 or -1 (disabled), or at least 1", minimum=-1),
        dtype="i32",
        off=0,
    )
    min_p: float = sampling_parameter(
        0.0,
        "exclude tokens whose probability is less than this fraction of the most likely token's; 0 is off",
        bounds=Bounds("in [0, 1]", minimum=0, maximum=1),
        dtype="f32",
        off=0.0,
    )
    seed: int | None = sampling_parameter(
        None, "seed of the random numbers; unset or -1: derived from the engine's `seed`, differently for each request"
    )
    stop: str | list[str] | None = sampling_parameter(None, "a string, or a list of strings, that ends the output")
    stop_token_ids: list[int] | None = sampling_parameter(None, "token ids that end the output")
    ignore_eos: bool = sampling_parameter(False, "continue after an end-of-sequence token")
    max_tokens: int | None = sampling_parameter(
        16,
        "most tokens of the output; unset: as many as the model's length allows",
        bounds=Bounds("at least 1", minimum=1),
    )
    min_tokens: int = sampling_parameter(
        0,
        "tokens before a stop string, a stop token or an end-of-sequence token can end the output",
        bounds=Bounds("greater than or equal to 0", minimum=0),
    )
    logprobs: int | None = sampling_parameter(
        None,
        "return the log-probabilities of the sampled token and of this many most likely tokens; -1 is the whole "
        "vocabulary",
        bounds=Bounds("non-negative or -1", minimum=-1),
    )
    prompt_logprobs: int | None = sampling_parameter(
        None,
        "return the log-probabilities of each token of the prompt and of this many most likely tokens in its place; "
        "-1 is the whole vocabulary",
        bounds=Bounds("non-negative or -1", minimum=-1),
    )
    detokenize: bool = sampling_parameter(True, "return the output as text, not as token ids only")
    skip_special_tokens: bool = sampling_parameter(True, "leave special tokens out of the text")
    spaces_between_special_tokens: bool = sampling_parameter(
        True, "separate special tokens from each other in the text with spaces"
    )
    include_stop_str_in_output: bool = sampling_parameter(False, "keep the stop string at the end of the text")
    output_kind: RequestOutputKind = sampling_parameter(
        RequestOutputKind.CUMULATIVE,
        "what each output of a running request contains: all so far, only what is new, or nothing until the end",
    )
    structured_outputs: Any = sampling_parameter(
        None,
        "the form of the output: an object with one of `json` (a schema), `json_object`, `regex`, `choice` and "
        "`grammar` (in Lark's syntax)",
    )
    logit_bias: dict[int, float] | None = sampling_parameter(
        None, "values to add to the logits, by token id; each is clamped to [-100, 100]"
    )
    allowed_token_ids: list[int] | None = sampling_parameter(None, "the only token ids that may be sampled")
    extra_args: dict[str, Any] | None = sampling_parameter(None, "accepted; nothing reads it")
    bad_words: list[str] | None = sampling_parameter(None, "strings that must not occur in the output")

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
        self._check_ids()
        if 0 < self.temperature < MIN_TEMPERATURE:
            warnings.warn(
                f"temperature {self.temperature} is too small to compute with; using {MIN_TEMPERATURE}", stacklevel=3
            )
            self.temperature = MIN_TEMPERATURE
        if self.greedy:
            _require(self.n == 1, "n", self.n, "1 when using greedy sampling")
            for name in TRUNCATIONS:
                setattr(self, name, SAMPLING_PARAMETERS[name].off)

    def _check_numbers(self) -> None:
        for name, parameter in NUMBERS.items():
            value = getattr(self, name)
            if value is None and parameter.is_optional:
                continue
            check = _integer if parameter.number is int else _number
            check(name, value)
            if parameter.bounds is not None:
                _require(value in parameter.bounds, name, value, parameter.bounds.rule)
        _require(self.n <= MAX_N, "n", self.n, f"at most {MAX_N}")
        if self.max_tokens is not None:
            rule = f"less than or equal to max_tokens={self.max_tokens}"
            _require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, rule)

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

    @property
    def has_penalties(self) -> bool:
        return any(getattr(self, name) != SAMPLING_PARAMETERS[name].off for name in PENALTIES)

    def clone(self) -> SamplingParams:
        """A copy that shares no mutable state, except what is inside `structured_outputs` and `extra_args`."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (list, dict)):
                setattr(twin, name, copy.copy(value))
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
            count = vocab_size if value == -1 else value
            if count is not None and count > limit:
                raise ValidationError(
                    f"Requested {what} logprobs of {count}, which is greater than max allowed: {limit}",
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


TRUNCATIONS = ("top_p", "top_k", "min_p")
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


def _parameters() -> Mapping[str, SamplingParameter]:
    types = typing.get_type_hints(SamplingParams)
    return MappingProxyType(
        {
            field.name: SamplingParameter(field.name, types[field.name], field.default, **field.metadata)
            for field in dataclasses.fields(SamplingParams)
        }
    )


SAMPLING_PARAMETERS = _parameters()
"""Every field of `SamplingParams`, by its name."""

NUMBERS = {name: parameter for name, parameter in SAMPLING_PARAMETERS.items() if parameter.number is not None}


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
    """How to compute the embedding of one request. dimensions: return only this many leading entries of the vector
    (None = all). use_activation: normalize the vector (None = as the model does by default). Raises ValidationError.
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
