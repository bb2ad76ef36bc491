"""The page's section on cached inputs through a server: media under names, then the names alone."""

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine_inputs import IMAGE, text
from mmjax import LLM
from mmjax.utils.serial_utils import tensor2base64
from online_server import alike, ask, online, openai
from prompts import file_of, pil, reply, rows_of, sound_of, tone, url, user
from web import Site, png

Shared = Callable[[str], LLM]


def test_images_and_clips_by_name(qwen: LLM, site: Site) -> None:
    """`uuid` beside the payload, then with `null`, `{}` or nothing in its place: nothing is fetched or decoded."""
    site.pages["/a.png"] = png(np.asarray(pil(1)))
    first = {"type": "image_url", "image_url": {"url": site.url("/a.png")}, "uuid": site.url("/a.png")}
    frames = ",".join(file_of(pil(i), "JPEG") for i in range(3))
    clip = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}, "uuid": "clip"}
    one, two = reply(qwen, user(url(pil(1)), "What?")), reply(qwen, user(url(pil(1)), url(pil(2)), "What?"))
    film = reply(qwen, user({**clip, "uuid": None}, "What?"))
    qwen.reset_mm_cache()
    with online(qwen) as client:
        assert alike(one, ask(client, user(first, "What?")))
        known = {"type": "image_url", "uuid": first["uuid"]}
        forms = [
            {**known, "image_url": None},
            {**known, "image_url": {}},
            known,
            {**known, "image_url": site.url("/a.png")},
        ]
        assert alike(one, *(ask(client, user(form, "What?")) for form in forms))
        assert alike(two, ask(client, user(forms[0], url(pil(2)), "What?")))
        assert alike(film, ask(client, user(clip, "What?")), ask(client, user({**clip, "video_url": None}, "What?")))
        later = [*user(forms[0], "A?"), {"role": "assistant", "content": "B"}, *user({**clip, "video_url": {}}, "C?")]
        assert ask(client, later).usage.prompt_tokens > len(film.prompt_token_ids or ())
        assert len(site.seen) == 2  # with a URL again, though the name is known
        for missing in ({**known, "image_url": None, "uuid": "gone"}, {**clip, "video_url": None, "uuid": "gone"}):
            with pytest.raises(openai.BadRequestError, match=r"Cache miss for (image|video) at index 0"):
                ask(client, user(missing))
        with pytest.raises(openai.BadRequestError, match="Cache miss"):
            ask(client, user(forms[0], "What?"), cache_salt="theirs")
        with pytest.raises(openai.BadRequestError, match="uuid"):
            ask(client, user({"type": "image_url", "image_url": None}))
        assert alike(one, ask(client, user(forms[0], "What?")))


def test_sound_by_name(shared_llm: Shared, site: Site) -> None:
    """`input_audio` and `audio_url`, named by either and recalled by both."""
    llm = shared_llm("ultravox")
    site.pages["/a.wav"] = base64.b64decode(sound_of(tone(1)))
    payload = {"data": sound_of(tone(2)), "format": "wav"}
    named: list[dict[str, Any]] = [
        {"type": "audio_url", "audio_url": {"url": site.url("/a.wav")}, "uuid": "a"},
        {"type": "input_audio", "input_audio": payload, "uuid": "b"},
    ]
    offline = [reply(llm, user(part | {"uuid": None}, "What?")) for part in named]
    llm.reset_mm_cache()
    with online(llm) as client:
        for part, want in zip(named, offline, strict=True):
            assert alike(want, ask(client, user(part, "What?")))
        for name, want in zip("ab", offline, strict=True):
            for kind in ("input_audio", "audio_url"):
                assert alike(want, ask(client, user({"type": kind, kind: None, "uuid": name}, "What?")))
    assert not alike(*offline)


def test_rows_by_name(qwen: LLM) -> None:
    """`image_embeds` under a name, then the name; a raw image may be recalled beside it."""
    (rows,) = rows_of(qwen, {"prompt": text(IMAGE), "multi_modal_data": {"image": pil(1)}})
    coded = {"image_embeds": tensor2base64(rows), "image_grid_thw": tensor2base64(np.array([1, 4, 6]))}
    part = {"type": "image_embeds", "image_embeds": coded, "uuid": "rows"}
    raw, both = reply(qwen, user(url(pil(1)), "What?")), reply(qwen, user(url(pil(1)), url(pil(1)), "What?"))
    with online(qwen) as client:
        assert alike(raw, ask(client, user(part, "What?")), ask(client, user({**part, "image_embeds": None}, "What?")))
        ask(client, user(url(pil(1), uuid="raw"), "What?"))
        known = [{"type": "image_url", "image_url": None, "uuid": "raw"}, {**part, "image_embeds": None}]
        assert alike(both, ask(client, user(*known, "What?")))
