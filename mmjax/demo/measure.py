"""`mmjax demo --eval`: the accuracy of the demo model on questions outside of its training set, by skill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mmjax.demo import DIRECTORY, ask, heldout

if TYPE_CHECKING:
    from mmjax.entrypoints.llm import LLM

MEANINGS = {
    "color": "colour of a shape",
    "shape": "shape of a colour",
    "count": "count",
    "exists": "whether there is one",
    "where": "left, right, above, below",
    "describe": "describe a picture in a sentence",
    "compare": "compare two pictures",
    "motion": "what moves, and which way",
    "digits": "spoken digits, all of a recording",
    "words": "spoken words",
}
MAX_TOKENS = 40  # of an answer: a description of four things has 20


@dataclasses.dataclass(frozen=True)
class Score:
    """The answers to the questions of one skill."""

    skill: str
    questions: Sequence[heldout.MediaQuestion]
    answers: Sequence[str]

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        pairs = zip(self.questions, self.answers, strict=True)
        return sum(ask.correct(question.qa, answer) for question, answer in pairs) / len(self.questions)

    @property
    def word_error_rate(self) -> float | None:
        """Wrong, missing and added words per spoken word; of digits only."""
        if self.skill != "digits":
            return None
        references = [question.qa.answer for question in self.questions]
        errors = sum(ask.word_errors(*pair) for pair in zip(references, self.answers, strict=True))
        return errors / sum(len(reference.split()) for reference in references)


def load() -> LLM:
    """The demo model, for many questions at once."""
    from mmjax.entrypoints.llm import LLM

    return LLM(str(DIRECTORY), max_model_len=512, max_num_batched_tokens=512, max_num_seqs=16, enforce_eager=True)


def measure(count: int, log: Callable[[str], None], llm: LLM | None = None) -> list[Score]:
    """Ask the model `count` questions of every skill."""
    from mmjax.types import SamplingParams

    llm = llm or load()
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    scores = []
    for skill in ask.SKILLS:
        questions = heldout.questions(skill, count)
        outputs = llm.generate([question.prompt for question in questions], params, use_tqdm=False)
        scores.append(Score(skill, questions, [output.outputs[0].text for output in outputs]))
        log(f"{skill}: {scores[-1].accuracy:.1%} of {len(questions)}")
    return scores


def table(scores: Sequence[Score]) -> str:
    """The scores as a table in Markdown."""
    rows = ["| skill | for example | questions | right |", "|---|---|---|---|"]
    for score in scores:
        example = f"{score.questions[0].qa.question} {score.questions[0].qa.answer}"
        rows.append(f"| {MEANINGS[score.skill]} | {example} | {len(score.questions)} | {score.accuracy:.1%} |")
        if score.word_error_rate is not None:
            rows.append(f"| word error rate of digits | | {len(score.questions)} | {score.word_error_rate:.1%} |")
    return "\n".join(rows)
