"""Parts of a message: every form that clients use, and the error for every mistake."""

import logging
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmjax.chat.parts import MediaRef, UnknownPart, read_part
from mmjax.types import RequestError

PICTURE = Image.new("RGB", (4, 4))
ROWS = np.zeros((3, 8), np.float32)
URL = "https://example.org/a"

TEXTS = [
    ("plain", "plain"),
    ({"type": "text", "text": "a"}, "a"),
    ({"type": "text", "text": ""}, ""),
    ({"type": "input_text", "text": "a"}, "a"),
    ({"type": "output_text", "text": "a"}, "a"),
    ({"type": "refusal", "refusal": "no"}, "no"),
    ({"type": "thinking", "thinking": "hm"}, "hm"),
    ({"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, "a"),
    ({"type": "text", "text": None}, None),
]

# part -> (modality, source, value, uuid)
MEDIA: list[tuple[dict[str, Any], tuple[str, str, Any, str | None]]] = [
    ({"type": "image_url", "image_url": {"url": URL}}, ("image", "url", URL, None)),
    ({"type": "image_url", "image_url": {"url": URL, "detail": "high", "x": 1}, "y": 2}, ("image", "url", URL, None)),
    ({"type": "image_url", "image_url": {"url": URL}, "uuid": "u"}, ("image", "url", URL, "u")),
    ({"type": "image_url", "image_url": {"url": URL}, "uuid": 7}, ("image", "url", URL, "7")),
    ({"type": "image_url", "image_url": URL, "uuid": "u"}, ("image", "url", URL, "u")),
    ({"type": "image_url", "image_url": {}, "uuid": "u"}, ("image", "url", None, "u")),
    ({"type": "image_url", "image_url": {"url": None}, "uuid": "u"}, ("image", "url", None, "u")),
    ({"type": "image_url", "image_url": None, "uuid": "u"}, ("image", "url", None, "u")),
    ({"type": "image_url", "uuid": "u"}, ("image", "url", None, "u")),
    ({"image_url": URL}, ("image", "url", URL, None)),
    ({"image_url": {"url": URL}}, ("image", "url", URL, None)),
    ({"image_url": None, "uuid": "u"}, ("image", "url", None, "u")),
    ({"type": "input_image", "image_url": URL}, ("image", "url", URL, None)),
    ({"type": "image_pil", "image_pil": PICTURE}, ("image", "pil", PICTURE, None)),
    ({"image_pil": PICTURE, "uuid": "u"}, ("image", "pil", PICTURE, "u")),
    ({"type": "image_pil", "image_pil": None, "uuid": "u"}, ("image", "pil", None, "u")),
    ({"type": "image_embeds", "image_embeds": "QUJD"}, ("image", "embeds", "QUJD", None)),
    ({"type": "image_embeds", "image_embeds": ROWS}, ("image", "embeds", ROWS, None)),
    ({"type": "image_embeds", "image_embeds": None, "uuid": "u"}, ("image", "embeds", None, "u")),
    ({"type": "image_embeds", "image_embeds": {"image_embeds": None}, "uuid": "u"}, ("image", "embeds", None, "u")),
    ({"image_embeds": "QUJD"}, ("image", "embeds", "QUJD", None)),
    ({"type": "audio_url", "audio_url": {"url": URL}}, ("audio", "url", URL, None)),
    ({"audio_url": URL}, ("audio", "url", URL, None)),
    ({"type": "audio_embeds", "audio_embeds": "QUJD"}, ("audio", "embeds", "QUJD", None)),
    ({"audio_embeds": "QUJD"}, ("audio", "embeds", "QUJD", None)),
    (
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "mp3"}},
        ("audio", "url", "data:audio/mp3;base64,QUJD", None),
    ),
    (
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}, "uuid": "u"},
        ("audio", "url", "data:audio/wav;base64,QUJD", "u"),
    ),
    ({"type": "input_audio", "input_audio": {"data": "QUJD"}}, ("audio", "url", "data:audio/wav;base64,QUJD", None)),
    ({"type": "input_audio", "input_audio": None, "uuid": "u"}, ("audio", "url", None, "u")),
    ({"input_audio": {"data": "QUJD", "format": "wav"}}, ("audio", "url", "data:audio/wav;base64,QUJD", None)),
    (
        {"input_audio": {"data": "data:audio/mp3;base64,QUJD", "format": "wav"}},
        ("audio", "url", "data:audio/mp3;base64,QUJD", None),
    ),
    ({"input_audio": URL}, ("audio", "url", URL, None)),
    ({"input_audio": None, "uuid": "u"}, ("audio", "url", None, "u")),
    ({"type": "video_url", "video_url": {"url": URL}}, ("video", "url", URL, None)),
    ({"video_url": URL}, ("video", "url", URL, None)),
    ({"type": "video_url", "video_url": None, "uuid": "u"}, ("video", "url", None, "u")),
    ({"type": "video_embeds", "video_embeds": "QUJD"}, ("video", "embeds", "QUJD", None)),
]

