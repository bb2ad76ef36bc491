"""The page's section on audio inputs, offline: arrays with a sampling rate, stereo, long recordings, audio in
messages."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine_inputs import greedy
from mmjax import LLM
from mmjax.multimodal.audio import split_audio
from prompts import base64_wav, chat_one, generate_one, random_chord, same_outputs, user_messages

Shared = Callable[[str], LLM]


def asking(audio: Any) -> dict[str, Any]:
    return {"prompt": "<|startoftranscript|>", "multi_modal_data": {"audio": audio}}


def test_array_and_sampling_rate(shared_llm: Shared) -> None:
    """`(array, sampling_rate)`, alone or in a list; a bare array has the model's rate; `"prompt": ""` is enough."""
    llm = shared_llm("whisper")
    forms = [
        (random_chord(1), 16000),
        [(random_chord(1), 16000)],
        random_chord(1),
        (random_chord(1).tolist(), 16000),
        (random_chord(1), None),
    ]
    answers = [generate_one(llm, asking(form)) for form in forms]
    assert same_outputs(*answers, generate_one(llm, {"prompt": "", "multi_modal_data": {"audio": random_chord(1)}}))
    pair = {
        "encoder_prompt": {"prompt": "", "multi_modal_data": {"audio": (random_chord(1), 16000)}},
        "decoder_prompt": None,
    }
    assert same_outputs(answers[0], generate_one(llm, pair)) and not same_outputs(
        answers[0], generate_one(llm, asking(random_chord(2)))
    )


def test_automatic_audio_channel_normalization(shared_llm: Shared) -> None:
    """Stereo in both layouts becomes mono."""
    llm = shared_llm("whisper")
    left, right = random_chord(1), random_chord(2)
    mono = generate_one(llm, asking(((left + right) / 2, 16000)))
    assert same_outputs(
        mono, *(generate_one(llm, asking((x, 16000))) for x in (np.stack([left, right]), np.stack([left, right], 1)))
    )


def test_audio_chunking(shared_llm: Shared) -> None:
    """Long recordings are split at quiet points, and the clips run as a batch."""
    llm = shared_llm("whisper")
    long = np.concatenate([random_chord(i, 3.0) for i in range(3)])
    chunks = split_audio(long, 16000, max_clip_duration_s=4.0, overlap_duration_s=1.0, min_energy_window_size=1600)
    np.testing.assert_array_equal(np.concatenate(chunks), long)
    outputs = llm.generate([asking((chunk, 16000)) for chunk in chunks], greedy(4), use_tqdm=False)
    alone = [generate_one(llm, asking((chunk, 16000)), 4) for chunk in chunks]
    assert len(chunks) >= 3 and all(same_outputs(a, b) for a, b in zip(outputs, alone, strict=True))


@pytest.mark.parametrize("family", ["qwen2_5_omni"])
def test_audio_in_messages(family: str, shared_llm: Shared) -> None:
    """`input_audio` in base64 and `audio_url`, with and without `type` and `uuid`, then from the cache."""
    llm = shared_llm(family)
    data = base64_wav(random_chord(1))
    payload = {"data": data, "format": "wav"}
    parts: list[dict[str, Any]] = [
        {"type": "input_audio", "input_audio": payload},
        {"input_audio": payload},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{data}"}},
        {"type": "input_audio", "input_audio": payload, "uuid": "sound"},
        {"type": "input_audio", "input_audio": None, "uuid": "sound"},
        {"type": "audio_url", "audio_url": None, "uuid": "sound"},
    ]
    answers = [chat_one(llm, user_messages(part, "What is heard?")) for part in parts]
    assert same_outputs(*answers)
    offline = {"prompt": answers[0].prompt, "multi_modal_data": {"audio": (random_chord(1), 16000)}}
    assert same_outputs(answers[0], generate_one(llm, offline))
