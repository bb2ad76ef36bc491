"""`mmjax run-batch` and `mmjax chat`."""

import argparse
import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from mmjax.serve import batches
from mmjax.serve.context import ServerSettings

from mmjax import AsyncLLM, SamplingParams
from mmjax.cli import chat
from mmjax.cli.chat import Terminal
from mmjax.cli.main import main
from prompts import image_url_part, random_image, user_messages

GREEDY = {"max_tokens": 4, "temperature": 0}


def line(name: str, address: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": address, "body": {**GREEDY, **body}}


class Bar:
    """A progress bar that only counts."""

    done = 0

    def update(self, n: int) -> None:
        self.done += n


def answered(served: AsyncLLM, lines: list[dict[str, Any]]) -> dict[str, Any]:
    out, bar = io.StringIO(), Bar()
    settings = ServerSettings(names=("tiny",), max_queue=2)
    failed = asyncio.run(batches.answer_all(served, settings, lines, out, bar))
    found = {entry["custom_id"]: entry for entry in map(json.loads, out.getvalue().splitlines())}
    assert bar.done == len(lines) == len(found)
    assert failed == sum(entry["error"] is not None for entry in found.values())
    return found


def test_lines_are_answered_as_by_a_server(served: AsyncLLM) -> None:
    lines = [
        line("chat", messages=user_messages(image_url_part(random_image(1)), "What is this?"), model="tiny"),
        line("text", "/v1/completions", prompt="the lazy dog"),
        line("model", messages=user_messages("hi"), model="other"),
        line("bad", messages=user_messages("hi"), n=-1),
        line("stream", messages=user_messages("hi"), stream=True),
        line("route", "/v1/nothing"),
        line("far", "https://example.org/v1/chat/completions"),
        {**line("get"), "method": "GET"},
    ]
    found = answered(served, lines)
    for name in ("chat", "text"):
        assert found[name]["error"] is None and found[name]["response"]["status_code"] == 200
        assert found[name]["response"]["body"]["usage"]["completion_tokens"] <= 4
    wrong = {name: entry["error"] for name, entry in found.items() if entry["error"]}
    assert {name: error["code"] for name, error in wrong.items()} == {
        "model": "404", "bad": "400", "route": "404", "stream": "bad_request", "far": "bad_request",
        "get": "bad_request",
    }  # fmt: skip
    assert "does not exist" in wrong["model"]["message"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is no JSON"),
        ('\n{"custom_id": "a"}', "line 2 needs custom_id and url"),
        ('{"custom_id": "a", "url": "/v1/x", "body": {}}\n' * 2, "line 2: custom_id 'a' is taken"),
    ],
)
def test_invalid_files(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches.read_requests(text)


def test_only_successful_responses_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    assert batches.read_answered(file) == set()
    good = json.dumps({"custom_id": "a", "response": {"status_code": 200}})
    bad = json.dumps({"custom_id": "b", "response": {"status_code": 500}})
    none = json.dumps({"custom_id": "c", "response": None})
    file.write_text("\n".join([good, bad, none, good[:20]]))
    assert batches.read_answered(file) == {"a"}
    assert file.read_text() == good + "\n" and [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_the_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: AsyncLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    class SharedEngine:
        """The shared engine, which a command must not close."""

        def __new__(cls, _: Any) -> Any:
            monkeypatch.setattr(served, "close", lambda: None)
            return served

    monkeypatch.setattr(batches, "LLM", lambda model, **_: None)
    monkeypatch.setattr(batches, "AsyncLLM", SharedEngine)
    requests, responses = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("\n".join(json.dumps(line(name, messages=user_messages(name))) for name in "abc"))
    responses.write_text(json.dumps({"custom_id": "b", "response": {"status_code": 200}}) + "\n")
    words = ["run-batch", "-i", str(requests), "-o", str(responses), "--concurrency", "2", "tiny"]
    assert main(words) == 0
    assert "3 requests, 0 of them failed" in capsys.readouterr().out
    assert sorted(json.loads(text)["custom_id"] for text in responses.read_text().splitlines()) == ["a", "b", "c"]
    before = responses.read_text()
    assert main(words) == 0 and responses.read_text() == before
    requests.write_text("nonsense")
    assert main(words) == 1


def test_a_conversation_in_the_terminal(served: AsyncLLM, tmp_path: Path) -> None:
    random_image(1).save(tmp_path / "photo.png")
    lines = iter(
        [
            "/help", "hello", f"/image {tmp_path}/photo.png", "what is this", "/image /no/such/file.png", "",
            "/video", "/system Be brief.", "hello", "/image data:image/png;base64,AAAA", "broken", "/quit",
        ]
    )  # fmt: skip
    printed: list[str] = []
    chat = Terminal(served, SamplingParams(temperature=0, max_tokens=5))
    turns: list[int] = []

    def read(_: str) -> str:
        turns.append(len(chat.messages))
        return next(lines)

    chat.run(read, printed.append)
    assert turns == [0, 0, 2, 2, 4, 4, 4, 4, 1, 3, 3, 3]
    text = "".join(printed)
    assert "[1 with the next message]" in text and "No such file" in text and text.count("/image PATH") == 2
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}
    assert "image" in printed[-1] and chat.media == [], "the error of the image is printed, and the image is dropped"
    assert served.open == 0


def test_chat_ends_with_the_input(served: AsyncLLM) -> None:
    def ended(_: str) -> str:
        raise EOFError

    Terminal(served, SamplingParams(max_tokens=1)).run(ended, lambda _: None)


def test_chat_has_its_flags() -> None:

    parser = argparse.ArgumentParser()
    chat.add_flags(parser)
    assert parser.parse_args(["--temperature", "0", "--system", "x"]).temperature == 0
