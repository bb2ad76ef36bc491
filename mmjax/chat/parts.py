"""One part of a message -> a text, or a medium that is still to be fetched: every form in which clients write them."""

import base64
import dataclasses
import logging
import mimetypes
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mmjax.multimodal.arrays import is_array
from mmjax.types import RequestError, RequestTypeError

log = logging.getLogger(__name__)

TEXTS = ("text", "input_text", "output_text", "refusal", "thinking")


class PartFormat(NamedTuple):
    """What a type of part holds: a modality, under which key, and in which form."""

    modality: str
    key: str
    form: str


MEDIA = {
    "image_url": PartFormat("image", "image_url", "url"),
    "image_pil": PartFormat("image", "image_pil", "object"),
    "image_embeds": PartFormat("image", "image_embeds", "embeds"),
    "audio_url": PartFormat("audio", "audio_url", "url"),
    "input_audio": PartFormat("audio", "input_audio", "sound"),
    "audio_embeds": PartFormat("audio", "audio_embeds", "embeds"),
    "video_url": PartFormat("video", "video_url", "url"),
    "video_embeds": PartFormat("video", "video_embeds", "embeds"),
    "input_image": PartFormat("image", "image_url", "url"),
}
UNTYPED = [form for name, form in MEDIA.items() if name != "input_image"]  # recognised by their key alone
ELSEWHERE = {  # what other libraries call them
    "image": 'write {"type": "image_url", "image_url": {"url": …}} or {"type": "image_pil", "image_pil": …}',
    "video": 'write {"type": "video_url", "video_url": {"url": …}}, or pass arrays to `LLM.generate`',
    "audio": 'write {"type": "input_audio", "input_audio": {"data": base64, "format": "wav"}} or "audio_url"',
}
EXAMPLE = {
    "url": '{{"type": "{key}", "{key}": {{"url": "https://…"}}}}',
    "sound": '{{"type": "{key}", "{key}": {{"data": base64, "format": "wav"}}}}',
    "embeds": '{{"type": "{key}", "{key}": array or base64}}',
    "object": '{{"type": "{key}", "{key}": a PIL image}}',
}


class UnknownPart(RequestError, NotImplementedError):
    """A type of part that nobody here knows."""


@dataclasses.dataclass(frozen=True, eq=False)
class MediaRef:
    """A medium of a conversation. form: "url", "object" or "embeds". value None: to be found in the cache, by uuid."""

    modality: str
    form: str
    value: Any
    uuid: str | None = None


def read_part(part: Any, where: str) -> str | MediaRef | None:
    """A text, a medium, or None for a part that says nothing. `where` names the part in errors.

    RequestTypeError: no part at all. RequestError: a part with something missing; UnknownPart is one.
    """
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RequestTypeError(f"{where} should be a string or a dictionary with a 'type', got {type(part).__name__}")
    name = part.get("type")
    uuid = _uuid(part.get("uuid"), where)
    if name is None:
        form = next((form for form in UNTYPED if form.key in part), None)
        if form is None:
            known = ", ".join(sorted({*TEXTS, *MEDIA}))
            raise RequestError(f"Missing 'type' field in multimodal part. ({where}; known are {known}.)", "bad_part")
        return _medium(form, part, uuid, where, bare=True)
    if not isinstance(name, str):
        raise RequestError(
            f"Invalid 'type' field in multimodal part. ({where}: it must be a string such as 'image_url'.)", "bad_part"
        )
    if name in TEXTS:
        return _text(part, name, where)
    if name not in MEDIA:
        hint = ELSEWHERE.get(name, f"known are {', '.join((*TEXTS, *MEDIA))}")
        raise UnknownPart(f"Unknown part type: {name} ({where}; {hint}).", "unknown_part")
    return _medium(MEDIA[name], part, uuid, where, bare=uuid is not None or name == "input_image")


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


def _medium(form: PartFormat, part: Mapping[str, Any], uuid: str | None, where: str, *, bare: bool) -> MediaRef:
    """`bare`: a URL may stand alone, without the dictionary around it."""
    payload = part.get(form.key)
    empty = payload is None or (isinstance(payload, Mapping) and not payload)
    value = None if empty else READ[form.form](payload, form, where, bare)
    if value is None and uuid is None:
        raise _wrong(form, where, "it is empty and has no `uuid` under which it was sent before")
    return MediaRef(form.modality, "url" if form.form == "sound" else form.form, value, uuid)


def _wrong(form: PartFormat, where: str, found: str) -> RequestError:
    example = EXAMPLE[form.form].format(key=form.key)
    return RequestError(f"{where}: '{form.key}' cannot be read: {found}. Write {example}.", "bad_part")


def _url(payload: Any, form: PartFormat, where: str, bare: bool) -> str | None:
    if isinstance(payload, Mapping):
        if payload.get("detail") not in (None, "auto"):
            log.warning("%s: 'detail' is ignored; the model's processor decides the resolution", where)
        payload, bare = payload.get("url"), True
        if payload is None:
            return None
    if not isinstance(payload, str) or not bare:
        what = "a URL alone, without the dictionary around it" if isinstance(payload, str) else type(payload).__name__
        raise _wrong(form, where, f"got {what}")
    if not payload:
        raise _wrong(form, where, "the URL is empty")
    return payload


def _sound(payload: Any, form: PartFormat, where: str, bare: bool) -> str | None:
    """Sound in base64 as a data: URL."""
    if isinstance(payload, str) and bare:
        return _url(payload, form, where, bare)
    if not isinstance(payload, Mapping):
        raise _wrong(form, where, f"got {type(payload).__name__}")
    data, name = payload.get("data"), payload.get("format", "wav")
    if data is None:
        return None
    if not isinstance(data, str) or not data:
        raise _wrong(form, where, "'data' must be a non-empty string in base64")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]{1,64}", name):
        raise _wrong(form, where, "'format' must be a name such as 'wav' or 'mp3'")
    return f"data:audio/{name};base64,{data}"


def _object(payload: Any, form: PartFormat, where: str, bare: bool) -> Image.Image:
    if not isinstance(payload, Image.Image):
        raise _wrong(form, where, f"got {type(payload).__name__}")
    return payload


def _embeds(payload: Any, form: PartFormat, where: str, bare: bool) -> Any:
    """Base64, an array, or named ones of either; all fields None is None."""
    if isinstance(payload, Mapping):
        if all(value is None for value in payload.values()):
            return None
        for name, value in payload.items():
            if not isinstance(name, str) or not _is_field(value):
                raise _wrong(form, where, f"field {name!r} is a {type(value).__name__}")
        return dict(payload)
    if not _is_field(payload) or isinstance(payload, list):
        raise _wrong(form, where, f"got {type(payload).__name__}")
    return payload


def _is_field(value: Any) -> bool:
    """Base64, an array, or a list: of numbers (sizes) or of arrays."""
    return (isinstance(value, str) and value != "") or is_array(value) or (isinstance(value, list) and bool(value))


READ: Mapping[str, Callable[[Any, PartFormat, str, bool], Any]] = {
    "url": _url,
    "sound": _sound,
    "object": _object,
    "embeds": _embeds,
}


def media_part(kind: str, where: str) -> dict[str, Any]:
    """A message's part from a URL, or from a file whose bytes it then carries. OSError for one that is not there."""
    if where.startswith(("http://", "https://", "data:", "file:")):
        url = where
    else:
        file = Path(where).expanduser()
        mime = mimetypes.guess_type(file.name)[0] or f"{kind}/unknown"
        url = f"data:{mime};base64,{base64.b64encode(file.read_bytes()).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
