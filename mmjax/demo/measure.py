"""`mmjax demo --eval`: how often the shipped model is right about what it has never seen or heard, skill by skill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mmjax.demo import DIRECTORY, ask, heldout

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
LONGEST = 40  # tokens of an answer: a description of four things has 20


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one skill. answers: one per question; error_rate: of words, where a recording was to be written down."""

    skill: str
    questions: Sequence[heldout.Question]
    answers: Sequence[str]

    @property
    def right(self) -> float:
        """Share of right answers."""
        pairs = zip(self.questions, self.answers, strict=True)
        return sum(ask.correct(one.asked, told) for one, told in pairs) / len(self.questions)

    @property
    def error_rate(self) -> float | None:
        """Wrong, missing and added words by those spoken, of digits."""
        if self.skill != "digits":
            return None
        said = [one.asked.answer for one in self.questions]
        wrong = sum(ask.word_errors(*pair) for pair in zip(said, self.answers, strict=True))
        return wrong / sum(len(words.split()) for words in said)


def load() -> Any:
    """The packaged model with room for many questions at once."""
    from mmjax.entrypoints.llm import LLM

    return LLM(str(DIRECTORY), max_model_len=512, max_num_batched_tokens=512, max_num_seqs=16, enforce_eager=True)


def measure(count: int, tell: Callable[[str], None], llm: Any = None) -> list[Score]:
    """Ask `count` questions of every skill through mmjax."""
    from mmjax.types import SamplingParams

    llm = llm or load()
    params = SamplingParams(temperature=0.0, max_tokens=LONGEST)
    scores = []
    for skill in ask.SKILLS:
        questions = heldout.questions(skill, count)
        outputs = llm.generate([one.prompt for one in questions], params, use_tqdm=False)
        scores.append(Score(skill, questions, [output.outputs[0].text for output in outputs]))
        tell(f"{skill}: {scores[-1].right:.1%} of {len(questions)}")
    return scores


def table(scores: Sequence[Score]) -> str:
    """Markdown."""
    rows = ["| skill | for example | questions | right |", "|---|---|---|---|"]
    for score in scores:
        example = score.questions[0].asked
        told = f"{example.question} {example.answer}"
        rows.append(f"| {MEANINGS[score.skill]} | {told} | {len(score.questions)} | {score.right:.1%} |")
        if score.error_rate is not None:
            rows.append(f"| word error rate of digits | | {len(score.questions)} | {score.error_rate:.1%} |")
    return "\n".join(rows)
