"""Tiny checkpoints of every family against recorded completions of transformers.

`test_parity.py` asks transformers again and compares; `published.py` writes the file anew.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_inputs import SMALL, greedy, output_ids
from mmjax import LLM
from mmjax.types import RequestOutput
from models.questions import QUESTIONS
from models.tables import close

FILE = Path(__file__).with_name("recorded.json")
RECORDED: dict[str, dict[str, dict[str, Any]]] = json.loads(FILE.read_text())
CASES = [(family, case) for family, cases in QUESTIONS.items() for case in cases]
LOGPROBS = 2e-4

TOGETHER = ("qwen2_vl", "qwen2_5_omni", "whisper", "minicpmv", "phi3_v", "qwen3_moe")


@pytest.fixture(scope="module")
def outputs(tiny_dir: Callable[[str], Path]) -> Callable[[str, str], RequestOutput]:
    """`outputs(family, case)`: our output; all cases of a family in TOGETHER run at once."""
    made: dict[str, dict[str, RequestOutput]] = {}

    def get(family: str, case: str) -> RequestOutput:
        if family not in made:
            length = {"max_model_len": 64} if family == "whisper" else {}
            llm = LLM(str(tiny_dir(family)), **SMALL | length, enforce_eager=True)
            asked = [question() for question in QUESTIONS[family].values()]
            batches = [asked] if family in TOGETHER else [[one] for one in asked]
            answers = [a for batch in batches for a in llm.generate(batch, greedy(12, logprobs=0), use_tqdm=False)]
            made[family] = dict(zip(QUESTIONS[family], answers, strict=True))
        return made[family][case]

    return get


@pytest.mark.parametrize(("family", "case"), CASES)
def test_output_equals_the_recorded_one(
    outputs: Callable[[str, str], RequestOutput], request: pytest.FixtureRequest, family: str, case: str
) -> None:
    if family in TOGETHER:
        request.getfixturevalue("one_decode_size")
    output, wanted = outputs(family, case), RECORDED[family][case]
    assert output.prompt_token_ids == wanted["prompt_ids"]
    assert output_ids([output]) == [wanted["ids"]]
    entries = output.outputs[0].logprobs
    assert entries is not None
    found = np.array([entry[token].logprob for entry, token in zip(entries, wanted["ids"], strict=True)])
    close(found, np.array(wanted["logprobs"]), LOGPROBS, (family, case))
    assert output.outputs[0].cumulative_logprob == pytest.approx(found.sum(), abs=1e-5)


def test_recorded_outputs_are_decisive() -> None:
    """Every margin is above the tolerance, and no completion repeats one token."""
    for family, case in CASES:
        wanted = RECORDED[family][case]
        assert wanted["gap"] > 50 * LOGPROBS
        assert len(set(wanted["ids"])) >= 5
    assert sorted(RECORDED) == sorted(QUESTIONS)
