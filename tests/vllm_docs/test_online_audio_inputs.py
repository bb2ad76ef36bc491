"""The page's section on audio inputs through a server: audio as data and by URL, in any format and at any rate."""

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile

from mmjax import LLM
from online_server import complete_chat, openai, openai_client, same_tokens, token_ids_of
from prompts import base64_wav, chat_one, generate_one, random_chord, user_messages
from web import Site

Shared = Callable[[str], LLM]
QUESTION = "What's in this audio?"


def sound(samples: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64_wav(samples), "format": "wav"}, **more}


def link(place: str, **more: Any) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": place}, **more}


def test_the_server_of_the_page(shared_llm: Shared, site: Site) -> None:
    """Ultravox: `input_audio` in base64, `audio_url` by URL and as data; the outputs are those of `generate`."""
    llm = shared_llm("ultravox")
    site.pages |= {
        "/a.wav": base64.b64decode(base64_wav(random_chord(1))),
        "/b.wav": base64.b64decode(base64_wav(random_chord(2))),
    }
    offline = chat_one(llm, user_messages(QUESTION, sound(random_chord(1))))
    array = generate_one(llm, {"prompt": offline.prompt, "multi_modal_data": {"audio": (random_chord(1), 16000)}})
    other, both = (
        chat_one(llm, user_messages(QUESTION, *map(sound, each)))
        for each in ([random_chord(2)], [random_chord(1), random_chord(2)])
    )
    data = f"data:audio/wav;base64,{base64_wav(random_chord(1))}"
    with openai_client(llm) as client:
        forms = [
            sound(random_chord(1)),
            link(site.url("/a.wav")),
            link(data),
            {"audio_url": {"url": site.url("/a.wav")}},
        ]
        assert same_tokens(offline, array, *(complete_chat(client, user_messages(QUESTION, form)) for form in forms))
        assert same_tokens(
            other, complete_chat(client, user_messages(QUESTION, link(site.url("/b.wav"))))
        ) and not same_tokens(offline, other)
        assert same_tokens(
            both, complete_chat(client, user_messages(QUESTION, link(site.url("/a.wav")), sound(random_chord(2))))
        )
        for wrong, words in (
            (link("data:audio/wav;base64,QUJD"), "Invalid or unsupported audio file"),
            ({"type": "input_audio", "input_audio": {"data": "@", "format": "wav"}}, "base64"),
            ({"type": "input_audio", "input_audio": None}, "uuid"),
            ({"type": "audio_url", "audio_url": site.url("/a.wav")}, "audio_url"),
        ):
            with pytest.raises(openai.BadRequestError, match=words):
                complete_chat(client, user_messages(QUESTION, wrong))
        assert same_tokens(offline, complete_chat(client, user_messages(QUESTION, forms[0])))


def test_channels_and_rates(shared_llm: Shared, site: Site) -> None:
    """Files with two channels, another rate or another format are converted for the model."""
    llm = shared_llm("qwen2_5_omni")
    stereo = np.stack([random_chord(1, rate=44100), random_chord(2, rate=44100)], axis=1)
    for kind in ("wav", "flac", "ogg"):
        file = io.BytesIO()
        soundfile.write(file, stereo, 44100, format=kind)
        site.pages[f"/a.{kind}"] = file.getvalue()
    names = [f"/a.{kind}" for kind in ("wav", "flac", "ogg")]
    prompt = str(chat_one(llm, user_messages(QUESTION, sound(random_chord(3)))).prompt)
    wanted = []
    for name in names:
        samples, rate = soundfile.read(io.BytesIO(site.pages[name]), dtype="float32")  # type: ignore[arg-type]
        wanted.append(generate_one(llm, {"prompt": prompt, "multi_modal_data": {"audio": (samples, rate)}}))
    with openai_client(llm) as client:
        for name, want in zip(names, wanted, strict=True):
            assert same_tokens(want, complete_chat(client, user_messages(QUESTION, link(site.url(name)))))
    assert len({seen for seen, _ in token_ids_of(*wanted)}) == 1
