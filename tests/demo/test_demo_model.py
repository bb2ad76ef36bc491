"""The model that ships, from end to end: right about what training never saw, however it is asked."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mmjax import LLM, AsyncLLM, SamplingParams
from mmjax.demo import ask, heldout, measure, show

GREEDY = SamplingParams(temperature=0.0, max_tokens=measure.MAX_TOKENS)
MIXED = ("describe", "compare", "motion", "digits")


def said(outputs: Any) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def prompts(*skills: str, count: int = 1) -> list[dict[str, Any]]:
    return [one.prompt for skill in skills for one in heldout.questions(skill, count)]


@pytest.fixture(scope="module")
def alone(demo: LLM) -> list[str]:
    """Answers to one question of several kinds, asked one after the other."""
    return [said(demo.generate(prompt, GREEDY, use_tqdm=False))[0] for prompt in prompts(*MIXED)]


def test_a_picture_in_a_conversation(demo: LLM) -> None:
    for question in heldout.questions("describe", 3):
        content = [
            {"type": "image_pil", "image_pil": question.media[0]},
            {"type": "text", "text": question.qa.question},
        ]
        (output,) = demo.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
        assert output.outputs[0].finish_reason == "stop"
        assert ask.correct(question.qa, output.outputs[0].text), (question.qa, output.outputs[0].text)
        assert said(demo.generate(question.prompt, GREEDY, use_tqdm=False)) == [output.outputs[0].text]


def test_text_alone(demo: LLM) -> None:
    for question, answer in ask.TALK.items():
        assert said(demo.chat([{"role": "user", "content": question}], GREEDY, use_tqdm=False)) == [answer]


def test_right_about_most(demo: LLM) -> None:
    scores = {score.skill: score for score in measure.measure(5, lambda text: None, demo)}
    right = sum(score.accuracy for score in scores.values()) / len(scores)
    assert right > 0.95, measure.table(list(scores.values()))
    rate = scores["digits"].word_error_rate
    assert rate is not None and rate < 0.05


def test_together_as_alone(demo: LLM, alone: list[str]) -> None:
    assert said(demo.generate(prompts(*MIXED), GREEDY, use_tqdm=False)) == alone


def test_streamed(demo: LLM, alone: list[str]) -> None:
    served = AsyncLLM(demo)

    async def stream(prompt: Any) -> tuple[str, int]:
        ticket = served.submit(await served.prepare(prompt), GREEDY, streaming=True)
        texts = [delta.text async for delta in served.stream(ticket)]
        return "".join(texts), len(texts)

    async def all_at_once() -> list[tuple[str, int]]:
        return await asyncio.gather(*map(stream, prompts(*MIXED)))

    try:
        got = asyncio.run(all_at_once())
    finally:
        served.close()
    assert [text for text, _ in got] == alone
    assert max(pieces for _, pieces in got) > 1


def test_cached(demo: LLM) -> None:
    """The second time neither the picture nor the beginning of the prompt is computed again."""
    (prompt,) = prompts("compare")
    demo.reset_mm_cache()
    assert demo.reset_prefix_cache()
    before = demo.counters()["mm_cache_hits"]
    (first,) = demo.generate(prompt, GREEDY, use_tqdm=False)
    assert demo.counters()["mm_cache_hits"] == before
    (again,) = demo.generate(prompt, GREEDY, use_tqdm=False)
    assert demo.counters()["mm_cache_hits"] == before + 2
    assert not first.num_cached_tokens and again.num_cached_tokens
    assert said([first]) == said([again])


@pytest.mark.usefixtures("one_decode_size")
def test_on_two_devices(demo: LLM, alone: list[str]) -> None:
    split = LLM(
        "demo",
        tensor_parallel_size=2,
        max_model_len=512,
        max_num_batched_tokens=256,
        max_num_seqs=4,
        enforce_eager=True,
    )
    assert said(split.generate(prompts(*MIXED), GREEDY, use_tqdm=False)) == alone


def test_the_lines_that_are_told(
    demo: LLM, media: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `mmjax demo` prints as Python gives the answer that it gave itself."""
    (picture, *_) = show.make(media, show.SEED)
    monkeypatch.setattr("mmjax.LLM", lambda model, **kwargs: demo)
    exec("\n".join(show.python_lines(picture)), {})
    assert ask.correct(picture.questions[0], capsys.readouterr().out.strip())
