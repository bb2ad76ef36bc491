"""Reads the messages of clients, and rewrites them into the form that templates expect."""

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from mmjax.chat.parts import MediaRef, read_part
from mmjax.types import RequestError, RequestTypeError, TooDeepError

COPIED_FIELDS = ("name", "tool_call_id")
REASONING_FIELDS = ("reasoning", "reasoning_content", "thinking")  # templates use any of these names


@dataclasses.dataclass(frozen=True, eq=False)
class Message:
    """One message: its texts and media in their order, and the other fields that a template may read."""

    role: str
    parts: tuple[str | MediaRef, ...]
    extra: Mapping[str, Any]


def split(messages: Any) -> list[Any]:
    """The conversations of a call: a list of messages is one, a list of such lists is many. RequestTypeError for other
    objects."""
    if not isinstance(messages, (list, tuple)):
        raise RequestTypeError(
            "messages should be a list of messages (dictionaries with 'role' and 'content'), or a list of such lists; "
            f"got {type(messages).__name__}"
        )
    nested = [isinstance(entry, (list, tuple)) for entry in messages]
    if any(nested):
        if not all(nested):
            raise RequestTypeError("messages mixes messages and conversations: pass a list of either")
        return list(messages)
    return [messages] if messages else []


def read_messages(messages: Any) -> list[Message]:
    """Check and read one conversation. RequestTypeError for objects that are not messages, RequestError for incomplete
    messages."""
    if not messages:
        raise RequestError("The conversation is empty: it needs at least one message.", "empty_conversation")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise RequestTypeError(
            f"{where} should be a dictionary with 'role' and 'content', got {type(message).__name__}"
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}: 'role' must be a string such as 'user'.", "bad_message")
    if content is None:
        content = []
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, (list, tuple)):
        raise RequestTypeError(
            f"{where}: 'content' should be a string or a list of parts, got {type(content).__name__}"
        )
    parts = [read_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    extra = {name: message[name] for name in COPIED_FIELDS if isinstance(message.get(name), str)}
    reasoning = next((message[name] for name in REASONING_FIELDS if isinstance(message.get(name), str)), None)
    if reasoning is not None:
        extra |= dict.fromkeys(REASONING_FIELDS, reasoning)
    if message.get("tool_calls"):
        extra["tool_calls"] = _read_tool_calls(message["tool_calls"], where)
    return Message(role, tuple(part for part in parts if part is not None), extra)


def _read_tool_calls(calls: Any, where: str) -> list[Any]:
    """Tool calls with parsed arguments: clients send JSON text, but templates print the values. Text that is not JSON
    is passed on as it is: a model wrote it, and must see what it wrote."""
    if not isinstance(calls, (list, tuple)):
        raise RequestTypeError(f"{where}: 'tool_calls' should be a list, got {type(calls).__name__}")
    parsed = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f"{where}.tool_calls[{index}] needs a 'function' with a name and arguments.", "bad_call")
        arguments = function.get("arguments")
        if not isinstance(arguments, Mapping):
            try:
                arguments = json.loads(arguments) if arguments else {}
            except ValueError:
                pass
            except TypeError as error:
                raise RequestError(f"{where}.tool_calls[{index}]: arguments are not valid JSON.", "bad_call") from error
            except RecursionError as error:
                raise TooDeepError from error
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    return parsed


def media_of(messages: list[Message]) -> list[MediaRef]:
    """Every media item of a conversation, in order."""
    return [part for message in messages for part in message.parts if isinstance(part, MediaRef)]


def with_parts(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages with their contents as lists of parts. The template prints the placeholders of media."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": part.modality} if isinstance(part, MediaRef) else {"type": "text", "text": part}
                for part in message.parts
            ],
            **message.extra,
        }
        for message in messages
    ]


def with_strings(
    messages: list[Message], placeholder: Callable[[str, int], str | None], *, interleave: bool
) -> list[dict[str, Any]]:
    """The messages with their contents as strings. placeholder: (modality, number from 1) -> text for that item.

    Placeholders that a text does not contain yet are put in front of it; with `interleave`, each is put where its item
    is. RequestError if a text contains more placeholders than there are items.
    """
    counts: collections.Counter[str] = collections.Counter()
    rewritten = []
    for message in messages:
        texts: list[tuple[bool, str]] = []  # (is a placeholder, text)
        for part in message.parts:
            if isinstance(part, str):
                texts.append((False, part))
                continue
            counts[part.modality] += 1
            text = placeholder(part.modality, counts[part.modality])
            if text:
                texts.append((True, text))
        content = "\n".join(text for _, text in texts) if interleave else _placeholders_first(texts)
        rewritten.append({"role": message.role, "content": content, **message.extra})
    return rewritten


def _placeholders_first(texts: list[tuple[bool, str]]) -> str:
    content = "\n".join(text for is_placeholder, text in texts if not is_placeholder)
    missing = []
    for text, count in collections.Counter(text for is_placeholder, text in texts if is_placeholder).items():
        num_missing = count - content.count(text)
        if num_missing < 0:
            raise RequestError(
                f"Found more '{text}' placeholders in input prompt than actual multimodal data items. Remove them "
                "from the text, or add the media they stand for.",
                "placeholder_mismatch",
            )
        missing += [text] * num_missing
    return "\n".join([*missing, content] if content else missing)
