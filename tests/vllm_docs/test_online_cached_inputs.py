"""The page's section on cached inputs through a server: media with uuids, then the uuids alone."""

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine_inputs import IMAGE, chat_text
from mmjax import LLM
from mmjax.utils.serial_utils import tensor2base64
from online_server import complete_chat, openai, openai_client, same_tokens
from prompts import (
    base64_image,
    base64_wav,
    chat_one,
    encoder_embeds,
    image_url_part,
    random_chord,
    random_image,
    user_messages,
)
from web import Site, png

Shared = Callable[[str], LLM]


def test_images_and_videos_by_uuid(qwen: LLM, site: Site) -> None:
    """`uuid` beside the payload, then with `null`, `{}` or nothing in its place: nothing is fetched or decoded."""
    site.pages["/a.png"] = png(np.asarray(random_image(1)))
    first = {"type": "image_url", "image_url": {"url": site.url("/a.png")}, "uuid": site.url("/a.png")}
    frames = ",".join(base64_image(random_image(i), "JPEG") for i in range(3))
    clip = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}, "uuid": "clip"}
    one, two = (
        chat_one(qwen, user_messages(image_url_part(random_image(1)), "What?")),
        chat_one(qwen, user_messages(image_url_part(random_image(1)), image_url_part(random_image(2)), "What?")),
    )
    film = chat_one(qwen, user_messages({**clip, "uuid": None}, "What?"))
    qwen.reset_mm_cache()
    with openai_client(qwen) as client:
        assert same_tokens(one, complete_chat(client, user_messages(first, "What?")))
        known = {"type": "image_url", "uuid": first["uuid"]}
        forms = [
            {**known, "image_url": None},
            {**known, "image_url": {}},
            known,
            {**known, "image_url": site.url("/a.png")},
        ]
        assert same_tokens(one, *(complete_chat(client, user_messages(form, "What?")) for form in forms))
        assert same_tokens(
            two, complete_chat(client, user_messages(forms[0], image_url_part(random_image(2)), "What?"))
        )
        assert same_tokens(
            film,
            complete_chat(client, user_messages(clip, "What?")),
            complete_chat(client, user_messages({**clip, "video_url": None}, "What?")),
        )
        later = [
            *user_messages(forms[0], "A?"),
            {"role": "assistant", "content": "B"},
            *user_messages({**clip, "video_url": {}}, "C?"),
        ]
        assert complete_chat(client, later).usage.prompt_tokens > len(film.prompt_token_ids or ())
        assert len(site.seen) == 2  # with a URL again, though the name is known
        for missing in ({**known, "image_url": None, "uuid": "gone"}, {**clip, "video_url": None, "uuid": "gone"}):
            with pytest.raises(openai.BadRequestError, match=r"Cache miss for (image|video) at index 0"):
                complete_chat(client, user_messages(missing))
        with pytest.raises(openai.BadRequestError, match="Cache miss"):
            complete_chat(client, user_messages(forms[0], "What?"), cache_salt="theirs")
        with pytest.raises(openai.BadRequestError, match="uuid"):
            complete_chat(client, user_messages({"type": "image_url", "image_url": None}))
        assert same_tokens(one, complete_chat(client, user_messages(forms[0], "What?")))


def test_audio_by_uuid(shared_llm: Shared, site: Site) -> None:
    """`input_audio` and `audio_url`, cached by either and found by both."""
    llm = shared_llm("ultravox")
    site.pages["/a.wav"] = base64.b64decode(base64_wav(random_chord(1)))
    payload = {"data": base64_wav(random_chord(2)), "format": "wav"}
    named: list[dict[str, Any]] = [
        {"type": "audio_url", "audio_url": {"url": site.url("/a.wav")}, "uuid": "a"},
        {"type": "input_audio", "input_audio": payload, "uuid": "b"},
    ]
    offline = [chat_one(llm, user_messages(part | {"uuid": None}, "What?")) for part in named]
    llm.reset_mm_cache()
    with openai_client(llm) as client:
        for part, want in zip(named, offline, strict=True):
            assert same_tokens(want, complete_chat(client, user_messages(part, "What?")))
        for name, want in zip("ab", offline, strict=True):
            for kind in ("input_audio", "audio_url"):
                assert same_tokens(
                    want, complete_chat(client, user_messages({"type": kind, kind: None, "uuid": name}, "What?"))
                )
    assert not same_tokens(*offline)


def test_embeddings_by_uuid(qwen: LLM) -> None:
    """`image_embeds` with a uuid, then the uuid alone, also beside a cached raw image."""
    (rows,) = encoder_embeds(qwen, {"prompt": chat_text(IMAGE), "multi_modal_data": {"image": random_image(1)}})
    coded = {"image_embeds": tensor2base64(rows), "image_grid_thw": tensor2base64(np.array([1, 4, 6]))}
    part = {"type": "image_embeds", "image_embeds": coded, "uuid": "rows"}
    raw, both = (
        chat_one(qwen, user_messages(image_url_part(random_image(1)), "What?")),
        chat_one(qwen, user_messages(image_url_part(random_image(1)), image_url_part(random_image(1)), "What?")),
    )
    with openai_client(qwen) as client:
        assert same_tokens(
            raw,
            complete_chat(client, user_messages(part, "What?")),
            complete_chat(client, user_messages({**part, "image_embeds": None}, "What?")),
        )
        complete_chat(client, user_messages(image_url_part(random_image(1), uuid="raw"), "What?"))
        known = [{"type": "image_url", "image_url": None, "uuid": "raw"}, {**part, "image_embeds": None}]
        assert same_tokens(both, complete_chat(client, user_messages(*known, "What?")))
