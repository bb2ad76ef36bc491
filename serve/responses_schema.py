"""What POST /v1/responses takes, said as a chat request: items become messages, flat tools nested ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    "store": "answers are not kept here; leave it out, or send false",
    "previous_response_id": NOT_STORED,
    "conversation": NOT_STORED,
    "prompt": "no prompts are kept here; send `instructions` and `input`",
    "background": "answers are made while the client waits; leave it out, and use `stream`",
    "truncation": "items are never left out; send fewer, or 'disabled'",
}


class ResponsesRequest(GenerationFields, ChatFields):
    input: published.ResponsesInput
    """A text, or the whole conversation as items: the server stores none."""
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
    store: Literal[False] | None = None
    """Not supported: the server stores no responses."""
    previous_response_id: None = None
    """Not supported."""
    conversation: None = None
    """Not supported."""
    prompt: None = None
    """Not supported."""
    background: Literal[False] | None = None
    """Not supported."""
    truncation: Literal["disabled"] | None = None
    """Not supported: no items are left out."""

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
        form = (text or {}).get("format")
        if form is None:
            return text
        if not isinstance(form, dict) or form.get("type") not in FORMATS:
            raise ValueError(f"format must be an object whose type is one of {', '.join(FORMATS)}")
        if form["type"] == "json_schema" and not isinstance(form.get("schema"), dict):
            raise ValueError("format of type json_schema needs `schema`, an object")
        return text

    @property
    def form(self) -> Json:
        """The form of the answer, as the client asked for it."""
        return (self.text or {}).get("format") or {"type": "text"}

    def chat(self) -> ChatRequest:
        """The same request to /v1/chat/completions. ValidationError for an item that cannot be read."""
        names = (GenerationFields.model_fields.keys() | ChatFields.model_fields.keys()) - {"tools"}
        wants = LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
        try:
            return ChatRequest(
                **{name: getattr(self, name) for name in names},
                messages=messages_of(self.input, self.instructions),
                max_completion_tokens=self.max_output_tokens,
                tools=[{"type": "function", "function": _without_type(tool)} for tool in self.tools or ()] or None,
                tool_choice=_nested(self.tool_choice, "function"),
                parallel_tool_calls=self.parallel_tool_calls,
                response_format=_nested(self.form, "json_schema"),
                logprobs=wants,
                top_logprobs=self.top_logprobs if wants else None,
                stream_options=StreamOptions(include_usage=True) if self.stream else None,
            )
        except FormError as error:
            told = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
            raise RequestValidationError(told) from None


def _names_function(given: Json) -> bool:
    return given.get("type") == "function" and isinstance(given.get("name"), str)


def _without_type(given: Json) -> Json:
    return {name: value for name, value in given.items() if name != "type"}


def _nested(given: Any, kind: str) -> Any:
    """What chat keeps one level deeper, under the name of its type."""
    return {"type": kind, kind: _without_type(given)} if isinstance(given, dict) and given["type"] == kind else given


def messages_of(given: str | list[Json], instructions: str | None) -> list[Json]:
    """Messages of a chat. Instructions come first; calls belong to the answer before them. ValidationError naming the
    item that cannot be read."""
    messages: list[Json] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not given:
        raise ValidationError("input: the list is empty", parameter="input")
    for index, item in enumerate(given):
        kind = item.get("type") or "message"
        if not isinstance(kind, str) or kind not in READ:
            words = f"items of type {kind!r} are not taken; known are {', '.join(READ)}"
            raise ValidationError(f"input.{index}: {words}", parameter="input")
        try:
            READ[kind](item, messages)
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


def _text(item: Json, name: str) -> str:
    if not isinstance(item.get(name), str):
        raise RequestError(f"{name} must be a text")
    return str(item[name])


def _content(item: Json, name: str) -> str | list[Any]:
    """A text, or parts, which the chat reads."""
    content = item.get(name)
    if not isinstance(content, (str, list)):
        raise RequestError(f"{name} must be a text or a list of parts")
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("file_id") is not None:
            raise RequestError("file_id: no files are kept here; send the picture itself, as image_url")
    return content


READ: Mapping[str, Callable[[Json, list[Json]], None]] = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _call_output,
}
