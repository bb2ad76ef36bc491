"""When words are spoken: Whisper's attention beside transformers', and what is made of it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special

from mmjax import LLM, AsyncLLM, SamplingParams, Speech, SpeechTask, Transcript
from mmjax.entrypoints.word_timestamps import (
    Word,
    alignment_matrix,
    first_steps,
    merge_punctuation,
    shorten,
    smoothed,
    split_words,
)
from mmjax.models.whisper import PUBLISHED_HEADS, alignment_heads
from mmjax.multimodal.audio import load, resample
from models.tables import close


def slow_first_steps(matrix: np.ndarray) -> list[int]:
    """Dynamic time warping cell by cell."""
    rows, steps = matrix.shape
    cost = np.full((rows + 1, steps + 1), np.inf)
    cost[0, 0] = 0
    for i in range(rows):
        for j in range(steps):
            cost[i + 1, j + 1] = min(cost[i, j], cost[i, j + 1], cost[i + 1, j]) - matrix[i, j]
    found, i, j = [0] * rows, rows, steps
    while i and j:
        found[i - 1] = j - 1
        _, i, j = min((cost[i - 1, j - 1], i - 1, j - 1), (cost[i - 1, j], i - 1, j), (cost[i, j - 1], i, j - 1))
    return found


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 40), (40, 7), (13, 13)])
def test_dynamic_time_warping(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(sum(shape)).normal(size=shape)
    assert first_steps(matrix).tolist() == slow_first_steps(matrix)


def test_a_clear_path() -> None:
    """Three tokens whose heads look at steps 0 to 9, 10 to 29 and 30 to 49; silence follows."""
    scores = np.zeros((2, 3, 50), np.float32)
    for row, (start, end) in enumerate([(0, 10), (10, 30), (30, 50)]):
        scores[:, row, start:end] = 5
    assert first_steps(alignment_matrix(scores)).tolist() == [0, 10, 30]
    assert np.isfinite(alignment_matrix(np.zeros((2, 3, 2), np.float32))).all()


def decode(tokens: Any) -> str:
    """Every token is a byte."""
    return bytes(tokens).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("text", "language", "words"),
    [
        (" Hi there, you.", "en", [" Hi", " there", ",", " you", "."]),
        ("é ü", "fr", ["é", " ü"]),
        ("你好", "zh", ["你", "好"]),
        ("你好", "en", ["你好"]),
        ("", "en", []),
    ],
)
def test_split_words(text: str, language: str, words: list[str]) -> None:
    found = split_words(text.encode(), decode, language)  # type: ignore[arg-type]
    assert [word.text for word in found] == words
    assert [word.num_tokens for word in found] == [len(word.encode()) for word in words]


@pytest.mark.parametrize("text", [b"a\xc3", b"a\xff b", b"\xff"])  # cut off, and not UTF-8
def test_characters_that_are_none(text: bytes) -> None:
    found = split_words(text, decode, "en")  # type: ignore[arg-type]
    assert "".join(word.text for word in found) == text.decode("utf-8", "replace")
    assert sum(word.num_tokens for word in found) == len(text)


def test_punctuation_has_no_time_of_its_own() -> None:
    words = [
        Word(' "', 0, 1),
        Word(" No", 1, 2),
        Word(",", 2, 3),
        Word(" he", 3, 4),
        Word(" says", 4, 5),
        Word(".", 5, 9),
    ]
    assert merge_punctuation(words) == [Word(' " No,', 1, 2, 3), Word(" he", 3, 4), Word(" says.", 4, 5, 2)]


def test_words_are_shortened_by_pauses() -> None:
    """Words of half a second; the second segment begins after a pause that the path gives to its first word."""
    words = [Word(" a", 0.0, 0.5), Word(" b", 0.5, 1.0), Word(" c", 1.0, 1.5)]
    found = shorten([*words, Word(" d", 1.5, 9.0)], [(0.0, 1.5, 3), (8.2, 9.0, 1)])
    assert found == [*words, Word(" d", 8.0, 9.0)]
    found = shorten([*words, Word(" d", 1.5, 9.0)], [(0.0, 2.1, 4)])
    assert found[-1] == Word(" d", 1.5, 2.1), "the segment ends before the word does"
    found = shorten([*words, Word(".", 1.5, 2.0), Word(" d", 2.0, 9.0)], [(0.0, 9.0, 5)])
    assert found == [*words[:2], Word(" c.", 1.0, 1.5, 2), Word(" d", 8.0, 9.0)], "a sentence ends before it"
    assert shorten([], []) == []


@pytest.mark.parametrize("sizes", PUBLISHED_HEADS)
def test_heads_of_published_models(sizes: tuple[int, int, bool, int]) -> None:
    layers, heads, english, mels = sizes
    config = {"decoder_layers": layers, "decoder_attention_heads": heads, "num_mel_bins": mels}
    config["vocab_size"] = 51_864 if english else 51_865 + (mels == 128)
    found = alignment_heads(config, {})
    assert found == PUBLISHED_HEADS[sizes] and all(0 <= a < layers and 0 <= b < heads for a, b in found)
    assert alignment_heads(config, {"alignment_heads": [[1, 0]]}) == ((1, 0),)
    with pytest.raises(ValueError, match="alignment_heads names"):
        alignment_heads(config, {"alignment_heads": [[layers, 0]]})


def test_heads_of_other_sizes() -> None:
    config = {"decoder_layers": 3, "decoder_attention_heads": 2, "num_mel_bins": 80, "vocab_size": 99}
    assert alignment_heads(config, {"alignment_heads": None}) == ((1, 0), (1, 1), (2, 0), (2, 1))


@pytest.fixture(scope="module")
def weights(shared: Path) -> Path:
    return shared / "models/whisper-tiny.en"


@pytest.fixture(scope="module")
def speech(weights: Path) -> Iterator[Speech]:
    engine = AsyncLLM(LLM(str(weights), dtype="float32", max_num_seqs=1, max_num_batched_tokens=32, enforce_eager=True))
    yield Speech(engine)
    engine.close()


def transcribe(speech: Speech, file: Path) -> Transcript:
    async def run() -> Transcript:
        recording = await speech.decode(file.read_bytes())
        task = SpeechTask("en", timestamps=True, words=True)
        job = await speech.prepare(recording, task, SamplingParams(temperature=0, max_tokens=None))
        return await speech.transcribe(job, timestamps=True)

    return asyncio.run(run())


@pytest.mark.parity
def test_the_words_of_a_speech(speech: Speech, shared: Path) -> None:
    """Where the words begin as one hears them, to a fifth of a second."""
    assert not speech.multilingual
    found = transcribe(speech, shared / "media/speech/jfk.flac")
    heard = {"so": 0.8, "Americans": 1.8, "not": 3.9, "your": 5.7, "country": 6.1}
    assert found.words is not None and len(found.words) == 22 and found.words[-1].word == "country."
    starts = {word.word: word.start for word in reversed(found.words)}
    for word, start in heard.items():
        assert abs(starts[word] - start) < 0.25, (word, starts[word])
    assert " ".join(word.word for word in found.words) == found.text


@pytest.mark.parity
@pytest.mark.parametrize("file", ["jfk.flac", "espeak_fox.wav"])
def test_attention_and_times_match_transformers(speech: Speech, shared: Path, weights: Path, file: str) -> None:
    """The attention of each head, and the times of tokens as transformers defines them: from the rows of the text's own
    tokens, where Whisper's code begins one row earlier, and with the attention to the silence after the recording."""
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    samples, rate = load(shared / "media/speech" / file)
    audio = resample(np.asarray(samples, np.float32), rate, 16_000)
    engine_input = asyncio.run(
        speech.engine.prepare({"prompt_token_ids": [50257, 50362], "multi_modal_data": {"audio": (audio, 16_000)}})
    )
    output = asyncio.run(speech.engine.complete(engine_input, SamplingParams(temperature=0, max_tokens=60)))
    text = [token for token in output.outputs[0].token_ids if token < 50256]
    tokens = [50257, 50362, *text, 50256]
    ours = asyncio.run(speech.engine.alignment_scores(engine_input, tokens))

    model = WhisperForConditionalGeneration.from_pretrained(
        weights, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prepare = WhisperFeatureExtractor.from_pretrained(weights)
    mel = prepare(audio, sampling_rate=16_000, return_tensors="pt").input_features
    heads = model.generation_config.alignment_heads
    with torch.no_grad():
        found = model(mel, decoder_input_ids=torch.tensor([tokens]), output_attentions=True).cross_attentions
        theirs = np.stack([found[layer][0, head].numpy() for layer, head in heads])
        close(scipy.special.softmax(ours, axis=-1), theirs, 1e-4, "attention")

        frames = len(audio) // 160
        told = model.generate(
            mel,
            return_token_timestamps=True,
            return_timestamps=False,
            num_frames=torch.tensor([frames]),
            suppress_tokens=[],
            begin_suppress_tokens=[],
            max_new_tokens=60,
        )
    assert told["sequences"][0].tolist()[-len(text) - 1 :][: len(text)] == text
    times = told["token_timestamps"][0].tolist()[-len(text) - 1 :][: len(text)]
    ours = scipy.special.softmax(ours, axis=-1)[:, 2:-1, : frames // 2]
    assert first_steps(smoothed(ours).mean(axis=0)) * 0.02 == pytest.approx(times, abs=0.021)
