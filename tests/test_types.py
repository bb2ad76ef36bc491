"""The public types: defaults, every rejected value and its message, and the repr of outputs."""

import copy
import pickle
import subprocess
import sys

import pytest

from mmjax.types import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    PoolingOutput,
    PoolingParams,
    PoolingRequestOutput,
    RequestError,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    TextPrompt,
    TokensPrompt,
    ValidationError,
    VLLMValidationError,
)


def test_import_is_light():
    """Every client imports these dataclasses, so the import must be fast."""
    code = "import sys, mmjax.types; print(sorted({'jax', 'transformers', 'torch', 'flax'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_errors_are_value_errors_with_codes():
    error = RequestError("no", "too_many_items")
    assert isinstance(error, ValueError) and error.code == "too_many_items" and str(error) == "no"
    assert RequestError("no").code == "invalid_request"
    assert VLLMValidationError is ValidationError and issubclass(ValidationError, RequestError)


def test_validation_error_names_parameter_and_value():
    assert str(ValidationError("bad", parameter="top_p", value=2)) == "bad (parameter=top_p, value=2)"
    assert str(ValidationError("bad", parameter="top_p")) == "bad (parameter=top_p)"
    assert str(ValidationError("bad")) == "bad"
    twin = pickle.loads(pickle.dumps(ValidationError("bad", parameter="n", value=0)))
    assert (twin.parameter, twin.value, str(twin)) == ("n", 0, "bad (parameter=n, value=0)")


def test_defaults():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p, p.max_tokens, p.min_tokens) == (1, 1.0, 1.0, 0, 0.0, 16, 0)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty, p.seed) == (0.0, 0.0, 1.0, None)
    assert p.stop == [] and p.stop_token_ids == [] and p.bad_words == []
    assert p.detokenize and p.skip_special_tokens and p.spaces_between_special_tokens
    assert not p.ignore_eos and not p.include_stop_str_in_output and not p.greedy
    assert (p.logprobs, p.prompt_logprobs, p.logit_bias, p.allowed_token_ids) == (None, None, None, None)
    assert p.output_kind is RequestOutputKind.CUMULATIVE


def test_positional_and_unknown_arguments():
    assert SamplingParams(2, 0.5).presence_penalty == 0.5
    for name in ("best_of", "max_new_tokens", "use_beam_search"):
        with pytest.raises(TypeError, match=name):
            SamplingParams(**{name: 1})


REJECTED = [
    ("n", 0, "at least 1"),
    ("n", 16385, "at most 16384"),
    ("n", 1.5, "an integer"),
    ("n", True, "an integer"),
    ("presence_penalty", 2.1, r"in \[-2, 2\]"),
    ("presence_penalty", -2.1, r"in \[-2, 2\]"),
    ("frequency_penalty", 3, r"in \[-2, 2\]"),
    ("frequency_penalty", "1", "finite number"),
    ("repetition_penalty", 0, "greater than zero"),
    ("repetition_penalty", float("inf"), "finite number"),
    ("temperature", -0.1, "non-negative"),
    ("temperature", float("nan"), "finite number"),
    ("temperature", None, "finite number"),
    ("top_p", 0, r"in \(0, 1\]"),
    ("top_p", 1.01, r"in \(0, 1\]"),
    ("top_k", -2, "disabled"),
    ("top_k", 1.0, "an integer"),
    ("min_p", -0.1, r"in \[0, 1\]"),
    ("min_p", 1.1, r"in \[0, 1\]"),
    ("seed", 1.5, "an integer"),
    ("stop", "", "empty string"),
    ("stop", ["a", ""], "empty string"),
    ("stop", [1], "only strings"),
    ("stop", 5, "list of strings"),
    ("stop_token_ids", [1, "2"], "only integers"),
    ("stop_token_ids", 7, "list of integers"),
    ("max_tokens", 0, "at least 1"),
    ("max_tokens", 2.5, "an integer"),
    ("min_tokens", -1, "greater than or equal to 0"),
    ("min_tokens", 17, "less than or equal to max_tokens=16"),
    ("logprobs", -2, "non-negative or -1"),
    ("logprobs", 1.5, "an integer"),
    ("prompt_logprobs", -2, "non-negative or -1"),
    ("bad_words", [""], "empty string"),
    ("allowed_token_ids", [], "empty"),
    ("allowed_token_ids", ["a"], "only integers"),
    ("logit_bias", {"x": 1}, "token ids"),
    ("logit_bias", {1: "heavy"}, "finite number"),
]


@pytest.mark.parametrize(("name", "value", "message"), REJECTED)
def test_rejected_values(name, value, message):
    with pytest.raises(ValidationError, match=message) as caught:
        SamplingParams(**{name: value})
    assert caught.value.parameter == name
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        dict(n=16384),
        dict(presence_penalty=-2, frequency_penalty=2.0),
        dict(top_k=-1),
        dict(top_p=1e-9, min_p=1),
        dict(max_tokens=None, min_tokens=1000),
        dict(min_tokens=16),
        dict(logprobs=-1, prompt_logprobs=0),
        dict(structured_outputs={"json": {}}, extra_args={"a": 1}),
    ],
)
def test_accepted_values(given):
    params = SamplingParams(**given)
    assert {name: getattr(params, name) for name in given} == given


