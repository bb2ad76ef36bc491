"""Reads one part of a message, in any form that clients use: text, or a reference to a media item."""

import base64
import dataclasses
import logging
import mimetypes
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from PIL import Image

from mmjax.multimodal.arrays import is_array
from mmjax.types import RequestError, RequestTypeError

log = logging.getLogger(__name__)

TEXT_TYPES = ("text", "input_text", "output_text", "refusal", "thinking")

Payload: TypeAlias = Literal["url", "pil", "base64_audio", "embeds"]
"""The payload of a part: a URL, a PIL image, an audio file in base64, or embeddings."""


class PartFormat(NamedTuple):
    """The format of a type of part: its modality, the key of its payload, and the type of payload."""

    modality: str
    key: str
    payload: Payload


MEDIA_TYPES = {
    "image_url": PartFormat("image", "image_url", "url"),
    "image_pil": PartFormat("image", "image_pil", "pil"),
    "image_embeds": PartFormat("image", "image_embeds", "embeds"),
    "audio_url": PartFormat("audio", "audio_url", "url"),
    "input_audio": PartFormat("audio", "input_audio", "base64_audio"),
    "audio_embeds": PartFormat("audio", "audio_embeds", "embeds"),
    "video_url": PartFormat("video", "video_url", "url"),
    "video_embeds": PartFormat("video", "video_embeds", "embeds"),
    "input_image": PartFormat("image", "image_url", "url"),
}
UNTYPED = [
    part_format for name, part_format in MEDIA_TYPES.items() if name != "input_image"
]  # recognized by the key alone
HINTS = {  # for types of parts in other libraries
    "image": 'write {"type": "image_url", "image_url": {"url": …}} or {"type": "image_pil", "image_pil": …}',
    "video": 'write {"type": "video_url", "video_url": {"url": …}}, or pass arrays to `LLM.generate`',
    "audio": 'write {"type": "input_audio", "input_audio": {"data": base64, "format": "wav"}} or "audio_url"',
}
EXAMPLES: Mapping[Payload, str] = {
    "url": '{{"type": "{key}", "{key}": {{"url": "https://…"}}}}',
    "base64_audio": '{{"type": "{key}", "{key}": {{"data": base64, "format": "wav"}}}}',
    "embeds": '{{"type": "{key}", "{key}": array or base64}}',
    "pil": '{{"type": "{key}", "{key}": a PIL image}}',
}


class UnknownPart(RequestError, NotImplementedError):
    """A part of an unknown type."""


@dataclasses.dataclass(frozen=True, eq=False)
class MediaRef:
    """A media item of a conversation. source: where its data come from. value: a URL, a PIL image, or embeddings as
    an array, base64 text or a dictionary of these; None for an item that the processor cache has under its uuid."""

    modality: str
    source: Literal["url", "pil", "embeds"]
    value: Any
    uuid: str | None = None


def read_part(part: Any, where: str) -> str | MediaRef | None:
    """A text, a media item, or None for a part without content. where: the part's name in errors.

    RequestTypeError for an object that is not a part, RequestError for a part that is incomplete or of an unknown type.
    """
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RequestTypeError(f"{where} should be a string or a dictionary with a 'type', got {type(part).__name__}")
    name = part.get("type")
    uuid = _uuid(part.get("uuid"), where)
    if name is None:
        part_format = next((each for each in UNTYPED if each.key in part), None)
        if part_format is None:
            known = ", ".join(sorted({*TEXT_TYPES, *MEDIA_TYPES}))
            raise RequestError(f"Missing 'type' field in multimodal part. ({where}; known are {known}.)", "bad_part")
        return _media_ref(part_format, part, uuid, where, bare=True)
    if not isinstance(name, str):
        raise RequestError(
            f"Invalid 'type' field in multimodal part. ({where}: it must be a string such as 'image_url'.)", "bad_part"
        )
    if name in TEXT_TYPES:
        return _text(part, name, where)
    if name not in MEDIA_TYPES:
        hint = HINTS.get(name, f"known are {', '.join((*TEXT_TYPES, *MEDIA_TYPES))}")
        raise UnknownPart(f"Unknown part type: {name} ({where}; {hint}).", "unknown_part")
    return _media_ref(MEDIA_TYPES[name], part, uuid, where, bare=uuid is not None or name == "input_image")


def _text(part: Mapping[str, Any], name: str, where: str) -> str | None:
    text = part.get(name, part.get("text"))
    if text is None:
        log.warning("%s of type %r holds no text and is skipped", where, name)
        return None
    if not isinstance(text, str):
        raise RequestError(f"{where}: '{name}' must be a string, got {type(text).__name__}.", "bad_part")
    return text


