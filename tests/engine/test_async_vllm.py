"""AsyncLLM as vLLM's users call it: `generate` yields outputs, requests have ids."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from engine_inputs import greedy
from mmjax import LLM, AsyncLLM, EngineArgs, RequestError, RequestOutput, SamplingParams
from mmjax.types import RequestOutputKind

CUMULATIVE, DELTA, FINAL = RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 7, "max_tokens": 9, "ignore_eos": True, "logprobs": 1}


@pytest.fixture
def served(qwen: LLM) -> Iterator[AsyncLLM]:
    served = AsyncLLM(qwen)
    yield served
    served.shutdown()
    assert qwen.reset_prefix_cache(), "a request kept blocks"


async def outputs(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA, FINAL])
def test_generate(kind: RequestOutputKind, n: int, qwen: LLM, served: AsyncLLM) -> None:
    params = SamplingParams(**SAMPLED, n=n, output_kind=kind)
    got = asyncio.run(outputs(served.generate("The lazy dog", params, request_id="mine")))
    served.shutdown()
    [wanted] = qwen.generate("The lazy dog", SamplingParams(**SAMPLED, n=n), use_tqdm=False)
    assert {output.request_id for output in got} == {"mine"}
    assert [output.finished for output in got] == [False] * (len(got) - 1) + [True]
    assert got[0].prompt_token_ids == wanted.prompt_token_ids and got[-1].metrics is not None
    assert len(got) == 1 if kind is FINAL else len(got) > 2
    for completion in wanted.outputs:
        each = [one for output in got for one in output.outputs if one.index == completion.index]
        if kind is DELTA:
            assert "".join(one.text for one in each) == completion.text
            assert [token for one in each for token in one.token_ids] == completion.token_ids
            assert sum(one.cumulative_logprob or 0 for one in each) == pytest.approx(completion.cumulative_logprob)
        else:
            assert each[-1] == completion
            assert all(completion.text.startswith(one.text) for one in each)
        assert each[-1].finish_reason == "length"


def test_requests_end_by_their_ids(served: AsyncLLM) -> None:
    async def run() -> tuple[list[RequestOutput], list[RequestOutput]]:
        first = served.generate("A long story", greedy(300), "first")
        got = [await anext(first)]
        second = asyncio.create_task(outputs(served.generate("Another", greedy(300), "second")))
        with pytest.raises(RequestError, match="A request with the id 'first' is already running"):
            await anext(served.generate("Once more", greedy(4), "first"))
        await served.abort(["first", "unknown"])
        got += [output async for output in first]
        await served.abort("second")
        return got, await second

    for got in asyncio.run(run()):
        assert got[-1].finished and got[-1].outputs[0].finish_reason == "abort"
        assert len(got[-1].outputs[0].token_ids) < 300
    assert served.open == 0


def test_a_caller_that_leaves_early(served: AsyncLLM) -> None:
    async def leave() -> None:
        async for output in served.generate("A long story", greedy(300), "left"):
            assert not output.finished
            break
        await served.between_steps(lambda: None)

    asyncio.run(leave())
    assert served.open == 0


def test_what_is_refused(served: AsyncLLM) -> None:
    async def run() -> None:
        with pytest.raises(RequestError, match="LoRA is not supported"):
            await anext(served.generate("Hi", greedy(4), "1", lora_request=object()))
        with pytest.raises(TypeError):
            await anext(served.generate(3.5, greedy(4), "2"))
        with pytest.raises(RequestError, match="only supported for pooling models"):
            await anext(served.encode("Hi", None, "3"))
        with pytest.raises(RequestError, match="mode must be 'abort' or 'wait'"):
            await served.sleep(mode="keep")
        assert (await outputs(served.generate("Hi", greedy(2), "4")))[-1].finished

    asyncio.run(run())


def test_sleep(served: AsyncLLM) -> None:
    async def run() -> None:
        wanted = await outputs(served.generate("Hi", greedy(4), "1"))
        running = served.generate("A long story", greedy(300), "2")
        await anext(running)
        await served.sleep()
        assert (await outputs(running))[-1].outputs[0].finish_reason == "abort"
        assert await served.is_sleeping()
        with pytest.raises(RequestError, match="The engine sleeps"):
            await anext(served.generate("Hi", greedy(4), "3"))
        await served.wake_up(["weights"])
        await served.wake_up()
        assert not await served.is_sleeping()
        again = await outputs(served.generate("Hi", greedy(4), "4"))
        assert again[-1].outputs == wanted[-1].outputs
        await served.check_health()

    asyncio.run(run())


def test_it_is_made_of_arguments(qwen: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    args = EngineArgs("model", max_num_seqs=3)
    monkeypatch.setattr("mmjax.entrypoints.llm.load_model", lambda given, **_: qwen.model if given == args else None)
    served = AsyncLLM.from_engine_args(args, usage_context="script")
    assert served.model is qwen.model
    served.shutdown(timeout=1.0)
