"""AsyncLLM: the engine on a thread of its own, with callers on an event loop."""

import asyncio
from collections.abc import Iterator

import pytest

from mmjax import LLM, AsyncLLM, SamplingParams
from mmjax.entrypoints.async_llm import EngineDeadError

PROMPTS = ["The lazy dog", "What is", "A", "Hello there, who"]


def greedy(tokens: int, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **more)  # type: ignore[arg-type]


def sampled(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.8, seed=7, n=2, max_tokens=tokens, ignore_eos=True)


@pytest.fixture
def served(qwen: LLM) -> Iterator[AsyncLLM]:
    served = AsyncLLM(qwen)
    yield served
    served.close()
    assert not any(engine.has_work for engine in qwen.model.engines)
    assert qwen.reset_prefix_cache(), "a request kept pages"


async def streamed(served: AsyncLLM, prompt: object, params: SamplingParams) -> tuple[dict[int, str], list[int]]:
    ticket = served.submit(await served.prepare(prompt), params, streaming=True)
    texts: dict[int, str] = {}
    sizes = []
    async for delta in served.stream(ticket):
        texts[delta.index] = texts.get(delta.index, "") + delta.text
        sizes.append(len(delta.token_ids))
    assert ticket.output is not None
    assert [output.text for output in ticket.output.outputs] == [texts[i] for i in sorted(texts)]
    return texts, sizes


def test_concurrent_callers_get_the_same_outputs(qwen: LLM, served: AsyncLLM) -> None:
    async def all_at_once() -> list[tuple[dict[int, str], list[int]]]:
        return await asyncio.gather(*(streamed(served, prompt, sampled(9)) for prompt in PROMPTS))

    got = asyncio.run(all_at_once())
    served.close()
    for (texts, sizes), output in zip(got, qwen.generate(PROMPTS, sampled(9), use_tqdm=False), strict=True):
        assert texts == {0: output.outputs[0].text, 1: output.outputs[1].text}
        assert sum(sizes) == 18
        assert len(sizes) > 2, "it came in pieces"


def test_a_disconnected_caller_frees_its_blocks(qwen: LLM, served: AsyncLLM) -> None:
    async def leave() -> None:
        task = asyncio.create_task(served.complete(await served.prepare("A long story"), greedy(300)))
        ticket = served.submit(await served.prepare("Another"), greedy(300), streaming=True)
        async for _ in served.stream(ticket):
            break
        served.drop(ticket)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(500):
            if not any(engine.has_work or engine.num_unfinished for engine in qwen.model.engines):
                return
            await asyncio.sleep(0.02)
        raise AssertionError("the engine still runs")

    asyncio.run(leave())
    assert served.open == 0


def test_bad_requests_do_not_stop_the_engine(served: AsyncLLM) -> None:
    async def run() -> str:
        with pytest.raises(TypeError):
            await served.prepare(3.5)
        with pytest.raises(ValueError, match="longer than the maximum model length"):
            await served.prepare({"prompt_token_ids": [5] * 2000})
        rendered = await served.prepare("Hi")
        with pytest.raises(ValueError, match="stop tokens"):
            await served.complete(rendered, greedy(4, stop_token_ids=list(range(100))))
        with pytest.raises(ValueError, match="allowed_token_ids"):
            served.submit(rendered, greedy(4, allowed_token_ids=[10**6]), streaming=False)
        return (await served.complete(rendered, greedy(4))).outputs[0].text

    assert asyncio.run(run())


def test_an_engine_error_reaches_every_caller(qwen: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    served = AsyncLLM(qwen)
    engine = qwen.model.engines[0]

    async def run() -> None:
        rendered = await served.prepare("Hi")

        def broken() -> None:
            raise RuntimeError("no device")

        monkeypatch.setattr(engine, "step", broken)
        with pytest.raises(EngineDeadError, match="no device"):
            await served.complete(rendered, greedy(4))
        with pytest.raises(EngineDeadError, match="no device"):
            await served.complete(rendered, greedy(4))

    asyncio.run(run())
    monkeypatch.undo()
    served.close()
    for answer in list(engine._outputs.values()):
        engine.abort([answer])
    while engine.has_work:
        engine.step()
