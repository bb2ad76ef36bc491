"""Reasoning in outputs: the text between two marks at their start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from mmjax.parsers.base import SPACES, Reasoning, overlap, skip


class ReasoningParser:
    """Splits a streamed output into reasoning and content.

    Templates may end the prompt with the opening mark, or with both marks where the model must not reason. An output
    that ends within its reasoning has no content. Blanks around the reasoning are dropped.

    prompt: the text of the prompt, as far as it is known. open, close: the marks. reasons: whether an output without
    the opening mark begins with reasoning if the prompt does not say. special: as in `ToolParser`.
    """

    open: ClassVar[str]
    close: ClassVar[str]
    reasons: ClassVar[bool] = False
    special: ClassVar[bool] = False

    def __init__(self, prompt: str | None = None) -> None:
        end = (prompt or "").rstrip(SPACES)
        self._reasons = end.endswith(self.open) or (self.reasons and not end.endswith(self.close))
        self._state = "start"
        self._buffer = ""

    def feed(self, text: str, *, last: bool = False) -> Iterator[str]:
        """The pieces of reasoning, which are `Reasoning`, and of content in new text. last: no more text follows."""
        self._buffer += text
        if self._state == "start":
            self._start(last)
        if self._state == "reasoning":
            yield from self._reasoning(last)
        if self._state == "blank":
            self._buffer = self._buffer.lstrip(SPACES)
            self._state = "content" if self._buffer else "blank"
        if self._state == "content" and self._buffer:
            yield self._buffer
            self._buffer = ""

    def read(self, text: str) -> tuple[str, str]:
        """(reasoning, content) of a complete output."""
        pieces = list(self.feed(text, last=True))
        reasoning = "".join(piece for piece in pieces if isinstance(piece, Reasoning))
        return reasoning, "".join(piece for piece in pieces if not isinstance(piece, Reasoning))

    def _start(self, last: bool) -> None:
        start = skip(self._buffer, 0)
        if self._buffer.startswith(self.open, start):
            self._buffer = self._buffer[start + len(self.open) :]
            self._state = "reasoning"
        elif self.open.startswith(self._buffer[start:]) and not last:
            return
        else:
            self._state = "reasoning" if self._reasons else "content"
        self._begun = False  # no reasoning but blanks so far

    def _reasoning(self, last: bool) -> Iterator[Reasoning]:
        if not self._begun:
            self._buffer = self._buffer.lstrip(SPACES)
        end = self._buffer.find(self.close)
        if end >= 0:
            text, self._buffer, self._state = self._buffer[:end], self._buffer[end + len(self.close) :], "blank"
        else:
            keep = 0 if last else overlap(self._buffer, self.close)
            text = self._buffer[: len(self._buffer) - keep]
            self._buffer = self._buffer[len(text) :]
        stripped = text.rstrip(SPACES)
        if end < 0 and not last:
            self._buffer = text[len(stripped) :] + self._buffer
        if stripped:
            self._begun = True
            yield Reasoning(stripped)


class ThinkParser(ReasoningParser):
    """`<think>...</think>`, by Qwen3 and others that may leave it out."""

    open, close = "<think>", "</think>"


class DeepSeekR1Parser(ThinkParser):
    """`<think>...</think>`, whose opening mark the model may leave out."""

    reasons = True


class MistralReasoningParser(ReasoningParser):
    """`[THINK]...[/THINK]`, by Magistral."""

    open, close = "[THINK]", "[/THINK]"
    special = True


class Gemma4ReasoningParser(ReasoningParser):
    """`<|channel>thought ... <channel|>`, by Gemma 4."""

    open, close = "<|channel>thought", "<channel|>"
    special = True
