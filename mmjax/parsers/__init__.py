"""Parsers of a model's output text: tool calls and reasoning, under the names of vLLM's parsers.

They take text and give text: they import neither an engine nor a server, so any front end can use them, and their tests
run without a model.
"""

# ruff: noqa: RUF001 - DeepSeek's marks have full-width bars

from __future__ import annotations

from collections.abc import Iterator

from mmjax.parsers.base import Piece, Reasoning, ToolCall, ToolParser
from mmjax.parsers.json_calls import DeepSeekParser, HermesParser, Llama3Parser, MistralParser, Phi4Parser, read_call
from mmjax.parsers.python_calls import MiniCPMParser, PythonicParser
from mmjax.parsers.reasoning import (
    DeepSeekR1Parser,
    Gemma4ReasoningParser,
    MistralReasoningParser,
    ReasoningParser,
    ThinkParser,
)
from mmjax.parsers.xml_calls import MiniCPM5Parser, Qwen3XMLParser

__all__ = [
    "REASONING_PARSERS",
    "TOOL_PARSERS",
    "OutputParser",
    "Piece",
    "Reasoning",
    "ReasoningParser",
    "ToolCall",
    "ToolParser",
    "read_call",
    "reasoning_parser_for",
    "tool_parser_for",
]

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "mistral": MistralParser,
    "llama3_json": Llama3Parser,
    "llama4_json": Llama3Parser,
    "llama4_pythonic": PythonicParser,
    "pythonic": PythonicParser,
    "qwen3_xml": Qwen3XMLParser,
    "qwen3_coder": Qwen3XMLParser,
    "phi4_mini_json": Phi4Parser,
    "minicpm": MiniCPMParser,
    "minicpm5": MiniCPM5Parser,
    "deepseek_v3": DeepSeekParser,
    "deepseek_v31": DeepSeekParser,
}
REASONING_PARSERS: dict[str, type[ReasoningParser]] = {
    "qwen3": ThinkParser,
    "deepseek_r1": DeepSeekR1Parser,
    "mistral": MistralReasoningParser,
    "gemma4": Gemma4ReasoningParser,
}
# What a chat template says of the format: the first text that it has decides.
TOOL_FORMATS = (
    ("<function=", "qwen3_xml"),
    ("<function name=", "minicpm5"),
    ("<|tool_call_start|>", "minicpm"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("<|python_start|>", "llama4_pythonic"),
    ("<|tool_call|>", "phi4_mini_json"),
    ("<|tool|>", "phi4_mini_json"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary', "llama3_json"),
)
REASONING_FORMATS = (("[THINK]", "mistral"), ("<|channel>", "gemma4"), ("</think>", "qwen3"))


def tool_parser_for(template: str) -> str:
    """The name of the parser for the tool calls of a chat template; hermes if it shows none."""
    return next((name for mark, name in TOOL_FORMATS if mark in template), "hermes")


def reasoning_parser_for(template: str) -> str | None:
    """The name of the parser for the reasoning of a chat template; None if it has none."""
    return next((name for mark, name in REASONING_FORMATS if mark in template), None)


class OutputParser:
    """Splits an output into reasoning, and what follows it into content and calls. Either parser may be missing.

    max_calls: calls after so many are dropped. calls: for the caller, to count the calls.
    """

    def __init__(
        self, reasoning: ReasoningParser | None, tools: ToolParser | None, max_calls: int | None = None
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._remaining = max_calls
        self.calls = 0

    def feed(self, text: str, *, last: bool = False) -> Iterator[Piece]:
        """The pieces in new text. last: no more text follows."""
        for piece in [text] if self._reasoning is None else self._reasoning.feed(text, last=last):
            if isinstance(piece, Reasoning) or self._tools is None:
                yield piece
            else:
                yield from self._limited(self._tools.feed(piece))
        if last and self._tools is not None:
            yield from self._limited(self._tools.feed("", last=True))

    def _limited(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if isinstance(piece, ToolCall) and self._remaining is not None:
                if not self._remaining:
                    continue
                self._remaining -= 1
            yield piece

    def read(self, text: str) -> tuple[str, str, list[ToolCall]]:
        """(reasoning, content, calls) of a complete output."""
        reasoning, content, calls = "", "", []
        for piece in self.feed(text, last=True):
            if isinstance(piece, ToolCall):
                calls.append(piece)
            elif isinstance(piece, Reasoning):
                reasoning += piece
            else:
                content += piece
        return reasoning, content, calls
