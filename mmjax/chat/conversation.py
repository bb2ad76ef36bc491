"""Messages as clients write them -> messages as templates read them, and the media between them in their order."""

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from mmjax.chat.parts import MediaRef, read_part
from mmjax.types import RequestError, RequestTypeError, TooDeepError

CARRIED = ("name", "tool_call_id")
REASONING = ("reasoning", "reasoning_content", "thinking")  # names under which templates look for it


@dataclasses.dataclass(frozen=True, eq=False)
class Message:
    """One message, read: texts and media in their order, and what else a template may ask for."""

    role: str
    pieces: tuple[str | MediaRef, ...]
    extra: Mapping[str, Any]


def split(messages: Any) -> list[Any]:
    """The conversations of a call: a list of messages is one, a list of lists are many. RequestTypeError for all
    else."""
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


def read(messages: Any) -> list[Message]:
    """Check and read one conversation. RequestTypeError: no messages. RequestError: messages with something
    missing."""
    if not messages:
        raise RequestError("The conversation is empty: it needs at least one message.", "empty_conversation")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> Message:
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
    extra = {name: message[name] for name in CARRIED if isinstance(message.get(name), str)}
    reasoning = next((message[name] for name in REASONING if isinstance(message.get(name), str)), None)
    if reasoning is not None:
        extra |= dict.fromkeys(REASONING, reasoning)
    if message.get("tool_calls"):
        extra["tool_calls"] = _tool_calls(message["tool_calls"], where)
    return Message(role, tuple(part for part in parts if part is not None), extra)


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Tool calls with their arguments parsed: templates print them as JSON, clients send them as text."""
    if not isinstance(calls, (list, tuple)):
        raise RequestTypeError(f"{where}: 'tool_calls' should be a list, got {type(calls).__name__}")
    read = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f"{where}.tool_calls[{index}] needs a 'function' with a name and arguments.", "bad_call")
        arguments = function.get("arguments")
        if not isinstance(arguments, Mapping):
            try:
                arguments = json.loads(arguments) if arguments else {}
            except (TypeError, ValueError) as error:
                raise RequestError(f"{where}.tool_calls[{index}]: arguments are not valid JSON.", "bad_call") from error
            except RecursionError as error:
                raise TooDeepError from error
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read


def media_of(messages: list[Message]) -> list[MediaRef]:
    """Every medium of a conversation, in its order."""
    return [piece for message in messages for piece in message.pieces if isinstance(piece, MediaRef)]


def in_parts(messages: list[Message]) -> list[dict[str, Any]]:
    """Contents as lists of parts: the template itself prints a placeholder where a medium stands."""
    return [
        {
            "role": message.role,
            "content": [
                {"type": piece.modality} if isinstance(piece, MediaRef) else {"type": "text", "text": piece}
                for piece in message.pieces
            ],
            **message.extra,
        }
        for message in messages
    ]


def in_strings(
    messages: list[Message], placeholder: Callable[[str, int], str | None], *, interleave: bool
) -> list[dict[str, Any]]:
    """Contents as strings. `placeholder(kind, number)`: what stands for the number-th medium of a kind, from 1.

    Placeholders that a text does not hold already go in front of it; with `interleave` each stands where its medium
    does. RequestError when a text holds more of one than there are media.
    """
    counts: collections.Counter[str] = collections.Counter()
    made = []
    for message in messages:
        pieces: list[tuple[bool, str]] = []  # (is a placeholder, text)
        for piece in message.pieces:
            if isinstance(piece, str):
                pieces.append((False, piece))
                continue
            counts[piece.modality] += 1
            stands = placeholder(piece.modality, counts[piece.modality])
            if stands:
                pieces.append((True, stands))
        content = "\n".join(text for _, text in pieces) if interleave else _in_front(pieces)
        made.append({"role": message.role, "content": content, **message.extra})
    return made


def _in_front(pieces: list[tuple[bool, str]]) -> str:
    text = "\n".join(text for stands, text in pieces if not stands)
    missing = []
    for stands, count in collections.Counter(text for stands, text in pieces if stands).items():
        left = count - text.count(stands)
        if left < 0:
            raise RequestError(
                f"Found more '{stands}' placeholders in input prompt than actual multimodal data items. Remove them "
                "from the text, or add the media they stand for.",
                "placeholder_mismatch",
            )
        missing += [stands] * left
    return "\n".join([*missing, text] if text else missing)
