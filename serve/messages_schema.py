"""The bodies of POST /v1/messages and /v1/messages/count_tokens, and their translation to a chat request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from mmjax.serve import messages_types as published
from mmjax.serve.published_types import NonEmptyString
from mmjax.serve.sampling_schema import PositiveInt
from mmjax.serve.schema import ChatFields, ChatRequest, GenerationFields, StreamOptions
from pydantic import ValidationError as FormError
from pydantic import field_validator

from mmjax.types import RequestError, ValidationError

Json = dict[str, Any]
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
THINKS = {"enabled": True, "adaptive": True, "between_tools": True, "disabled": False}


class CountTokensRequest(GenerationFields, ChatFields):
    messages: published.Conversation
    """The conversation, whose roles are `user` and `assistant`. The model continues a last message of the assistant."""
    system: published.System | None = None
    """A system message before the conversation."""
    tools: published.Tools | None = None
    """The functions that the model may call."""
    tool_choice: published.ToolChoice | None = None
    """Which tools the model may or must call; null: `auto`."""
    thinking: published.ThinkingChoice | None = None
    """Sets `enable_thinking` of the chat template."""
    output_config: published.OutputConfig | None = None
    """The form of the output: a JSON schema."""
    stop_sequences: list[NonEmptyString] | None = None
    """Texts that end the output."""
    metadata: Json | None = None
    """Accepted, but not used."""

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[Json] | None) -> list[Json] | None:
        """Replaces the validator of this name in ChatFields, whose tools have another form."""
        for tool in tools or ():
            if tool.get("type") not in (None, "custom"):
                raise ValueError(f"tools of type {tool['type']!r} are not offered here; describe one of your own")
            if not isinstance(tool.get("name"), str) or not isinstance(tool.get("input_schema"), dict):
                raise ValueError("each must be {'name': ..., 'input_schema': {...}}")
        return tools

    @field_validator("tool_choice")
    @classmethod
    def _check_tool_choice(cls, choice: Json | None) -> Json | None:
        named = choice is not None and choice.get("type") == "tool" and isinstance(choice.get("name"), str)
        if choice is None or named or choice.get("type") in CHOICES:
            return choice
        raise ValueError("must be {'type': 'auto'}, 'any', 'none' or {'type': 'tool', 'name': ...}")

    @field_validator("thinking")
    @classmethod
    def _check_thinking(cls, thinking: Json | None) -> Json | None:
        if thinking is not None and thinking.get("type") not in THINKS:
            raise ValueError(f"type must be one of {', '.join(THINKS)}")
        return thinking

    @field_validator("output_config")
    @classmethod
    def _check_output_config(cls, config: Json | None) -> Json | None:
        output_format = (config or {}).get("format")
        has_schema = isinstance(output_format, dict) and isinstance(output_format.get("schema"), dict)
        if output_format is None or (has_schema and output_format.get("type") == "json_schema"):
            return config
        raise ValueError("format must be {'type': 'json_schema', 'schema': {...}}")

    def chat(self) -> ChatRequest:
        """The same request to /v1/chat/completions. ValidationError for an invalid message."""
        names = (GenerationFields.model_fields.keys() | ChatFields.model_fields.keys()) - {"tools", "stop"}
        fields = {name: getattr(self, name) for name in names}
        messages = chat_messages(self.messages, self.system)
        if messages[-1]["role"] == "assistant":
            fields |= {"add_generation_prompt": False, "continue_final_message": True}
        if self.thinking is not None:
            thinks = {"enable_thinking": THINKS[self.thinking["type"]]}
            fields["chat_template_kwargs"] = thinks | (self.chat_template_kwargs or {})
        output_format = (self.output_config or {}).get("format")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        try:
            return ChatRequest(
                **fields,
                messages=messages,
                max_tokens=getattr(self, "max_tokens", None),
                stop=[*stops, *(self.stop_sequences or ())] or None,
                tools=[_function(tool) for tool in self.tools or ()] or None,
                tool_choice=self._chat_tool_choice(),
                parallel_tool_calls=False if (self.tool_choice or {}).get("disable_parallel_tool_use") else None,
                response_format=output_format and {"type": "json_schema", "json_schema": output_format},
                stream_options=StreamOptions(include_usage=True) if self.stream else None,
            )
        except FormError as error:
            faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
            raise RequestValidationError(faults) from None

    def _chat_tool_choice(self) -> str | Json | None:
        choice = self.tool_choice
        if choice is None:
            return None
        if choice["type"] == "tool":
            return {"type": "function", "function": {"name": choice["name"]}}
        return CHOICES[choice["type"]]


class MessagesRequest(CountTokensRequest):
    max_tokens: PositiveInt
    """Most tokens of the output."""


def _function(tool: Json) -> Json:
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def chat_messages(given: list[Json], system: str | list[Json] | None) -> list[Json]:
    """The messages of a chat. Successive messages of one role become one, and results of calls messages of the role
    `tool`. ValidationError names a block that is invalid."""
    if not given:
        raise ValidationError("messages: the list is empty", parameter="messages")
    messages: list[Json] = []
    if system:
        _read_blocks(system, "system", "system", messages)
    for index, message in enumerate(given):
        role = message.get("role")
        if role not in ("user", "assistant", "system"):
            words = f"messages.{index}: role must be user, assistant or system"
            raise ValidationError(words, parameter="messages")
        _read_blocks(message.get("content"), role, f"messages.{index}", messages)
    last = messages[-1]
    if last["role"] == "assistant" and (last.get("tool_calls") or not last["content"]):
        words = f"messages.{len(given) - 1}: the results of its calls, or a text to continue, must follow"
        raise ValidationError(words, parameter="messages")
    return messages


def _read_blocks(content: Any, role: str, where: str, messages: list[Json]) -> None:
    """Add the content of one message."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValidationError(f"{where}: content must be a text or a list of blocks", parameter="messages")
    readers = BLOCKS_OF[role]
    if not content:
        _open_message(role, messages)
    for index, block in enumerate(content):
        block_type = block.get("type") if isinstance(block, dict) else None
        try:
            if not isinstance(block_type, str) or block_type not in readers:
                raise RequestError(f"blocks of type {block_type!r} are not taken; known are {', '.join(readers)}")
            readers[block_type](block, role, messages)
        except RequestError as error:
            field = "system" if role == "system" else "messages"
            raise ValidationError(f"{where}.content.{index}: {error}", parameter=field) from None


