"""The body of POST /v1/responses, and its translation to a chat request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from mmjax.serve import published_types as published
from mmjax.serve.sampling_schema import PositiveInt
from mmjax.serve.schema import ChatFields, ChatRequest, GenerationFields, StreamOptions
from pydantic import Field, field_validator
from pydantic import ValidationError as FormError

from mmjax.types import RequestError, ValidationError

Json = dict[str, Any]
LOGPROBS = "message.output_text.logprobs"
FORMATS = ("text", "json_object", "json_schema")
NOT_STORED = "nothing is kept here; send the whole conversation as `input`"
UNSUPPORTED = {
    "conversation": NOT_STORED,
    "prompt": "no prompts are kept here; send `instructions` and `input`",
    "background": "answers are made while the client waits; leave it out, and use `stream`",
}


class ResponsesRequest(GenerationFields, ChatFields):
    input: published.ResponsesInput
    """A text, or items: those that follow the response `previous_response_id`, or the whole conversation."""
    instructions: str | None = None
    """A system message before the conversation."""
    max_output_tokens: PositiveInt | None = None
    """Most tokens of the output; null: as many as the model's length allows."""
    tools: published.ResponsesTools | None = None
    """The functions that the model may call."""
    tool_choice: published.ResponsesToolChoice | None = None
    """Which tools the model may or must call; null: `auto`."""
    parallel_tool_calls: bool | None = None
    """Allow several calls in one output; null: true."""
    text: published.ResponsesTextOptions | None = None
    """The form of the output."""
    include: list[str] | None = None
    """`message.output_text.logprobs` returns log-probabilities; other entries are ignored."""
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    """Return the log-probabilities of this many most likely tokens at each position."""
    metadata: dict[str, str] | None = None
    """Returned with the response."""
    store: bool = True
    """Keep the response for later requests, as long as the server's memory for responses has room."""
    previous_response_id: str | None = None
    """A stored response, which `input` continues. Its `instructions` are not used again."""
    conversation: None = None
    """Not supported."""
    prompt: None = None
    """Not supported."""
    background: Literal[False] | None = None
    """Not supported."""
    truncation: Literal["auto", "disabled"] | None = None
    """`auto` leaves out the first turns of a conversation that is longer than the model allows."""

    @field_validator(*UNSUPPORTED, mode="wrap")
    @classmethod
    def _explain_unsupported(cls, value: Any, check: Any, info: Any) -> Any:
        try:
            return check(value)
        except ValueError:
            raise ValueError(UNSUPPORTED[info.field_name]) from None

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[Json] | None) -> list[Json] | None:
        """Replaces the validator of this name in ChatFields, whose tools have another form."""
        for tool in tools or ():
            if not _names_function(tool):
                raise ValueError("each must be {'type': 'function', 'name': ..., 'parameters': ...}")
        return tools

    @field_validator("tool_choice")
    @classmethod
    def _check_tool_choice(cls, choice: str | Json | None) -> str | Json | None:
        if isinstance(choice, dict) and not _names_function(choice):
            raise ValueError("must be none, auto, required or {'type': 'function', 'name': ...}")
        return choice

    @field_validator("text")
    @classmethod
    def _check_text(cls, text: Json | None) -> Json | None:
        output_format = (text or {}).get("format")
        if output_format is None:
            return text
        if not isinstance(output_format, dict) or output_format.get("type") not in FORMATS:
            raise ValueError(f"format must be an object whose type is one of {', '.join(FORMATS)}")
        if output_format["type"] == "json_schema" and not isinstance(output_format.get("schema"), dict):
            raise ValueError("format of type json_schema needs `schema`, an object")
        return text

    @property
    def output_format(self) -> Json:
        """The format of the output that the request asks for."""
        return (self.text or {}).get("format") or {"type": "text"}

    @property
    def items(self) -> list[Json]:
        """`input` as items."""
        return [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input

    def chat(self, before: Sequence[Json] = ()) -> ChatRequest:
        """The same request to /v1/chat/completions. before: the items of the conversation that `input` continues.
        ValidationError for an invalid item."""
        names = (GenerationFields.model_fields.keys() | ChatFields.model_fields.keys()) - {"tools"}
        wants = LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
        try:
            return ChatRequest(
                **{name: getattr(self, name) for name in names},
                messages=messages_of(self.items, self.instructions, before),
                max_completion_tokens=self.max_output_tokens,
                tools=[{"type": "function", "function": _without_type(tool)} for tool in self.tools or ()] or None,
                tool_choice=_nested(self.tool_choice, "function"),
                parallel_tool_calls=self.parallel_tool_calls,
                response_format=_nested(self.output_format, "json_schema"),
                logprobs=wants,
                top_logprobs=self.top_logprobs if wants else None,
                stream_options=StreamOptions(include_usage=True) if self.stream else None,
            )
        except FormError as error:
            faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
            raise RequestValidationError(faults) from None


def _names_function(given: Json) -> bool:
    return given.get("type") == "function" and isinstance(given.get("name"), str)


def _without_type(given: Json) -> Json:
    return {name: value for name, value in given.items() if name != "type"}


def _nested(given: Any, type_name: str) -> Any:
    """The chat API's form of an object of this type: its fields are nested under the name of the type."""
    if isinstance(given, dict) and given["type"] == type_name:
        return {"type": type_name, type_name: _without_type(given)}
    return given


def messages_of(given: Sequence[Json], instructions: str | None, before: Sequence[Json] = ()) -> list[Json]:
    """The messages of a chat. Instructions become the first message; calls are added to the assistant's message before
    them. before: earlier items. ValidationError names an item that is invalid."""
    messages: list[Json] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if not given:
        raise ValidationError("input: the list is empty", parameter="input")
    for index, item in enumerate([*before, *given], -len(before)):
        item_type = item.get("type") or "message"
        if not isinstance(item_type, str) or item_type not in READ_ITEM:
            words = f"items of type {item_type!r} are not taken; known are {', '.join(READ_ITEM)}"
            raise ValidationError(f"input.{index}: {words}", parameter="input")
        try:
            READ_ITEM[item_type](item, messages)
        except RequestError as error:
            raise ValidationError(f"input.{index}: {error}", parameter="input") from None
    return messages


def _message(item: Json, messages: list[Json]) -> None:
    role = _text(item, "role")
    messages.append({"role": "system" if role == "developer" else role, "content": _content(item, "content")})


def _call(item: Json, messages: list[Json]) -> None:
    function = {"name": _text(item, "name"), "arguments": _text(item, "arguments")}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    call = {"id": _text(item, "call_id"), "type": "function", "function": function}
    messages[-1].setdefault("tool_calls", []).append(call)


def _call_output(item: Json, messages: list[Json]) -> None:
    messages.append({"role": "tool", "tool_call_id": _text(item, "call_id"), "content": _content(item, "output")})


def _reasoning(_: Json, __: list[Json]) -> None:
    """What the model thought before an earlier answer. It is left out, as chat templates do."""


def _text(item: Json, name: str) -> str:
    if not isinstance(item.get(name), str):
        raise RequestError(f"{name} must be a text")
    return str(item[name])


def _content(item: Json, name: str) -> str | list[Any]:
    """A text, or a list of parts, which the chat route checks."""
    content = item.get(name)
    if not isinstance(content, (str, list)):
        raise RequestError(f"{name} must be a text or a list of parts")
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("file_id") is not None:
            raise RequestError("file_id: no files are kept here; send the picture itself, as image_url")
    return content


READ_ITEM: Mapping[str, Callable[[Json, list[Json]], None]] = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _call_output,
    "reasoning": _reasoning,
}
