"""Messages to contents: positions and numbers of placeholders, and other fields of messages."""

from typing import Any

import pytest

from mmjax.chat.conversation import media_of, read_messages, split, with_parts, with_strings
from mmjax.types import RequestError

PHI = {"image": "<|image_{i}|>", "audio": "Audio {i}: <|audio|>", "video": "<video>"}


def image(name: str = "a") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"https://example.org/{name}"}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def strings(*messages: dict[str, Any], interleave: bool = False) -> list[str]:
    def placeholder(kind: str, number: int) -> str:
        return PHI[kind].replace("{i}", str(number))

    return [
        message["content"]
        for message in with_strings(read_messages(list(messages)), placeholder, interleave=interleave)
    ]


VIDEO = {"type": "video_url", "video_url": {"url": "https://example.org/v"}}
AUDIO = {"type": "audio_url", "audio_url": {"url": "https://example.org/s"}}
BOTH = "What's in <|image_1|> and how does it compare to <|image_2|>?"
ONE = "What's in <|image_1|> and how does it compare to the other one?"
QUIET = [
    ((image(), "What's in the image?"), "<|image_1|>\nWhat's in the image?"),
    (("What's in the image?", image()), "<|image_1|>\nWhat's in the image?"),
    ((image(), image(), "What's in these images?"), "<|image_1|>\n<|image_2|>\nWhat's in these images?"),
    ((image(), image(), BOTH), BOTH),
    ((image(), image(), ONE), "<|image_2|>\n" + ONE),
    ((image(),), "<|image_1|>"),
    ((image(), image()), "<|image_1|>\n<|image_2|>"),
    (("a", "b"), "a\nb"),
    (("a", image(), "b"), "<|image_1|>\na\nb"),
    ((VIDEO, image(), AUDIO, VIDEO, "x"), "<video>\n<video>\n<|image_1|>\nAudio 1: <|audio|>\nx"),
    (("look: <video>", VIDEO, VIDEO), "<video>\nlook: <video>"),
    ((), ""),
]


@pytest.mark.parametrize(("parts", "content"), QUIET)
def test_missing_placeholders_go_in_front(parts: tuple[Any, ...], content: str) -> None:
    assert strings(user(*parts)) == [content]


def test_numbers_count_over_the_conversation() -> None:
    answer = {"role": "assistant", "content": "A cat."}
    assert strings(user(image(), "this?"), answer, user("and this?", image(), AUDIO)) == [
        "<|image_1|>\nthis?",
        "A cat.",
        "<|image_2|>\nAudio 1: <|audio|>\nand this?",
    ]


def test_interleaving_keeps_the_order_of_the_parts() -> None:
    parts = ("Compare", image(), "with", image(), "and", AUDIO)
    assert strings(user(*parts), interleave=True) == [
        "Compare\n<|image_1|>\nwith\n<|image_2|>\nand\nAudio 1: <|audio|>"
    ]


@pytest.mark.parametrize("text", ["<|image_1|> <|image_1|>", "<|image_1|><|image_1|>, I said"])
def test_more_placeholders_than_media(text: str) -> None:
    with pytest.raises(RequestError, match=r"Found more '<\|image_1\|>' placeholders in input prompt than actual"):
        strings(user(image(), text))


def test_parts_for_templates_that_loop() -> None:
    (message,) = with_parts(read_messages([user("a", image(), AUDIO, "b", VIDEO)]))
    assert message["content"] == [
        {"type": "text", "text": "a"},
        {"type": "image"},
        {"type": "audio"},
        {"type": "text", "text": "b"},
        {"type": "video"},
    ]
    plain, silent = with_parts(
        read_messages([{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}])
    )
    assert plain["content"] == [{"type": "text", "text": "hi"}] and silent["content"] == []


def test_media_in_the_order_of_the_conversation() -> None:
    messages = [{"role": "system", "content": [image("a")]}, user("x", AUDIO, image("b")), user(image("c"))]
    assert [m.value[-1] for m in media_of(read_messages(messages))] == ["a", "s", "b", "c"]


def test_other_fields_of_a_message() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, 2]}'}}
    messages = [
        {"role": "user", "name": "Ann", "content": "hi", "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    first, second, third = with_parts(read_messages(messages))
    assert first == {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "hi"}]}
    assert second["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": [1, 2]}}
    assert second["reasoning"] == second["reasoning_content"] == "hm" and third["tool_call_id"] == "1"
    assert call["function"]["arguments"] == '{"x": [1, 2]}'  # the caller's message is not changed


@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        ([], RequestError, "at least one message"),
        ([3], TypeError, r"messages\[0\] should be a dictionary"),
        ([{"content": "x"}], RequestError, "'role' must be a string"),
        ([{"role": 3, "content": "x"}], RequestError, "'role' must be a string"),
        ([user("x"), {"role": "", "content": "x"}], RequestError, r"messages\[1\]: 'role'"),
        ([{"role": "user", "content": 3}], TypeError, "string or a list of parts"),
        ([{"role": "user", "content": {"type": "text"}}], TypeError, "string or a list of parts"),
        ([user(7)], TypeError, r"messages\[0\].content\[0\]"),
        ([{"role": "assistant", "tool_calls": 3}], TypeError, "'tool_calls' should be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], RequestError, "needs a 'function'"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}],
            RequestError,
            "not valid JSON",
        ),
    ],
)
def test_broken_messages(messages: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_messages(messages)


def test_one_conversation_or_many() -> None:
    one = [user("x")]
    assert split(one) == [one] and split([one, one]) == [one, one] and split([]) == [] and split([[]]) == [[]]
    for wrong in ("x", user("x"), 3, None, [one, user("x")]):
        with pytest.raises(TypeError, match="messages"):
            split(wrong)