def _open_message(role: str, messages: list[Json]) -> Json:
    """The last message, if it has this role, else a new one."""
    if not messages or messages[-1]["role"] != role:
        messages.append({"role": role, "content": []})
    return messages[-1]


def _text(block: Json, role: str, messages: list[Json]) -> None:
    _open_message(role, messages)["content"].append(_text_part(block))


def _image(block: Json, role: str, messages: list[Json]) -> None:
    _open_message(role, messages)["content"].append(_image_part(block))


def _tool_use(block: Json, role: str, messages: list[Json]) -> None:
    if not isinstance(block.get("input"), dict):
        raise RequestError("input must be an object")
    function = {"name": _string(block, "name"), "arguments": json.dumps(block["input"], ensure_ascii=False)}
    call = {"id": _string(block, "id"), "type": "function", "function": function}
    _open_message(role, messages).setdefault("tool_calls", []).append(call)


def _tool_result(block: Json, _: str, messages: list[Json]) -> None:
    content = block.get("content") or ""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in PARTS:
                raise RequestError(f"content must be a text or a list of blocks of type {' or '.join(PARTS)}")
        content = [PARTS[part["type"]](part) for part in content]
    elif not isinstance(content, str):
        raise RequestError("content must be a text or a list of blocks")
    messages.append({"role": "tool", "tool_call_id": _string(block, "tool_use_id"), "content": content})


def _thinking(block: Json, role: str, messages: list[Json]) -> None:
    _open_message(role, messages)["reasoning"] = _string(block, "thinking")


def _redacted_thinking(_: Json, role: str, messages: list[Json]) -> None:
    """Only Anthropic can read it."""
    _open_message(role, messages)


def _text_part(block: Json) -> Json:
    return {"type": "text", "text": _string(block, "text")}


def _image_part(block: Json) -> Json:
    source = block.get("source")
    source_type = source.get("type") if isinstance(source, dict) else None
    if source_type == "url":
        url = _string(source, "url")
    elif source_type == "base64":
        url = f"data:{_string(source, 'media_type')};base64,{_string(source, 'data')}"
    else:
        raise RequestError(
            f"source: type {source_type!r} is not taken; known are base64 and url, and no files are kept"
        )
    return {"type": "image_url", "image_url": {"url": url}}


def _string(block: Any, name: str) -> str:
    if not isinstance(block.get(name), str):
        raise RequestError(f"{name} must be a text")
    return str(block[name])


PARTS: Mapping[str, Callable[[Json], Json]] = {"text": _text_part, "image": _image_part}
ReadBlock = Callable[[Json, str, list[Json]], None]
BLOCKS_OF: Mapping[str, Mapping[str, ReadBlock]] = {
    "system": {"text": _text},
    "user": {"text": _text, "image": _image, "tool_result": _tool_result},
    "assistant": {
        "text": _text,
        "tool_use": _tool_use,
        "thinking": _thinking,
        "redacted_thinking": _redacted_thinking,
    },
}
