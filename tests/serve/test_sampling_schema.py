"""A sampling parameter is declared once, as a field of `SamplingParams`: every other place that has it agrees."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from mmjax.serve import sampling_schema

from engine_inputs import greedy
from mmjax import SamplingParams
from mmjax.engine.batch_builder import build_decode
from mmjax.engine.buckets import BucketConfig
from mmjax.engine.sampler import SamplingMetadata
from mmjax.engine.sampling_state import SAMPLING_FIELDS, SamplingState
from mmjax.engine.sequence import EnginePrompt, EngineSequence
from mmjax.types import SAMPLING_PARAMETERS, SamplingParameter, ValidationError
from mmjax.types.sampling import Bounds

Json = dict[str, Any]
DEVICE = {name: parameter for name, parameter in SAMPLING_PARAMETERS.items() if parameter.dtype is not None}
BUCKETS = BucketConfig(
    token_buckets=(16,), seq_buckets=(4,), encoder_buckets={}, num_mm_rows=1, q_block_size=8, block_size=16,
    max_blocks_per_seq=2, cross_blocks_per_seq=0, rope_axes=1, num_rows=5, max_stop_ids=2, num_decode_steps=1,
    max_logprobs=0,
)  # fmt: skip
# what no request can send, and how OpenAI's routes have their own fields for some parameters
NOT_SENT = {"output_kind"}
OWN_FIELDS = {
    "CompletionRequest": {"max_tokens", "detokenize", "extra_args"},  # 0 is allowed beside `echo`
    "ChatRequest": {"logprobs", "detokenize", "extra_args"},
    "ResponsesRequest": {"n", "max_tokens", "logprobs", "prompt_logprobs", "detokenize", "extra_args"},
}


@pytest.fixture(scope="module")
def published(client: TestClient) -> dict[str, Json]:
    """The fields of each body that takes sampling parameters, from the description of the API."""
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    nested = schemas["GenerateRequest"]["properties"]["sampling_params"]["anyOf"]
    [generate] = [option for option in nested if option["type"] == "object"]
    bodies = {name: schemas[name]["properties"] for name in OWN_FIELDS}
    return {**bodies, "GenerateRequest": generate["properties"]}


def missing_from_api(parameter: SamplingParameter, published: dict[str, Json]) -> Iterator[str]:
    """Each body that should have the parameter, and has not, or describes it differently."""
    meaning = f"{parameter.help[0].upper()}{parameter.help[1:]}."
    for body, fields in published.items():
        if parameter.name in NOT_SENT | OWN_FIELDS.get(body, set()):
            continue
        field = fields.get(parameter.name, {})
        limits = [option for option in (field, *field.get("anyOf", ())) if option.get("type") in ("integer", "number")]
        bounds = parameter.bounds or Bounds("anything")
        keywords = {
            "minimum": bounds.minimum, "maximum": bounds.maximum, "exclusiveMinimum": bounds.exclusive_minimum,
        }  # fmt: skip
        expected = {keyword: limit for keyword, limit in keywords.items() if abs(limit) != float("inf")}
        if field.get("description") != meaning or not all(expected.items() <= each.items() for each in limits):
            yield body


def missing_from_device(parameter: SamplingParameter) -> Iterator[str]:
    """Each structure on the way to the sampler that should have the parameter, and has not."""
    if parameter.dtype is None:
        return
    pair = (parameter.name, parameter.dtype)
    if pair not in SAMPLING_FIELDS:
        yield "SAMPLING_FIELDS"
    layouts = {2: BUCKETS.prefill_layout(16), 4: BUCKETS.decode_layout(4)}
    if any((parameter.name, (seqs,), parameter.dtype) not in layout.fields for seqs, layout in layouts.items()):
        yield "PackedLayout"
    if parameter.name not in SamplingState(5, 2, 0).fields:
        yield "SamplingState"
    if parameter.name not in {field.name for field in dataclasses.fields(SamplingMetadata)}:
        yield "SamplingMetadata"


@pytest.mark.parametrize("name", SAMPLING_PARAMETERS)
def test_declared_parameter_is_everywhere(name: str, published: dict[str, Json]) -> None:
    parameter = SAMPLING_PARAMETERS[name]
    assert parameter.help and parameter.default == SamplingParams.__dataclass_fields__[name].default
    assert list(missing_from_api(parameter, published)) == []
    assert list(missing_from_device(parameter)) == []


def test_parameter_that_is_missing_is_found(published: dict[str, Json]) -> None:
    """The checks above fail for a parameter that no place has."""
    planted = SamplingParameter("new", float, 0.0, "a new parameter", None, "f32", 0.0)
    assert list(missing_from_api(planted, published)) == [*OWN_FIELDS, "GenerateRequest"]
    assert list(missing_from_device(planted)) == [
        "SAMPLING_FIELDS", "PackedLayout", "SamplingState", "SamplingMetadata",
    ]  # fmt: skip


def test_new_declaration_becomes_a_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """A declaration is all that a body needs."""
    planted = SamplingParameter("new", float, 0.0, "a new parameter", Bounds("in [0, 1]", 0, 1), None, None)
    monkeypatch.setattr(sampling_schema, "SAMPLING_PARAMETERS", {**SAMPLING_PARAMETERS, "new": planted})
    json_type, field = sampling_schema.sampling_fields({"new"})["new"]
    assert type(None) in json_type.__args__
    assert field.default is None and field.description == "A new parameter."


def test_values_and_padding_of_a_packed_batch() -> None:
    """A row has its request's values; padding rows have every parameter off."""
    values = {name: 0.5 if parameter.dtype == "f32" else 7 for name, parameter in DEVICE.items()}
    seq = EngineSequence(
        0,
        EnginePrompt(np.arange(5, dtype=np.int32), np.zeros((1, 5), np.int32), 0),
        SamplingParams(**values),  # type: ignore[arg-type]
        max_model_len=32,
    )
    seq.row, seq.num_scheduled = 1, 6
    state = SamplingState(BUCKETS.num_rows, BUCKETS.max_stop_ids, 0)
    state.set(seq, 0)
    seqs, vector = build_decode(BUCKETS, [(seq, 1)], state, np.zeros((5, 2), np.int32))
    fields = BUCKETS.decode_layout(seqs).views(vector)
    for name, parameter in DEVICE.items():
        np.testing.assert_array_equal(fields[name], [values[name], *[parameter.off] * 3])


def test_bounds_are_those_of_the_checks() -> None:
    """Just outside its bounds each number is refused, in the words of its declaration."""
    for name, parameter in SAMPLING_PARAMETERS.items():
        if (bounds := parameter.bounds) is None:
            continue
        step = 1 if parameter.number is int else 0.25
        outside = {bounds.minimum - step, bounds.maximum + step, bounds.exclusive_minimum}
        for value in (value for value in outside if abs(value) != float("inf")):
            with pytest.raises(ValidationError, match="must be") as caught:
                SamplingParams(**{name: value})
            assert caught.value.parameter == name and bounds.rule in str(caught.value)


def test_greedy_has_truncations_off() -> None:
    params = greedy(top_p=0.5, top_k=7, min_p=0.5)
    assert all(getattr(params, name) == SAMPLING_PARAMETERS[name].off for name in ("top_p", "top_k", "min_p"))
