"""Outputs conform to a schema, a regex, a choice or a grammar, whatever the model prefers."""

import json
import re

import pytest

pytest.importorskip("llguidance")

from mmjax import LLM, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
PROMPT = "Say something"


def structured(tokens: int = 60, **constraint: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, structured_outputs=constraint)


def texts(llm: LLM, *params: SamplingParams) -> list[str]:
    outputs = llm.generate([PROMPT] * len(params), list(params), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def test_every_constraint_beside_unconstrained_requests(qwen: LLM) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    alone = texts(qwen, free)[0]
    schema, regex, choice, grammar, beside = texts(
        qwen,
        structured(json=SCHEMA, disable_any_whitespace=True),
        structured(regex=r"[a-c]{3}-[0-9]{2}"),
        structured(choice=["red", "green apple"]),
        structured(grammar='start: "x" /[yz]/ "!"'),
        free,
    )
    value = json.loads(schema)
    assert set(value) == {"n", "ok"} and 0 <= value["n"] <= 99 and isinstance(value["ok"], bool)
    assert re.fullmatch(r"[a-c]{3}-[0-9]{2}", regex)
    assert choice in ("red", "green apple")
    assert re.fullmatch(r"x[yz]!", grammar)
    assert beside == alone


def test_each_output_of_a_request_has_its_own_state(qwen: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.5, top_k=-1, top_p=1.0, seed=1, max_tokens=40,
                            structured_outputs={"regex": r"[a-z]{2,5}\.[0-9]{1,3}"})  # fmt: skip
    answers = [answer.text for answer in qwen.generate(PROMPT, params, use_tqdm=False)[0].outputs]
    assert all(re.fullmatch(r"[a-z]{2,5}\.[0-9]{1,3}", answer) for answer in answers), answers
    assert len(set(answers)) > 1


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ({}, "exactly one of"),
        ({"json": {}, "regex": "a"}, "exactly one of"),
        ({"regex": "("}, "cannot be"),
        ({"json": "{"}, "cannot be read"),
        ({"json": {"type": "nonsense"}}, "cannot be followed"),
        ({"choice": []}, "list of strings"),
        ({"choice": "red"}, "list of strings"),
        ({"grammar": "start: %"}, "cannot be"),
        ("json", "dictionary"),
    ],
)
def test_refusals(qwen: LLM, constraint: object, words: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, structured_outputs=constraint)
    with pytest.raises(ValueError, match=words):
        qwen.generate(PROMPT, params, use_tqdm=False)
    assert texts(qwen, structured(choice=["yes"])) == ["yes"]
