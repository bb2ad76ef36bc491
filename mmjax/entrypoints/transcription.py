"""`Speech`: recordings of any length to text, with timestamps, by a model that hears one window at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import math
import re
import zlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.entrypoints.async_llm import AsyncLLM, RequestStream
from mmjax.inputs.input_processor import EngineInput
from mmjax.multimodal.audio import decode, load, split_audio
from mmjax.multimodal.media_limits import MediaLimits
from mmjax.types import RequestOutput, SamplingParams, ValidationError

OVERLAP_S = 1.0  # a recording is cut within the last second of each window, where it is quietest
QUIET = 1600  # samples over which loudness is taken
STEP_S = 0.02  # between timestamp tokens
FORBIDDEN = -100.0  # added to the logits of tokens that are never spoken


@dataclasses.dataclass(frozen=True, eq=False)
class AudioClip:
    """A stretch of a recording that fits the model's window: samples f32[n], from `start` to `end` in seconds."""

    samples: np.ndarray
    start: float
    end: float


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """Mono samples at the model's rate, cut into clips."""

    clips: tuple[AudioClip, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class SpeechTask:
    """What to make of a recording. language: a code such as "de"; None finds out. translate: into English.

    prompt: text that is taken as said before. timestamps: whether to have segments.
    """

    language: str | None = None
    translate: bool = False
    prompt: str = ""
    timestamps: bool = False


@dataclasses.dataclass(frozen=True)
class TranscriptSegment:
    """A stretch of speech, in seconds of the whole recording. `seek`: where its clip starts, in hundredths."""

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
class Transcript:
    """What was said. `segments` are empty unless they were asked for; `outputs` hold one answer per clip."""

    text: str
    language: str
    seconds: float
    segments: list[TranscriptSegment]
    outputs: list[RequestOutput]


@dataclasses.dataclass(frozen=True, eq=False)
class TranscriptionJob:
    """A task whose clips are rendered, ready to run."""

    recording: Recording
    language: str
    engine_inputs: list[EngineInput]
    params: SamplingParams


class Speech:
    """Speech to text with an engine whose model is an encoder-decoder for audio."""

    def __init__(self, engine: AsyncLLM) -> None:
        model = engine.llm.model
        processor, tokenizer = model.input_processor.processor, model.tokenizer
        if (
            not model.spec.is_encoder_decoder
            or processor is None
            or processor.sampling_rate is None
            or tokenizer is None
        ):
            raise ValueError("this model does not turn speech into text")
        self.engine = engine
        self.tokenizer = tokenizer
        self.sampling_rate: int = processor.sampling_rate
        self.window_s: float = processor.mel.samples / self.sampling_rate  # type: ignore[attr-defined]
        file = tokenizer.directory / "generation_config.json"
        stored: Mapping[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        self.multilingual: bool = stored.get("is_multilingual", True)
        self.suppressed_ids: list[int] = list(stored.get("suppress_tokens") or ())
        self.languages = self._find_languages() if self.multilingual else {}
        self.start_id = self._token("<|startoftranscript|>")
        self.previous_text_id = self._token("<|startofprev|>")
        self.no_timestamps_id = self._token("<|notimestamps|>")
        self.first_timestamp_id = self._token("<|0.00|>")
        silence = (tokenizer.id_of(name) for name in ("<|nospeech|>", "<|nocaptions|>"))
        self.no_speech_id = next((token for token in silence if token is not None), None)
        self.limits = MediaLimits.from_env()

    @staticmethod
    def supports(engine: AsyncLLM) -> bool:
        """Whether the engine's model turns speech into text."""
        return bool(engine.llm.model.spec.is_encoder_decoder) and engine.llm.model.tokenizer is not None

    # -- before the model --------------------------------------------------------------------------------------------

    async def decode(self, sound: bytes) -> Recording:
        """Decode a sound file, or the sound track of a video. RequestError for one that cannot be."""
        return await asyncio.get_running_loop().run_in_executor(
            self.engine.llm.workers, functools.partial(self._hear, sound)
        )

    def _hear(self, sound: bytes) -> Recording:
        wave = decode(load(sound, limits=self.limits), self.sampling_rate, limits=self.limits)
        at, clips = 0, []
        for samples in split_audio(wave, self.sampling_rate, self.window_s, OVERLAP_S, QUIET):
            clips.append(AudioClip(samples, at / self.sampling_rate, (at + len(samples)) / self.sampling_rate))
            at += len(samples)
        return Recording(tuple(clips), len(wave) / self.sampling_rate)

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
        """Find the language if it is not known, and render every clip."""
        self.check(task)
        language = task.language or await self.language_of(recording.clips[0])
        tokens = await self._decoder_prompt(task, language)
        if self.suppressed_ids:
            bias = dict.fromkeys(self.suppressed_ids, FORBIDDEN) | (params.logit_bias or {})
            params = dataclasses.replace(params, logit_bias=bias)
        longest = self.engine.llm.model.max_model_len - len(tokens)
        params = dataclasses.replace(params, max_tokens=min(params.max_tokens or longest, longest))
        self.engine.llm.verify(params)
        engine_input = [await self._render(clip, tokens) for clip in recording.clips]
        return TranscriptionJob(recording, language, engine_input, params)

    async def language_of(self, clip: AudioClip) -> str:
        """The language that the model takes a clip to be in."""
        if not self.languages:
            return "en"
        names = {token: name for name, token in self.languages.items()}
        return names[(await self._first_token(clip, list(names))).outputs[0].token_ids[0]]

    async def _first_token(self, clip: AudioClip, allowed: Sequence[int]) -> RequestOutput:
        """What follows the start token, among the allowed."""
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=0, allowed_token_ids=list(allowed))
        return await self.engine.generate(await self._render(clip, [self.start_id]), params)

    async def _render(self, clip: AudioClip, tokens: Sequence[int]) -> EngineInput:
        prompt = {"prompt_token_ids": list(tokens), "multi_modal_data": {"audio": (clip.samples, self.sampling_rate)}}
        return await self.engine.prepare(prompt)

    async def _decoder_prompt(self, task: SpeechTask, language: str) -> list[int]:
        """[what was said before] start [language task] (no timestamps | the first timestamp)."""
        tokens = [self.start_id]
        if self.languages:
            tokens += [self.languages[language], self._token("<|translate|>" if task.translate else "<|transcribe|>")]
        tokens.append(self.first_timestamp_id if task.timestamps else self.no_timestamps_id)
        if task.prompt.strip():
            said = await self.engine.encode(" " + task.prompt.strip(), special=False)
            room = self.engine.llm.model.max_model_len // 2 - 1
            tokens = [self.previous_text_id, *said[-room:], *tokens]
        return tokens

    def _token(self, text: str) -> int:
        found = self.tokenizer.id_of(text)
        if found is None:
            raise ValueError(f"the tokenizer has no {text}: this model does not turn speech into text as Whisper does")
        return found

    def _find_languages(self) -> dict[str, int]:
        found = {}
        for token in sorted(self.tokenizer.special_ids):
            match = re.fullmatch(r"<\|([a-z]{2,3})\|>", self.tokenizer.token_of(token) or "")
            if match:
                found[match[1]] = token
        return found

    # -- the model's answers -----------------------------------------------------------------------------------------

    async def transcribe(self, work: TranscriptionJob, *, timestamps: bool) -> Transcript:
        """Run all clips together."""
        params = dataclasses.replace(work.params, logprobs=0) if timestamps else work.params
        outputs = await self.engine.generate_all([(each, params) for each in work.engine_inputs])
        segments: list[TranscriptSegment] = []
        if timestamps:
            for clip, output in zip(work.recording.clips, outputs, strict=True):
                silent = await self._silence(clip)
                segments += self._segments(clip, output, silent, len(segments), work.params.temperature)
            text = "".join(segment.text for segment in segments)
        else:
            text = "".join(output.outputs[0].text for output in outputs)
        return Transcript(text.strip(), work.language, work.recording.seconds, segments, outputs)

    async def stream(self, work: TranscriptionJob, outputs: list[RequestOutput]) -> AsyncGenerator[str, None]:
        """The same text piece by piece; each clip's answer is added to `outputs` when it is complete."""
        streams: list[RequestStream] = []
        held, said = "", False  # blanks at either end of the whole are not told
        try:
            for each in work.engine_inputs:
                streams.append(self.engine.submit(each, work.params, streaming=True))
            for stream in streams:
                async for delta in self.engine.stream(stream):
                    text = held + delta.text if said else delta.text.lstrip()
                    kept = text.rstrip()
                    held = text[len(kept) :]
                    if kept:
                        said = True
                        yield kept
                assert stream.output is not None
                outputs.append(stream.output)
        finally:
            for stream in streams:
                self.engine.drop(stream)

    async def _silence(self, clip: AudioClip) -> float:
        """How likely the model takes a clip to hold no speech. The encoder's keys are still in their pages."""
        if self.no_speech_id is None:
            return 0.0
        [entry] = (await self._first_token(clip, [self.no_speech_id])).outputs[0].logprobs or [{}]
        return math.exp(entry[self.no_speech_id].logprob)

    def _segments(
        self, clip: AudioClip, output: RequestOutput, silent: float, first: int, temperature: float
    ) -> list[TranscriptSegment]:
        answer = output.outputs[0]
        tokens = list(answer.token_ids)
        scores = [report[token].logprob for token, report in zip(tokens, answer.logprobs or (), strict=True)]
        found: list[TranscriptSegment] = []
        for start, end, begin, stop in split_segments(tokens, self.first_timestamp_id, clip.end - clip.start):
            said = [token for token in tokens[begin:stop] if token not in self.tokenizer.special_ids]
            text = self.tokenizer.decode(said)
            if not text.strip():
                continue
            coded = text.encode()
            found.append(
                TranscriptSegment(
                    id=first + len(found),
                    seek=round(clip.start * 100),
                    start=round(clip.start + start, 2),
                    end=round(clip.start + end, 2),
                    text=text,
                    tokens=said,
                    temperature=temperature,
                    avg_logprob=float(np.mean(scores[begin:stop])),
                    compression_ratio=len(coded) / len(zlib.compress(coded)),
                    no_speech_prob=silent,
                )
            )
        return found


def split_segments(tokens: Sequence[int], zero: int, seconds: float) -> list[tuple[float, float, int, int]]:
    """(start, end, first token, end of tokens) of each stretch between timestamps, in seconds of a clip that long.

    The prompt ended with the first timestamp. Times never run backwards nor past the clip; a stretch that the model
    did not close ends with the clip.
    """
    found: list[tuple[float, float, int, int]] = []
    begin, start = 0, 0.0
    for i, token in enumerate(tokens):
        if token < zero:
            continue
        now = min(max((token - zero) * STEP_S, start), seconds)
        if i > begin:
            found.append((start, now, begin, i))
        begin, start = i + 1, now
    if begin < len(tokens):
        found.append((start, seconds, begin, len(tokens)))
    return found
