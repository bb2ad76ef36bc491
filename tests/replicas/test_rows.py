"""How a processor takes rows through its stages, with an engine that only echoes: no Ray, no model."""

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmjax import EngineDeadError, RequestError, SamplingParams
from mmjax.ray import EngineProcessorConfig
from mmjax.ray.data import ERROR, PICKLED, Engine, pack_rows, unpack_rows


class Echo:
    """An `AsyncLLM` whose outputs are its prompts, up to max_tokens. One prompt is refused, and one is fatal."""

    def __init__(self) -> None:
        self.llm = SimpleNamespace(get_default_sampling_params=lambda: SamplingParams(max_tokens=3))

    async def prepare(self, prompt: str) -> Any:
        if prompt == "bad":
            raise RequestError("this prompt is bad")
        if prompt == "fatal":
            raise EngineDeadError("The engine has stopped.")
        return SimpleNamespace(text=prompt, token_ids=np.arange(len(prompt)))

    async def prepare_chat(self, messages: Any, **options: Any) -> Any:
        return await self.prepare(messages[-1]["content"] + str(options or ""))

    async def compile_grammar(self, params: SamplingParams) -> None:
        return None

    async def complete(self, engine_input: Any, params: SamplingParams, grammar: Any) -> Any:
        text = engine_input.text[: params.max_tokens]
        return SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=range(len(text)), finish_reason="stop")])

    async def embed(self, engine_input: Any, params: Any) -> Any:
        return SimpleNamespace(outputs=SimpleNamespace(data=np.float32([0.5, 0.25])))


def run(rows: list[Any], preprocess: Any = None, postprocess: Any = None, **settings: Any) -> list[Any]:
    engine = Engine.__new__(Engine)
    engine.config = EngineProcessorConfig("demo", **settings)
    engine.engine = Echo()  # type: ignore[assignment]
    go_on = engine.config.should_continue_on_error
    batch = np.empty(len(rows), object)
    batch[:] = [pack_rows(preprocess, go_on)(row)[PICKLED] for row in rows]
    done = asyncio.run(engine({PICKLED: batch}))[PICKLED]
    return [unpack_rows(postprocess, go_on)({PICKLED: row}) for row in done]


def test_columns() -> None:
    [row] = run([{"id": 1, "text": "hello"}], lambda row: {"prompt": row["text"]})
    assert row == {  # what preprocess adds may be nothing that Arrow can hold, such as a PIL image
        **{"id": 1, "text": "hello", "generated_text": "hel", "generated_tokens": [0, 1, 2]},
        **{"finish_reason": "stop", "num_input_tokens": 5, "num_generated_tokens": 3},
    }
    rows = run([{"id": 1}, {"id": 2}], lambda row: {"prompt": "abc" * row["id"]}, task_type="embed")
    assert rows == [{"id": i, "num_input_tokens": 3 * i, "embeddings": [0.5, 0.25]} for i in (1, 2)]


def test_requests() -> None:
    chat = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"b": 1}}
    rows = [
        {**chat, "sampling_params": {"max_tokens": 40}},
        {"prompt": "hello", "sampling_params": SamplingParams(max_tokens=1)},
    ]
    texts = run(rows, postprocess=lambda row: row["generated_text"])
    assert texts == ["a{'chat_template_kwargs': {'b': 1}}", "h"]


def test_rows_that_fail() -> None:
    """They have the columns of the others, so that a file can hold both."""

    def preprocess(row: Any) -> Any:
        return {"prompt": row["text"]} if row["text"] else {"prompt": 1 / 0}

    def postprocess(row: Any) -> Any:
        return {"text": row["text"], "answer": row["generated_text"], "n": row["num_generated_tokens"]}

    rows = [{"text": "good"}, {"text": "bad"}, {"text": ""}]
    assert run(rows, preprocess, postprocess, should_continue_on_error=True) == [
        {"text": "good", "answer": "goo", "n": 3, ERROR: ""},
        {"text": "bad", "answer": "", "n": 0, ERROR: "RequestError: this prompt is bad"},
        {"text": "", "answer": "", "n": 0, ERROR: "ZeroDivisionError: division by zero"},
    ]
    with pytest.raises(RequestError, match="this prompt is bad"):
        run(rows[:2], preprocess)
    with pytest.raises(ZeroDivisionError):
        run(rows[2:], preprocess)
    with pytest.raises(ValueError, match=r"needs `messages` or `prompt` after preprocess; it has text"):
        run(rows[:1])


def test_an_engine_that_stops_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rows may fail: else all further rows of this actor would."""

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit, match="1"):
        run([{"prompt": "fatal"}], should_continue_on_error=True)
