"""Whisper tiny.en with its real weights on real recordings."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mmjax import LLM, SamplingParams
from mmjax.engine import model_runner
from mmjax.entrypoints.transcription import split_segments
from mmjax.multimodal.audio import load, resample, split_audio
from mmjax.types import RequestOutput
from models.tables import close, log_softmax

TASK = "<|startoftranscript|><|notimestamps|>"  # an English-only model is told neither language nor task
TIMED = "<|startoftranscript|><|0.00|>"
LONGEST = 100  # tokens of an answer
LOGPROBS = 2e-3

Recordings = dict[str, tuple[np.ndarray, int]]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+|\d+", text.lower())


@pytest.fixture(scope="module")
def weights(shared: Path) -> Path:
    return shared / "models/whisper-tiny.en"


@pytest.fixture(scope="module")
def spoken(shared: Path) -> list[str]:
    """The words of jfk.flac."""
    lines = (shared / "media/speech/transcripts_expected.txt").read_text().splitlines()
    return words(dict(line.split("\t") for line in lines)["jfk.flac"])


@pytest.fixture(scope="module")
def recordings(shared: Path) -> Recordings:
    """Samples and rate by name; `stereo` is [n, 2], and the long recording comes in clips."""
    media = shared / "media"
    found: Recordings = {name: load(media / f"speech/{name}") for name in ("jfk.flac", "espeak_fox.wav")}
    found["espeak_numbers.wav"] = load(media / "speech/espeak_numbers.wav")
    found["stereo"] = soundfile.read(media / "audio/stereo_44k1.wav", dtype="float32")
    long, rate = load(media / "audio/long_75s.flac")
    clips = split_audio(long, rate, max_clip_duration_s=30, overlap_duration_s=1, min_energy_window_size=1600)
    return found | {f"long {i}": (clip, rate) for i, clip in enumerate(clips)}


@pytest.fixture(scope="module")
def answers(weights: Path, recordings: Recordings) -> Callable[..., RequestOutput]:
    """`answers(name, prompt)`: the transcription of a recording. All run at once."""
    llm = LLM(
        str(weights),
        dtype="float32",
        max_num_seqs=1,
        max_num_batched_tokens=32,
        enforce_eager=True,
    )
    asked = [(name, TASK) for name in recordings] + [
        ("jfk.flac", prompt) for prompt in ("", "<|startoftranscript|>", TIMED)
    ]
    prompts = [{"prompt": prompt, "multi_modal_data": {"audio": recordings[name]}} for name, prompt in asked]
    params = SamplingParams(temperature=0, max_tokens=LONGEST, logprobs=0)
    with pytest.MonkeyPatch.context() as patch:  # minutes of sound: 23 s instead of 44 s
        patch.setattr(model_runner, "compiler_options", lambda *_, **__: {"xla_backend_optimization_level": "3"})
        found = dict(zip(asked, llm.generate(prompts, params, use_tqdm=False), strict=True))

    def get(name: str, prompt: str = TASK) -> RequestOutput:
        return found[name, prompt]

    return get


@pytest.fixture
def text(answers: Callable[..., RequestOutput]) -> Callable[..., str]:
    def get(*which: str) -> str:
        answer = answers(*which).outputs[0]
        assert answer.finish_reason == "stop"
        return answer.text

    return get


@pytest.mark.parametrize("prompt", [TASK, "", "<|startoftranscript|>"])
def test_a_speech_word_for_word(text: Callable[..., str], spoken: list[str], prompt: str) -> None:
    assert words(text("jfk.flac", prompt)) == spoken


def test_no_prompt_is_the_start_token(answers: Callable[..., RequestOutput]) -> None:
    silent, explicit = answers("jfk.flac", ""), answers("jfk.flac", "<|startoftranscript|>")
    assert silent.prompt_token_ids == explicit.prompt_token_ids
    assert silent.outputs[0].token_ids == explicit.outputs[0].token_ids


def test_stereo_at_44_khz(recordings: Recordings, text: Callable[..., str], spoken: list[str]) -> None:
    samples, rate = recordings["stereo"]
    assert samples.shape[1] == 2 and rate == 44100
    assert words(text("stereo")) == spoken


def test_times_of_a_speech(answers: Callable[..., RequestOutput], recordings: Recordings, spoken: list[str]) -> None:
    """Segments between pairs of times cover the speech, and have the same words."""
    output = answers("jfk.flac", TIMED)
    tokens, zero = output.outputs[0].token_ids[:-1], (output.prompt_token_ids or [])[-1]  # but for the end
    samples, rate = recordings["jfk.flac"]
    found = split_segments(tokens, zero, len(samples) / rate)
    assert words(re.sub(r"<\|[\d.]+\|>", " ", output.outputs[0].text)) == spoken and len(found) >= 2
    assert [start for start, *_ in found] == sorted(start for start, *_ in found)
    assert all(end - start > 0.5 for start, end, *_ in found)
    assert found[0][0] == 0 and found[-1][1] > 9.5


def test_synthetic_voices(text: Callable[..., str]) -> None:
    assert words(text("espeak_numbers.wav")) == [str(number) for number in range(1, 11)]
    assert words(text("espeak_fox.wav"))[-4:] == ["over", "the", "lazy", "dog"]


def test_75_seconds_in_clips(recordings: Recordings, text: Callable[..., str], spoken: list[str]) -> None:
    """The repeated speech: all its words in order, but for those around a cut."""
    clips = [name for name in recordings if name.startswith("long")]
    assert len(clips) == 3 and sum(len(recordings[name][0]) for name in clips) == 75 * 16000
    transcribed = words("".join(text(name) for name in clips))
    assert set(transcribed) <= set(spoken)
    whole = " ".join(spoken[1:])  # the cuts fall on its first word
    assert " ".join(transcribed).count(whole) >= 4


@pytest.mark.parity
def test_recordings_match_transformers(
    weights: Path, recordings: Recordings, answers: Callable[..., RequestOutput]
) -> None:
    from models.published import RATE, Published

    model = Published("whisper", weights)
    stop = model.files["generation_config.json"]["eos_token_id"]
    asked = [(name, TASK) for name in recordings if name not in ("stereo", "long 0")] + [("jfk.flac", "")]
    for name, prompt in asked:
        audio = resample(*recordings[name], RATE)
        question: Mapping[str, Any] = {"prompt": prompt, "multi_modal_data": {"audio": audio}}
        theirs, ours = model.ask(question, LONGEST, stop), answers(name, prompt)
        assert ours.prompt_token_ids == theirs.prompt_ids
        assert list(ours.outputs[0].token_ids) == theirs.ids, f"{name}: narrowest choice {theirs.gap:.1e}"
        chosen = log_softmax(theirs.answer_logits)[np.arange(len(theirs.ids)), theirs.ids]
        pairs = zip(ours.outputs[0].logprobs or (), theirs.ids, strict=True)
        found = np.array([entry[token].logprob for entry, token in pairs])
        print(f"{name}: {len(found)} tokens, off by {np.abs(found - chosen).max():.1e}, gap {theirs.gap:.2f}")
        close(found, chosen, LOGPROBS, name)
