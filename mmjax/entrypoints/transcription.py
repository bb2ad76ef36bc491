"""`Speech`: transcribes recordings of any length with a model that takes one window of audio at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
import zlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.entrypoints.async_llm import AsyncLLM
from mmjax.entrypoints.request_stream import RequestStream
from mmjax.entrypoints.word_timestamps import Word, shorten, split_words, time_words
from mmjax.inputs.input_processor import EngineInput
from mmjax.multimodal.audio import decode, load, split_audio
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.processors.base import SuppressedTokens
from mmjax.types import RequestOutput, SamplingParams, ValidationError

OVERLAP_S = 1.0  # a recording is cut in the last second of each window, at the quietest point
ENERGY_WINDOW = 1600  # samples per measurement of loudness
TIMESTAMP_STEP_S = 0.02  # seconds between two timestamp tokens
TASK_TOKENS = ("<|transcribe|>", "<|translate|>")


@dataclasses.dataclass(frozen=True, eq=False)
class AudioChunk:
    """A part of a recording that fits the model's window: samples f32[n], from `start` to `end` in seconds."""

    samples: np.ndarray
    start: float
    end: float


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """Mono audio at the model's sampling rate, cut into chunks."""

    chunks: tuple[AudioChunk, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class SpeechTask:
    """What to do with a recording. language: a code such as "de"; None detects it. translate: into English.

    prompt: text that the transcript continues. timestamps: whether to return segments. words: whether to return words
    with their times, too.
    """

    language: str | None = None
    translate: bool = False
    prompt: str = ""
    timestamps: bool = False
    words: bool = False


@dataclasses.dataclass(frozen=True)
class TranscriptSegment:
    """Text between two timestamps, in seconds of the whole recording. seek: where its chunk starts, in hundredths of a
    second."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


@dataclasses.dataclass(frozen=True)
class TranscriptWord:
    """A word with its punctuation, between two times in seconds of the whole recording."""

    word: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Transcript:
    """The text of a recording. segments: empty unless the task has timestamps; words: None unless it asks for them.
    outputs: one per chunk."""

    text: str
    language: str
    seconds: float
    segments: list[TranscriptSegment]
    outputs: list[RequestOutput]
    words: list[TranscriptWord] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TranscriptionJob:
    """A task with its chunks processed for the engine. task_ids: the start token and those of language and task."""

    recording: Recording
    language: str
    engine_inputs: list[EngineInput]
    params: SamplingParams
    task_ids: tuple[int, ...]
    words: bool


class Speech:
    """Speech to text with an engine whose model is an encoder-decoder for audio, such as Whisper."""

    def __init__(self, engine: AsyncLLM) -> None:
        model = engine.model
        processor, tokenizer = model.input_processor.processor, model.tokenizer
        window_s = None if processor is None else processor.audio_window_s
        if (
            not model.spec.is_encoder_decoder
            or processor is None
            or processor.sampling_rate is None
            or window_s is None
            or tokenizer is None
        ):
            raise ValueError("this model does not turn speech into text")
        self.engine = engine
        self.tokenizer = tokenizer
        self.sampling_rate: int = processor.sampling_rate
        self.window_s: float = window_s
        file = tokenizer.directory / "generation_config.json"
        stored: Mapping[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        self.start_id = self._id_of("<|startoftranscript|>")
        self.multilingual = processor.is_multilingual
        self.suppressed = SuppressedTokens(
            tuple(stored.get("suppress_tokens") or ()), tuple(stored.get("begin_suppress_tokens") or ())
        )
        self.languages = self._language_ids() if self.multilingual else {}
        self.end_id = self._id_of("<|endoftext|>")
        self.previous_text_id = self._id_of("<|startofprev|>")
        self.no_timestamps_id = self._id_of("<|notimestamps|>")
        self.first_timestamp_id = self._id_of("<|0.00|>")
        no_speech_ids = (tokenizer.id_of(name) for name in ("<|nospeech|>", "<|nocaptions|>"))
        self.no_speech_id = next((token for token in no_speech_ids if token is not None), None)
        self.limits = MediaLimits.from_env()

    @staticmethod
    def supports(engine: AsyncLLM) -> bool:
        """Whether the engine's model turns speech into text."""
        return engine.model.spec.is_encoder_decoder and engine.model.tokenizer is not None

    # -- preparing ---------------------------------------------------------------------------------------------------

    async def decode(self, sound: bytes) -> Recording:
        """Decode an audio file, or the audio track of a video. RequestError for a file that cannot be decoded."""
        return await asyncio.get_running_loop().run_in_executor(self.engine.llm.workers, self._decode, sound)

    def _decode(self, sound: bytes) -> Recording:
        audio = decode(load(sound, limits=self.limits), self.sampling_rate, limits=self.limits)
        start, chunks = 0, []
        for samples in split_audio(audio, self.sampling_rate, self.window_s, OVERLAP_S, ENERGY_WINDOW):
            end = start + len(samples)
            chunks.append(AudioChunk(samples, start / self.sampling_rate, end / self.sampling_rate))
            start = end
        return Recording(tuple(chunks), len(audio) / self.sampling_rate)

    def check(self, task: SpeechTask) -> None:
        """ValidationError for a language the model does not know, or a translation it cannot make."""
        if task.translate and not self.multilingual:
            raise ValidationError("This model knows English only and does not translate.", parameter="model")
        known = self.languages or {"en": 0}
        if task.language is not None and task.language not in known:
            raise ValidationError(
                f"Unsupported language: {task.language!r}. Must be one of {sorted(known)}.", parameter="language"
            )

    async def prepare(self, recording: Recording, task: SpeechTask, params: SamplingParams) -> TranscriptionJob:
        """Detect the language if the task has none, and process every chunk."""
        self.check(task)
        language = task.language or await self.language_of(recording.chunks[0])
        task_ids = self._task_ids(task, language)
        token_ids = await self._decoder_prompt(task, task_ids)
        longest = self.engine.model.max_model_len - len(token_ids)
        params = dataclasses.replace(params, max_tokens=min(params.max_tokens or longest, longest))
        self.engine.model.params_checker.check_sampling(params)
        # the first token of a transcript with timestamps is one, and stands in the prompt
        suppressed = dataclasses.replace(self.suppressed, first_ids=()) if task.timestamps else self.suppressed
        processed = [await self._process(chunk, token_ids) for chunk in recording.chunks]
        engine_inputs = [dataclasses.replace(each, suppressed=suppressed) for each in processed]
        return TranscriptionJob(recording, language, engine_inputs, params, task_ids, task.words)

    async def language_of(self, chunk: AudioChunk) -> str:
        """The language that the model finds likeliest."""
        if not self.languages:
            return "en"
        names = {token: name for name, token in self.languages.items()}
        return names[(await self._first_token(chunk, list(names))).outputs[0].token_ids[0]]

    async def _first_token(self, chunk: AudioChunk, allowed_ids: Sequence[int]) -> RequestOutput:
        """The likeliest of some tokens after the start token."""
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=0, allowed_token_ids=list(allowed_ids))
        return await self.engine.complete(await self._process(chunk, [self.start_id]), params)

    async def _process(self, chunk: AudioChunk, token_ids: Sequence[int]) -> EngineInput:
        audio = (chunk.samples, self.sampling_rate)
        return await self.engine.prepare({"prompt_token_ids": list(token_ids), "multi_modal_data": {"audio": audio}})

    def _task_ids(self, task: SpeechTask, language: str) -> tuple[int, ...]:
        """start [language task]."""
        if not self.languages:
            return (self.start_id,)
        return (self.start_id, self.languages[language], self._id_of(TASK_TOKENS[task.translate]))

    async def _decoder_prompt(self, task: SpeechTask, task_ids: Sequence[int]) -> list[int]:
        """[previous text] start [language task] (no timestamps | the first timestamp)."""
        token_ids = [*task_ids, self.first_timestamp_id if task.timestamps else self.no_timestamps_id]
        if task.prompt.strip():
            previous = await self.engine.tokenize(" " + task.prompt.strip(), add_special_tokens=False)
            longest = self.engine.model.max_model_len // 2 - 1
            token_ids = [self.previous_text_id, *previous[-longest:], *token_ids]
        return token_ids

    def _id_of(self, token: str) -> int:
        token_id = self.tokenizer.id_of(token)
        if token_id is None:
            raise ValueError(f"the tokenizer has no {token}: this model does not turn speech into text as Whisper does")
        return token_id

    def _language_ids(self) -> dict[str, int]:
        found = {}
        for token in sorted(self.tokenizer.special_ids):
            match = re.fullmatch(r"<\|([a-z]{2,3})\|>", self.tokenizer.token_of(token) or "")
            if match:
                found[match[1]] = token
        return found

    # -- running -----------------------------------------------------------------------------------------------------

    async def transcribe(self, job: TranscriptionJob, *, timestamps: bool) -> Transcript:
        """Run all chunks together, and join their texts."""
        params = dataclasses.replace(job.params, logprobs=0) if timestamps else job.params
        outputs = await self.engine.complete_all([(engine_input, params) for engine_input in job.engine_inputs])
        segments: list[TranscriptSegment] = []
        words: list[TranscriptWord] = []
        if timestamps:
            for index, (chunk, output) in enumerate(zip(job.recording.chunks, outputs, strict=True)):
                no_speech_prob = await self._no_speech_prob(chunk)
                new = self._segments(chunk, output, no_speech_prob, len(segments), job.params.temperature)
                segments += new
                if job.words:
                    words += await self._words(job, index, new)
            text = "".join(segment.text for segment in segments)
        else:
            text = "".join(output.outputs[0].text for output in outputs)
        seconds = job.recording.seconds
        return Transcript(text.strip(), job.language, seconds, segments, outputs, words if job.words else None)

    async def _words(
        self, job: TranscriptionJob, index: int, segments: Sequence[TranscriptSegment]
    ) -> list[TranscriptWord]:
        """The words of the segments of chunk `index`."""
        chunk, token_ids = job.recording.chunks[index], [token for segment in segments for token in segment.tokens]
        first_row = len(job.task_ids)
        token_ids = token_ids[: self.engine.model.spec.max_positions - first_row - 2]
        if not token_ids:
            return []
        aligned = [*job.task_ids, self.no_timestamps_id, *token_ids, self.end_id]
        scores = await self.engine.alignment_scores(job.engine_inputs[index], aligned)
        num_steps = max(1, min(scores.shape[2], round((chunk.end - chunk.start) / TIMESTAMP_STEP_S)))
        bounds = [(each.start - chunk.start, each.end - chunk.start, len(each.tokens)) for each in segments]

        def align() -> list[Word]:
            split = split_words(token_ids, self.tokenizer.decode, job.language)
            timed = time_words(split, scores[:, :, :num_steps], first_row, TIMESTAMP_STEP_S)
            return shorten(timed, bounds)

        words = await asyncio.get_running_loop().run_in_executor(self.engine.llm.workers, align)
        return [
            TranscriptWord(
                word.text.strip(),
                round(min(chunk.start + word.start, chunk.end), 2),
                round(min(chunk.start + word.end, chunk.end), 2),
            )
            for word in words
            if word.text.strip()
        ]

    async def stream(
        self, job: TranscriptionJob, outputs: list[RequestOutput], token_ids: list[int] | None = None
    ) -> AsyncGenerator[str, None]:
        """`transcribe` without timestamps, in pieces. Each chunk's output is added to `outputs` once complete, and what
        is generated to `token_ids`, if given, as it comes."""
        streams: list[RequestStream[RequestOutput]] = []
        # The whole text is stripped, so trailing spaces are held back until more text follows.
        held_back, started = "", False
        try:
            for engine_input in job.engine_inputs:
                streams.append(self.engine.submit(engine_input, job.params, streaming=True))
            for stream in streams:
                async for delta in self.engine.stream(stream):
                    if token_ids is not None:
                        token_ids += delta.token_ids
                    text = held_back + delta.text if started else delta.text.lstrip()
                    released = text.rstrip()
                    held_back = text[len(released) :]
                    if released:
                        started = True
                        yield released
                assert stream.output is not None
                outputs.append(stream.output)
        finally:
            for stream in streams:
                self.engine.drop(stream)

    async def _no_speech_prob(self, chunk: AudioChunk) -> float:
        """The probability that a chunk holds no speech. Its cross-attention keys are still in the cache."""
        if self.no_speech_id is None:
            return 0.0
        [entry] = (await self._first_token(chunk, [self.no_speech_id])).outputs[0].logprobs or [{}]
        return math.exp(entry[self.no_speech_id].logprob)

    def _segments(
        self, chunk: AudioChunk, output: RequestOutput, no_speech_prob: float, first_id: int, temperature: float
    ) -> list[TranscriptSegment]:
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        logprobs = [entry[token].logprob for token, entry in zip(token_ids, completion.logprobs or (), strict=True)]
        segments: list[TranscriptSegment] = []
        for start, end, begin, stop in split_segments(token_ids, self.first_timestamp_id, chunk.end - chunk.start):
            text_ids = [token for token in token_ids[begin:stop] if token not in self.tokenizer.special_ids]
            text = self.tokenizer.decode(text_ids)
            if not text.strip():
                continue
            data = text.encode()
            segments.append(
                TranscriptSegment(
                    id=first_id + len(segments),
                    seek=round(chunk.start * 100),
                    start=round(chunk.start + start, 2),
                    end=round(chunk.start + end, 2),
                    text=text,
                    tokens=text_ids,
                    temperature=temperature,
                    avg_logprob=float(np.mean(logprobs[begin:stop])),
                    compression_ratio=len(data) / len(zlib.compress(data)),
                    no_speech_prob=no_speech_prob,
                )
            )
        return segments


def split_segments(
    token_ids: Sequence[int], first_timestamp_id: int, seconds: float
) -> list[tuple[float, float, int, int]]:
    """(start, end, first token, end of tokens) of each segment between timestamps, in seconds of a chunk that is
    `seconds` long.

    The prompt ended with the first timestamp. Times never decrease nor exceed the chunk; a segment that the model did
    not end ends with the chunk.
    """
    segments: list[tuple[float, float, int, int]] = []
    begin, start = 0, 0.0
    for i, token in enumerate(token_ids):
        if token < first_timestamp_id:
            continue
        time = min(max((token - first_timestamp_id) * TIMESTAMP_STEP_S, start), seconds)
        if i > begin:
            segments.append((start, time, begin, i))
        begin, start = i + 1, time
    if begin < len(token_ids):
        segments.append((start, seconds, begin, len(token_ids)))
    return segments
