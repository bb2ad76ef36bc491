"""The page's sections on security and timeouts: allowed sources of media, and how long a server waits."""

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmjax import LLM
from online_server import complete_chat, openai, openai_client, same_tokens
from prompts import base64_wav, chat_one, image_url_part, random_chord, random_image, user_messages
from web import Site, png, redirect, trickle

MakeOf = Callable[..., LLM]


def image(place: str) -> list[dict[str, Any]]:
    return user_messages({"type": "image_url", "image_url": {"url": place}}, "What?")


@pytest.fixture
def photograph(site: Site) -> Site:
    """The site with an image on it."""
    import numpy as np

    site.pages["/a.png"] = png(np.asarray(random_image(1)))
    return site


def test_allowed_sources(
    make_llm_of: MakeOf, photograph: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--allowed-media-domains` allows hosts, even private ones, `--allowed-local-media-path` a directory; redirects
    may not leave them."""
    monkeypatch.setenv("VLLM_MEDIA_EGRESS_BLOCK_PRIVATE", "1")
    site, shown = photograph, tmp_path / "shown"
    shown.mkdir()
    for place in (shown / "a picture.png", tmp_path / "secret.png"):
        place.write_bytes(site.pages["/a.png"])  # type: ignore[arg-type]
    site.pages["/away"] = redirect(site.url("/a.png", host="localhost"))
    site.pages["/here"] = redirect("/a.png")
    llm = make_llm_of("qwen2_vl", f"--allowed-media-domains 127.0.0.1 media.example --allowed-local-media-path {shown}")
    good = chat_one(llm, user_messages(image_url_part(random_image(1)), "What?"))
    with openai_client(llm) as client:
        places = [
            site.url("/a.png"),
            site.url("/here"),
            f"file://{shown}/a picture.png",
            f"file://{shown}/a%20picture.png",
        ]
        assert same_tokens(good, *(complete_chat(client, image(place)) for place in places))
        for place, words in (
            (site.url("/a.png", host="localhost"), "allowed domains"),
            (site.url("/away"), "allowed domains"),
            ("http://127.0.0.1.nip.example/a.png", "allowed domains"),
            (f"file://{tmp_path}/secret.png", "must be a subpath"),
            (f"file://{shown}/../secret.png", "must be a subpath"),
            ("ftp://127.0.0.1/a.png", "HTTP, data or file URL"),
        ):
            with pytest.raises(openai.BadRequestError, match=words):
                complete_chat(client, image(place))
        monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
        with pytest.raises(openai.BadRequestError, match="MEDIA_URL_ALLOW_REDIRECTS"):
            complete_chat(client, image(site.url("/here")))
        assert same_tokens(good, complete_chat(client, image(places[0])))


def test_sources_refused_by_default(qwen: LLM, photograph: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without flags: no private addresses and no files; a refusal by the host is a client error."""
    good = chat_one(qwen, user_messages(image_url_part(random_image(1)), "What?"))
    with openai_client(qwen) as client:
        with pytest.raises(openai.UnprocessableEntityError, match="HTTP status 404"):
            complete_chat(client, image(photograph.url("/none.png")))
        monkeypatch.setenv("VLLM_MEDIA_EGRESS_BLOCK_PRIVATE", "1")
        with pytest.raises(openai.BadRequestError, match="private networks"):
            complete_chat(client, image(photograph.url("/a.png")))
        with pytest.raises(openai.BadRequestError, match="--allowed-local-media-path"):
            complete_chat(client, image("file:///etc/passwd"))
        assert same_tokens(good, complete_chat(client, user_messages(image_url_part(random_image(1)), "What?")))


def test_timeouts(shared_llm: Callable[[str], LLM], photograph: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """`VLLM_IMAGE_FETCH_TIMEOUT`, `VLLM_VIDEO_FETCH_TIMEOUT` and `VLLM_AUDIO_FETCH_TIMEOUT`, each for its modality."""
    site, llm = photograph, shared_llm("qwen2_5_omni")
    site.pages |= {"/slow": trickle(0.05, 200), "/a.wav": base64.b64decode(base64_wav(random_chord(1)))}
    good = chat_one(llm, user_messages(image_url_part(random_image(1)), "What?"))
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    for kind in ("image", "video", "audio"):
        monkeypatch.setenv(f"VLLM_{kind.upper()}_FETCH_TIMEOUT", "20")
    with openai_client(llm) as client:
        for kind in ("image", "video", "audio"):
            with monkeypatch.context() as hurry:
                hurry.setenv(f"VLLM_{kind.upper()}_FETCH_TIMEOUT", "0.2")
                begin = time.monotonic()
                with pytest.raises(openai.BadRequestError, match=r"took longer than 0\.2 s"):
                    complete_chat(
                        client, user_messages({"type": f"{kind}_url", f"{kind}_url": {"url": site.url("/slow")}})
                    )
                assert time.monotonic() - begin < 5
        assert same_tokens(good, complete_chat(client, image(site.url("/a.png"))))