def test_stop_needs_text():
    with pytest.raises(ValidationError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_values_are_normalized():
    p = SamplingParams(stop="x", seed=-1, logprobs=True, logit_bias={"5": 1000, 6: -1000}, stop_token_ids=(3,))
    assert p.stop == ["x"] and p.seed is None and p.logprobs == 1 and p.stop_token_ids == [3]
    assert p.logit_bias == {5: 100.0, 6: -100.0}


def test_greedy_turns_truncation_off():
    p = SamplingParams(temperature=0, top_p=0.5, top_k=7, min_p=0.1)
    assert p.greedy and (p.top_p, p.top_k, p.min_p) == (1.0, 0, 0.0)
    with pytest.raises(ValidationError, match="1 when using greedy"):
        SamplingParams(temperature=0, n=2)


def test_tiny_temperature_is_raised_with_a_warning():
    with pytest.warns(UserWarning, match="too small"):
        assert SamplingParams(temperature=0.001).temperature == 0.01


def test_clone_shares_no_lists():
    p = SamplingParams(stop=["a"], logit_bias={1: 2.0}, allowed_token_ids=[1])
    twin = p.clone()
    assert twin == p
    twin.stop.append("b")
    twin.logit_bias[3] = 1.0
    twin.max_tokens = 5
    assert p.stop == ["a"] and p.logit_bias == {1: 2.0} and p.max_tokens == 16
    assert copy.deepcopy(p) == p


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(logprobs=21), "sample logprobs of 21"),
        (dict(prompt_logprobs=21), "prompt logprobs of 21"),
        (dict(logprobs=-1), "sample logprobs of 100"),
        (dict(logit_bias={100: 1}), "out-of-vocab"),
        (dict(logit_bias={-1: 1}), "out-of-vocab"),
        (dict(allowed_token_ids=[3, 100]), "out-of-vocab"),
    ],
)
def test_verify_rejects(given, message):
    params = SamplingParams(**given)
    with pytest.raises(ValidationError, match=message) as caught:
        params.verify(vocab_size=100, max_logprobs=20)
    assert caught.value.parameter == next(iter(given))


def test_verify_accepts_and_checks_later_assignments():
    params = SamplingParams(logprobs=-1, prompt_logprobs=100, logit_bias={99: 1}, allowed_token_ids=[0, 99])
    params.verify(vocab_size=100, max_logprobs=-1)
    params.temperature, params.top_k = 0, 5
    params.verify(vocab_size=100, max_logprobs=-1)
    assert params.top_k == 0
    params.max_tokens = 0
    with pytest.raises(ValidationError, match="at least 1"):
        params.verify(vocab_size=100, max_logprobs=-1)


def test_generation_config_overlays_the_defaults():
    config = dict(
        temperature=0.01, top_p=None, top_k=50, max_new_tokens=7, repetition_penalty=1.05, eos_token_id=[1, 2]
    )
    expected = SamplingParams(temperature=0.01, top_k=50, max_tokens=7, repetition_penalty=1.05)
    assert SamplingParams.from_generation_config(config) == expected
    assert SamplingParams.from_generation_config({}) == SamplingParams()


def test_pooling_params():
    assert PoolingParams().dimensions is None
    assert PoolingParams(dimensions=5).clone() == PoolingParams(dimensions=5)
    for bad in (0, 1.5):
        with pytest.raises(ValidationError, match="dimensions"):
            PoolingParams(dimensions=bad)


def test_prompts_are_dictionaries():
    assert TextPrompt(prompt="a", multi_modal_data={"image": None}) == {
        "prompt": "a",
        "multi_modal_data": {"image": None},
    }
    assert TokensPrompt(prompt_token_ids=[1]) == {"prompt_token_ids": [1]}


def test_output_reprs_are_short():
    answer = CompletionOutput(0, "hi", list(range(1000)))
    assert not answer.finished() and "1000 in all" in repr(answer)
    answer.finish_reason = "length"
    assert answer.finished()
    whole = RequestOutput("0", "p", [1, 2], None, [answer], True)
    assert "request_id='0'" in repr(whole) and "[1, 2]" in repr(whole) and len(repr(whole)) < 600
    assert Logprob(-1.0) == Logprob(-1.0, None, None)


def test_embedding_outputs():
    output = EmbeddingRequestOutput("3", EmbeddingOutput([0.5] * 8), [1])
    assert output.outputs.hidden_size == 8 and output.finished
    assert repr(output).startswith("EmbeddingRequestOutput(request_id='3', outputs=EmbeddingOutput(hidden_size=8)")
    assert isinstance(output, PoolingRequestOutput)
    assert repr(PoolingOutput([1.0] * 99)) == "PoolingOutput()"


def test_time_in_queue():
    assert RequestMetrics(1.0).time_in_queue is None
    assert RequestMetrics(1.0, first_scheduled_time=1.5).time_in_queue == 0.5