WRONG: list[tuple[Any, str]] = [
    ({}, "Missing 'type' field in multimodal part"),
    ({"foo": 1}, "known are audio_embeds, audio_url"),
    ({"type": 3, "text": "a"}, "Invalid 'type' field in multimodal part"),
    ({"type": "text", "text": 3}, "'text' must be a string, got int"),
    ({"type": "image_url", "image_url": URL}, "a URL alone, without the dictionary around it"),
    ({"type": "video_url", "video_url": URL}, 'Write {"type": "video_url", "video_url": {"url": "https://…"}}'),
    ({"type": "image_url"}, "no `uuid` under which it was sent before"),
    ({"type": "image_url", "image_url": {}}, "no `uuid`"),
    ({"type": "image_url", "image_url": None}, "no `uuid`"),
    ({"type": "image_url", "image_url": {"url": 7}}, "got int"),
    ({"type": "image_url", "image_url": {"url": ""}}, "the URL is empty"),
    ({"type": "image_url", "image_url": [URL]}, "got list"),
    ({"type": "image_url", "image_url": {"url": URL}, "uuid": ""}, "uuid must be a non-empty string"),
    ({"type": "image_url", "image_url": {"url": URL}, "uuid": ["a"]}, "uuid must be a non-empty string"),
    ({"type": "image_pil", "image_pil": "cat.png"}, "a PIL image"),
    ({"type": "image_pil", "image_pil": None}, "no `uuid`"),
    ({"type": "input_audio", "input_audio": None}, "no `uuid`"),
    ({"type": "input_audio", "input_audio": "QUJD"}, '{"data": base64, "format": "wav"}'),
    ({"type": "input_audio", "input_audio": {"data": 3, "format": "wav"}}, "'data' must be a non-empty string"),
    ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "'data' must be a non-empty string"),
    ({"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav;base64,"}}, "a name such as 'wav'"),
    ({"type": "image_embeds", "image_embeds": ""}, "array or base64"),
    ({"type": "image_embeds", "image_embeds": 3}, "array or base64"),
    ({"type": "image_embeds", "image_embeds": {"image_embeds": 3}}, "field 'image_embeds' is a int"),
    ({"type": "image_embeds", "image_embeds": {}}, "no `uuid`"),
    ({"type": "audio_embeds", "audio_embeds": None}, "no `uuid`"),
]


@pytest.mark.parametrize(("part", "text"), TEXTS)
def test_texts(part: Any, text: str | None) -> None:
    assert read_part(part, "here") == text


@pytest.mark.parametrize(("part", "expected"), MEDIA)
def test_media(part: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = read_part(part, "here")
    assert isinstance(found, MediaRef)
    modality, source, value, uuid = expected
    assert (found.modality, found.source, found.uuid) == (modality, source, uuid)
    assert found.value is value or found.value == value


@pytest.mark.parametrize(("part", "words"), WRONG)
def test_errors_name_the_part_and_the_fix(part: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_part(part, "messages[0].content[1]")
    assert words in str(caught.value) and "messages[0].content[1]" in str(caught.value)


@pytest.mark.parametrize("part", [3, None, ["text"], b"text"])
def test_objects_that_are_not_parts(part: Any) -> None:
    with pytest.raises(TypeError, match=r"messages\[0\] should be a string or a dictionary"):
        read_part(part, "messages[0]")


@pytest.mark.parametrize(("name", "hint"), [("video", "video_url"), ("image", "image_pil"), ("tool_use", "image_url")])
def test_unknown_types_are_not_implemented_and_bad_requests(name: str, hint: str) -> None:
    with pytest.raises(NotImplementedError, match=f"Unknown part type: {name}") as caught:
        read_part({"type": name, name: "x"}, "here")
    assert isinstance(caught.value, UnknownPart) and isinstance(caught.value, ValueError) and hint in str(caught.value)


def test_ignored_fields_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_part({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, "here")
        read_part({"type": "text", "text": None}, "here")
    assert [word in record.message for word, record in zip(("'detail'", "skipped"), caplog.records, strict=True)]
