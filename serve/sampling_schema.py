"""The sampling parameters as fields of request bodies, derived from the declarations in `SamplingParams`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any

from mmjax.serve.published_types import NonEmptyString, StructuredOutputs, TokenId
from pydantic import ConfigDict, Field, WithJsonSchema, create_model

from mmjax.types import SAMPLING_PARAMETERS, SamplingParameter

PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
LogitBias = Annotated[
    dict[str, float],
    WithJsonSchema(
        {"type": "object", "propertyNames": {"pattern": "^[0-9]+$"}, "additionalProperties": {"type": "number"}}
    ),
]

# Where JSON has another type than Python, or a request body refuses what `SamplingParams` would refuse later.
JSON_TYPES: Mapping[str, Any] = MappingProxyType(
    {
        "n": PositiveInt,
        "max_tokens": PositiveInt,
        "seed": Seed,
        "stop": NonEmptyString | list[NonEmptyString],
        "bad_words": list[NonEmptyString],
        "allowed_token_ids": list[TokenId],
        "logit_bias": LogitBias,
        "structured_outputs": StructuredOutputs,
    }
)

# A new parameter is in all of these.
OF_GENERATE = SAMPLING_PARAMETERS.keys() - {"output_kind"}  # POST /generate answers once, when all is done
OF_COMPLETIONS = OF_GENERATE - {"logprobs", "detokenize", "extra_args"}  # OpenAI's `logprobs` differ by route
OF_RESPONSES = OF_COMPLETIONS - {"n", "max_tokens", "prompt_logprobs"}  # one output; its limit is max_output_tokens
OF_SPEECH = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty",
        "include_stop_str_in_output",
    }
)  # fmt: skip


def description(name: str) -> str:
    """The meaning of a parameter, as a sentence."""
    meaning = SAMPLING_PARAMETERS[name].help
    return f"{meaning[0].upper()}{meaning[1:]}."


def sampling_fields(names: Iterable[str], defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Fields for `pydantic.create_model`. Those without a default are None: the model's default then applies."""
    return {
        name: (
            _json_type(parameter, is_optional=defaults.get(name) is None or parameter.is_optional),
            Field(defaults.get(name), description=description(name)),
        )
        for name, parameter in SAMPLING_PARAMETERS.items()
        if name in names
    }


def _json_type(parameter: SamplingParameter, *, is_optional: bool) -> Any:
    """The type of a parameter's field. Bounds are published, but not checked: `SamplingParams` does that."""
    json_type: Any = JSON_TYPES.get(parameter.name, parameter.type)
    if parameter.number is not None and parameter.name not in JSON_TYPES:
        json_type = Annotated[parameter.number, WithJsonSchema(_number_schema(parameter))]
    return json_type | None if is_optional else json_type


def _number_schema(parameter: SamplingParameter) -> dict[str, Any]:
    """The JSON schema of a number within its bounds."""
    schema: dict[str, Any] = {"type": "integer" if parameter.number is int else "number"}
    if (bounds := parameter.bounds) is not None:
        limits = {
            "minimum": bounds.minimum, "maximum": bounds.maximum, "exclusiveMinimum": bounds.exclusive_minimum,
        }  # fmt: skip
        schema |= {keyword: limit for keyword, limit in limits.items() if abs(limit) != float("inf")}
    return schema


SamplingParamsBody = create_model(
    "SamplingParams",
    __config__=ConfigDict(extra="forbid"),
    __doc__="The parameters of `mmjax.SamplingParams`.",
    **sampling_fields(OF_GENERATE, {name: parameter.default for name, parameter in SAMPLING_PARAMETERS.items()}),
)
