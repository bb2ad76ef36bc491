"""Tool calls in the text of Qwen and Hermes models: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Iterator
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclasses.dataclass(frozen=True)
class Call:
    """One call as OpenAI writes it; `arguments` is JSON text."""

    name: str
    arguments: str
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-tool-{uuid.uuid4().hex}")

    def as_json(self) -> dict[str, Any]:
        """An entry of `tool_calls`."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Reader:
    """Splits an answer, as it comes, into what is said and what is called.

    Text that may be the beginning of a call is held back. A call that is no valid JSON, or never closed, is text.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._held = ""

    def feed(self, text: str, *, last: bool = False) -> Iterator[str | Call]:
        """More of the answer: pieces of text and calls, in their order. `last`: nothing is held back any more."""
        self._held += text
        while self._held:
            at = self._held.find(OPEN)
            if at < 0:
                keep = 0 if last else _overlap(self._held, OPEN)
                said, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                if said:
                    yield said
                return
            if at:
                said, self._held = self._held[:at], self._held[at:]
                yield said
            end = self._held.find(CLOSE)
            if end < 0:
                if not last:
                    return
                whole, self._held = self._held, ""
                yield read_call(whole[len(OPEN) :]) or whole
                continue
            whole, self._held = self._held[: end + len(CLOSE)], self._held[end + len(CLOSE) :]
            call = read_call(whole[len(OPEN) : -len(CLOSE)])
            self._held = self._held.removeprefix("\n") if call else self._held
            yield call or whole

    def read(self, text: str) -> tuple[str, list[Call]]:
        """(what is said, calls) of a whole answer."""
        pieces = list(self.feed(text, last=True))
        said = "".join(piece for piece in pieces if isinstance(piece, str))
        calls = [piece for piece in pieces if isinstance(piece, Call)]
        return said.strip() if calls else said, calls


def read_call(text: str) -> Call | None:
    """The call that JSON text writes, if it does."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
