"""Messages to prompts: formats, options, counts, and concurrent fetching, with and without an event loop."""

import asyncio
import concurrent.futures
import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmjax.chat import ChatOptions, ChatRenderer, ChatTemplateResolutionError, StoredTemplates
from mmjax.inputs.parse import check_count
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

LOOP = (
    "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}"
    "{{ '<' ~ c.type ~ '>' if c.type != 'text' else c.text }}{% endfor %}{% endfor %}"
)
PRINT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


class Source:
    """A connector that returns the URL as the media item. `bad` fails, `slow` waits until it is cancelled."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.cancelled: list[str] = []
        self.together = threading.Barrier(2, timeout=30)

    def _fetch(self, modality: str, url: str) -> str:
        self.seen.append(f"{modality}:{url}")
        if url == "meet":
            self.together.wait()
        if url.startswith("bad"):
            raise RequestError(f"cannot fetch {url}", "bad_url")
        return f"{modality} at {url}"

    def fetch(self, modality: str, url: str) -> Any:
        return self._fetch(modality, url)

    async def fetch_async(self, modality: str, url: str) -> Any:
        if url == "slow":
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                self.cancelled.append(url)
                raise
        await asyncio.sleep(0)
        return self._fetch(modality, url)

    def decode_embeds(self, modality: str, text: str) -> Any:
        return np.full((2 if modality == "image" else 3, 4), len(text), np.float32)


class AtOnce(concurrent.futures.Executor):
    """An executor that runs a call before `submit` returns."""

    def submit(self, work: Any, /, *arguments: Any, **options: Any) -> "concurrent.futures.Future[Any]":
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            done.set_result(work(*arguments, **options))
        except Exception as error:
            done.set_exception(error)
        return done


def make(template: str | None = PRINT, *, source: Source | None = None, limit: int = 9, **options: Any) -> ChatRenderer:
    def check(modality: str, count: int, num_embeds: int) -> None:
        check_count(modality, count, limit, None)

    def connect(io_kwargs: Mapping[str, Any]) -> Source:
        connect_calls.append(io_kwargs)
        return source or Source()

    connect_calls: list[Mapping[str, Any]] = []
    stored = StoredTemplates({"default": template} if template else {}, {}, {})
    chat = ChatRenderer(
        stored, placeholder={"image": "<|image_{i}|>", "video": "<v>"}, check=check, connect=connect, **options
    )
    chat.connect_calls = connect_calls  # type: ignore[attr-defined]
    return chat


def prompt_of(chat: ChatRenderer, messages: Any, options: ChatOptions) -> dict[str, Any]:
    """The prompt of one conversation, with its media fetched."""
    return chat.fetch(chat.render(messages, options))


async def prompt_of_async(chat: ChatRenderer, messages: Any, options: ChatOptions) -> dict[str, Any]:
    """`prompt_of` on an event loop."""
    return await chat.fetch_async(chat.render(messages, options))


def image(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **more}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


PLAIN = ChatOptions()


def test_format_follows_the_template(caplog: pytest.LogCaptureFixture) -> None:
    messages = user("a", image("x"), "b")
    assert make(LOOP).render(messages, PLAIN).prompt == "[user]a<image>b"
    assert make(PRINT).render(messages, PLAIN).prompt == "[user]<|image_1|>\na\nb"
    assert make(PRINT, interleave=True).render(messages, PLAIN).prompt == "[user]a\n<|image_1|>\nb"
    with caplog.at_level(logging.WARNING):
        prompt = make(PRINT).render(messages, ChatOptions(chat_template_content_format="openai"))
        assert (
            prompt.prompt == "[user][{'type': 'text', 'text': 'a'}, {'type': 'image'}, {'type': 'text', 'text': 'b'}]"
        )
        assert make(LOOP, interleave=True).render(messages, PLAIN).prompt == "[user]a<image>b"
    assert "seems to expect contents as 'string'" in caplog.text
    assert "interleave_mm_strings has no effect" in caplog.text


def test_templates_of_call_operator_and_model() -> None:
    messages = user("a")
    assert make(default_template="D{{ 1 }}").render(messages, PLAIN).prompt == "D1"
    assert make(default_template="D{{ 1 }}").render(messages, ChatOptions(chat_template="C{{ 2 }}")).prompt == "C2"
    with pytest.raises(ChatTemplateResolutionError):
        make(None).render(messages, PLAIN)
    with pytest.raises(RequestError, match="set chat_template_content_format to 'string'"):
        make(PRINT.replace("m.content", "m.content + ''")).render(
            messages, ChatOptions(chat_template_content_format="openai")
        )


def test_all_fields_of_a_prompt() -> None:
    source = Source()
    rows = np.zeros((2, 4), np.float32)
    messages = user(
        image("a", uuid="A"),
        {"type": "video_url", "video_url": {"url": "v"}},
        {"type": "image_url", "image_url": None, "uuid": "B"},
        {"type": "image_embeds", "image_embeds": "QUJD"},
        {"type": "image_embeds", "image_embeds": {"image_embeds": rows, "image_grid_thw": [1, 2, 2]}, "uuid": "E"},
        {"type": "image_embeds", "image_embeds": None, "uuid": "F"},
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}},
        "text",
    )
    options = ChatOptions(mm_processor_kwargs={"x": 1}, media_io_kwargs={"video": {"fps": 1}}, cache_salt="s")
    chat = make(source=source)
    prompt = prompt_of(chat, messages, options)
    data, names = prompt["multi_modal_data"], prompt["multi_modal_uuids"]
    assert prompt["prompt"].startswith("[user]<|image_1|>\n<v>\n<|image_2|>") and prompt["prompt"].endswith("\ntext")
    assert data["video"] == ["video at v"] and data["audio"] == ["audio at data:audio/wav;base64,QUJD"]
    assert data["image"][:2] == ["image at a", None] and data["image"][4] is None
    assert data["image"][2]["image_embeds"].shape == (2, 4) and data["image"][3]["image_embeds"] is rows
    assert names == {"image": ["A", "B", None, "E", "F"], "video": [None], "audio": [None]}
    assert (prompt["mm_processor_kwargs"], prompt["cache_salt"]) == ({"x": 1}, "s")
    assert chat.connect_calls == [{"video": {"fps": 1}}] == [prompt["media_io_kwargs"]]  # type: ignore[attr-defined]
    again = asyncio.run(prompt_of_async(chat, messages, options))
    assert again["prompt"] == prompt["prompt"] and again["multi_modal_uuids"] == names
    assert again["multi_modal_data"]["image"][:2] == data["image"][:2] and sorted(source.seen[:3]) == sorted(
        source.seen[3:]
    )


def test_media_are_fetched_together() -> None:
    prompt = prompt_of(make(source=Source()), user(image("meet"), image("meet")), PLAIN)
    assert prompt["multi_modal_data"]["image"] == ["image at meet"] * 2


def test_text_alone_makes_no_connector() -> None:
    chat = make()
    assert prompt_of(chat, user("a"), PLAIN)["multi_modal_data"] == {} and chat.connect_calls == []  # type: ignore[attr-defined]
    assert asyncio.run(prompt_of_async(chat, user("a"), PLAIN))["prompt"] == "[user]a"


def test_counts_are_checked_before_anything_is_fetched() -> None:
    source = Source()
    with pytest.raises(RequestError, match="At most 1 image"):
        prompt_of(make(source=source, limit=1), user(image("a"), image("b")), PLAIN)
    assert source.seen == []


def test_the_first_failure_ends_the_request() -> None:
    chat = make()
    vars(chat)["_threads"] = AtOnce()  # both have failed before the first result is read
    with pytest.raises(RequestError, match="cannot fetch bad1"):
        prompt_of(chat, user(image("a"), image("bad1"), image("bad2")), PLAIN)
    source = Source()
    with pytest.raises(RequestError, match="cannot fetch bad"):
        asyncio.run(prompt_of_async(make(source=source), user(image("slow"), image("bad"), image("a")), PLAIN))
    assert source.cancelled == ["slow"]


def test_audio_of_videos() -> None:
    options = ChatOptions(mm_processor_kwargs={"use_audio_in_video": True})
    messages = user({"type": "video_url", "video_url": {"url": "v"}, "uuid": "V"}, "x")
    prompt = prompt_of(make(), messages, options)
    assert prompt["multi_modal_data"] == {"video": ["video at v"], "audio": ["audio at v"]}
    assert prompt["multi_modal_uuids"] == {"video": ["V"], "audio": ["V"]} and prompt["prompt"] == "[user]<v>\nx"
    by_default = make(processor_kwargs={"use_audio_in_video": True})
    assert set(prompt_of(by_default, messages, PLAIN)["multi_modal_data"]) == {"video", "audio"}
    assert set(prompt_of(make(), messages, PLAIN)["multi_modal_data"]) == {"video"}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"chat_template_content_format": "json"}, RequestError, "must be one of auto, string, openai"),
        ({"continue_final_message": True}, RequestError, "set add_generation_prompt=False"),
        ({"chat_template": 3}, TypeError, "chat_template should be a string"),
        ({"chat_template_kwargs": 3}, TypeError, "chat_template_kwargs should be a dictionary"),
        ({"mm_processor_kwargs": []}, TypeError, "mm_processor_kwargs should be a dictionary"),
        ({"media_io_kwargs": "x"}, TypeError, "media_io_kwargs should be a dictionary"),
        ({"tools": {"type": "function"}}, TypeError, "tools should be a list of dictionaries"),
        ({"tools": [print]}, TypeError, "tools should be a list of dictionaries"),
        ({"documents": ["x"]}, TypeError, "documents should be a list of dictionaries"),
    ],
)
def test_invalid_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ChatOptions(**options)


# family -> [(messages, case of the recorded outputs with the expected prompt)]
IMAGE, VIDEO = {"type": "image_url", "image_url": {"url": "x"}}, {"type": "video_url", "video_url": {"url": "x"}}
AUDIO = {"type": "audio_url", "audio_url": {"url": "x"}}
RECORDED = {
    "phi3v": [
        ("image", [IMAGE, "What is in this image?"]),
        ("two_images_longrope", [IMAGE, IMAGE, "What is the content of each image?"]),
    ],
    "minicpmv26": [("two_images", ["Compare.", IMAGE, IMAGE])],
    "ultravox": [("audio", [AUDIO, "What's in this audio?"])],
    "qwen2_audio": [("two_audios", [AUDIO, AUDIO, "Compare the sounds."])],
    "qwen2_vl": [("image", [IMAGE, "Describe the picture."])],
    "llava": [("image", ["What is in this image?", IMAGE])],
    "llava_onevision": [("image_video", [IMAGE, VIDEO, "Compare."])],
}
STANDS = {
    "phi3v": {"image": "<|image_{i}|>"},
    "minicpmv26": {"image": "(<image>./</image>)"},
    "ultravox": {"audio": "<|audio|>"},
}


@pytest.mark.parametrize("family", RECORDED)
def test_prompts_of_the_reference_checkpoints(family: str, shared: Path) -> None:

    folder = shared / "reference" / family
    golden = json.loads((folder / "golden.json").read_text())["cases"]
    tokenizer = Tokenizer(folder)
    chat = ChatRenderer(
        StoredTemplates.read(folder, tokenizer, None),
        placeholder=STANDS.get(family, {}),
        check=lambda *_: None,
        connect=lambda _: Source(),
    )
    for case, parts in RECORDED[family]:
        assert chat.render(user(*parts), PLAIN).prompt.strip() == golden[case]["prompt"].strip()