def _uuid(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, (Mapping, list, tuple)) or not str(value):
        raise RequestError(f"{where}: uuid must be a non-empty string.", "bad_uuid")
    return str(value)


def _media_ref(
    part_format: PartFormat, part: Mapping[str, Any], uuid: str | None, where: str, *, bare: bool
) -> MediaRef:
    """bare: whether the payload may be a URL without a dictionary around it."""
    payload = part.get(part_format.key)
    empty = payload is None or (isinstance(payload, Mapping) and not payload)
    value = None if empty else READERS[part_format.payload](payload, part_format, where, bare)
    if value is None and uuid is None:
        raise _unreadable(part_format, where, "it is empty and has no `uuid` under which it was sent before")
    source = "url" if part_format.payload == "base64_audio" else part_format.payload
    return MediaRef(part_format.modality, source, value, uuid)


def _unreadable(part_format: PartFormat, where: str, reason: str) -> RequestError:
    example = EXAMPLES[part_format.payload].format(key=part_format.key)
    return RequestError(f"{where}: '{part_format.key}' cannot be read: {reason}. Write {example}.", "bad_part")


def _url(payload: Any, part_format: PartFormat, where: str, bare: bool) -> str | None:
    if isinstance(payload, Mapping):
        if payload.get("detail") not in (None, "auto"):
            log.warning("%s: 'detail' is ignored; the model's processor decides the resolution", where)
        payload, bare = payload.get("url"), True
        if payload is None:
            return None
    if not isinstance(payload, str) or not bare:
        found = "a URL alone, without the dictionary around it" if isinstance(payload, str) else type(payload).__name__
        raise _unreadable(part_format, where, f"got {found}")
    if not payload:
        raise _unreadable(part_format, where, "the URL is empty")
    return payload


def _base64_audio(payload: Any, part_format: PartFormat, where: str, bare: bool) -> str | None:
    """An audio file in base64, as a data: URL."""
    if isinstance(payload, str) and bare:
        return _url(payload, part_format, where, bare)
    if not isinstance(payload, Mapping):
        raise _unreadable(part_format, where, f"got {type(payload).__name__}")
    data, name = payload.get("data"), payload.get("format", "wav")
    if data is None:
        return None
    if not isinstance(data, str) or not data:
        raise _unreadable(part_format, where, "'data' must be a non-empty string in base64")
    if data[:5].lower() == "data:":
        return data
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]{1,64}", name):
        raise _unreadable(part_format, where, "'format' must be a name such as 'wav' or 'mp3'")
    return f"data:audio/{name};base64,{data}"


def _pil(payload: Any, part_format: PartFormat, where: str, bare: bool) -> Image.Image:
    if not isinstance(payload, Image.Image):
        raise _unreadable(part_format, where, f"got {type(payload).__name__}")
    return payload


def _embeds(payload: Any, part_format: PartFormat, where: str, bare: bool) -> Any:
    """Base64 text, an array, or a dictionary of these; None for a dictionary of nothing but None."""
    if isinstance(payload, Mapping):
        if all(value is None for value in payload.values()):
            return None
        for name, value in payload.items():
            if not isinstance(name, str) or not _is_field(value):
                raise _unreadable(part_format, where, f"field {name!r} is a {type(value).__name__}")
        return dict(payload)
    if not _is_field(payload) or isinstance(payload, list):
        raise _unreadable(part_format, where, f"got {type(payload).__name__}")
    return payload


def _is_field(value: Any) -> bool:
    """Base64 text, an array, or a list of numbers (sizes) or of arrays."""
    return (isinstance(value, str) and value != "") or is_array(value) or (isinstance(value, list) and bool(value))


READERS: Mapping[Payload, Callable[[Any, PartFormat, str, bool], Any]] = {
    "url": _url,
    "base64_audio": _base64_audio,
    "pil": _pil,
    "embeds": _embeds,
}


def media_part(modality: str, source: str) -> dict[str, Any]:
    """The part of a message for a URL, or for a file, whose bytes are included. OSError for a file that cannot be
    read."""
    if source.startswith(("http://", "https://", "data:", "file:")):
        url = source
    else:
        file = Path(source).expanduser()
        mime = mimetypes.guess_type(file.name)[0] or f"{modality}/unknown"
        url = f"data:{mime};base64,{base64.b64encode(file.read_bytes()).decode()}"
    return {"type": f"{modality}_url", f"{modality}_url": {"url": url}}
