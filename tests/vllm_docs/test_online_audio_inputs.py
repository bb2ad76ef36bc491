"""The page's section on audio inputs through a server: sound as data and by URL, in any file and at any rate."""

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile

from mmjax import LLM
from online_server import alike, ask, heard, online, openai
from prompts import answer, reply, sound_of, tone, user
from web import Site

Shared = Callable[[str], LLM]
QUESTION = "What's in this audio?"


def sound(samples: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": sound_of(samples), "format": "wav"}, **more}


def link(place: str, **more: Any) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": place}, **more}


def test_the_page_s_server(shared_llm: Shared, site: Site) -> None:
    """Ultravox: `input_audio` in base64, `audio_url` by URL and as data; what is heard is what `generate` hears."""
    llm = shared_llm("ultravox")
    site.pages |= {"/a.wav": base64.b64decode(sound_of(tone(1))), "/b.wav": base64.b64decode(sound_of(tone(2)))}
    offline = reply(llm, user(QUESTION, sound(tone(1))))
    array = answer(llm, {"prompt": offline.prompt, "multi_modal_data": {"audio": (tone(1), 16000)}})
    other, both = (reply(llm, user(QUESTION, *map(sound, each))) for each in ([tone(2)], [tone(1), tone(2)]))
    data = f"data:audio/wav;base64,{sound_of(tone(1))}"
    with online(llm) as client:
        forms = [sound(tone(1)), link(site.url("/a.wav")), link(data), {"audio_url": {"url": site.url("/a.wav")}}]
        assert alike(offline, array, *(ask(client, user(QUESTION, form)) for form in forms))
        assert alike(other, ask(client, user(QUESTION, link(site.url("/b.wav"))))) and not alike(offline, other)
        assert alike(both, ask(client, user(QUESTION, link(site.url("/a.wav")), sound(tone(2)))))
        for wrong, words in (
            (link("data:audio/wav;base64,QUJD"), "Invalid or unsupported audio file"),
            ({"type": "input_audio", "input_audio": {"data": "@", "format": "wav"}}, "base64"),
            ({"type": "input_audio", "input_audio": None}, "uuid"),
            ({"type": "audio_url", "audio_url": site.url("/a.wav")}, "audio_url"),
        ):
            with pytest.raises(openai.BadRequestError, match=words):
                ask(client, user(QUESTION, wrong))
        assert alike(offline, ask(client, user(QUESTION, forms[0])))


def test_channels_and_rates(shared_llm: Shared, site: Site) -> None:
    """Files of two channels, of another rate and of another kind become what the model hears."""
    llm = shared_llm("qwen2_5_omni")
    stereo = np.stack([tone(1, rate=44100), tone(2, rate=44100)], axis=1)
    for kind in ("wav", "flac", "ogg"):
        file = io.BytesIO()
        soundfile.write(file, stereo, 44100, format=kind)
        site.pages[f"/a.{kind}"] = file.getvalue()
    names = [f"/a.{kind}" for kind in ("wav", "flac", "ogg")]
    prompt = str(reply(llm, user(QUESTION, sound(tone(3)))).prompt)
    wanted = []
    for name in names:
        samples, rate = soundfile.read(io.BytesIO(site.pages[name]), dtype="float32")  # type: ignore[arg-type]
        wanted.append(answer(llm, {"prompt": prompt, "multi_modal_data": {"audio": (samples, rate)}}))
    with online(llm) as client:
        for name, want in zip(names, wanted, strict=True):
            assert alike(want, ask(client, user(QUESTION, link(site.url(name)))))
    assert len({seen for seen, _ in heard(*wanted)}) == 1
