"""POST /v1/audio/transcriptions and /v1/audio/translations: the text of an uploaded audio file."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal, get_args

from fastapi import APIRouter, Form, Request, UploadFile
from fastapi.responses import PlainTextResponse, Response
from mmjax.serve.context import ServerContext, cancel_on_disconnect, sse_response, usage
from mmjax.serve.openapi import TRANSCRIPT, PublishedAs, without_null
from mmjax.serve.published_types import Upload
from mmjax.serve.sampling_schema import OF_SPEECH, PositiveInt, sampling_fields
from mmjax.serve.schema import RequestBody, sampling_params
from pydantic import ConfigDict, Field, create_model

from mmjax import RequestOutput, SamplingParams, Speech, SpeechTask, Transcript
from mmjax.types import ValidationError

Json = dict[str, Any]
TranscriptFormat = Literal["json", "text", "verbose_json", "srt", "vtt"]
FORMATS = get_args(TranscriptFormat)


class SpeechForm(
    create_model("SpeechSampling", __base__=RequestBody, **sampling_fields(OF_SPEECH, {"temperature": 0.0}))  # type: ignore[misc]
):
    """The form of both routes. Unknown fields are ignored."""

    model_config = ConfigDict(json_schema_extra=without_null)
    file: Annotated[UploadFile, Upload]
    model: str | None = None
    """The name of the model; missing: the model that the server has."""
    language: str | None = None
    """The language that is spoken, as its code; missing: the model detects it."""
    to_language: str | None = None
    """The language of a translation: only `en`."""
    prompt: str = ""
    """Text that precedes the recording."""
    response_format: Annotated[str, PublishedAs(TranscriptFormat)] = "json"
    """`verbose_json`, `srt` and `vtt` have timestamps."""
    granularities: list[Literal["segment", "word"]] = Field(
        default=[],
        alias="timestamp_granularities[]",
        description="With `verbose_json`: `word` adds words.",
    )
    stream: bool = False
    """Send the text in chunks, as it is generated."""
    stream_include_usage: bool = False
    """Send a last chunk with the usage."""
    stream_continuous_usage_stats: bool = False
    """Send the usage with every chunk."""
    max_completion_tokens: PositiveInt | None = None
    """Most tokens of the text of each part of the recording."""
    n: Annotated[int, PublishedAs(Literal[1])] = 1
    """Only 1."""
    use_beam_search: Annotated[bool, PublishedAs(Literal[False])] = False
    """Not supported."""

    def check(self) -> None:
        """ValidationError for fields that contradict each other, and for what is not supported."""
        if self.response_format not in FORMATS:
            raise ValidationError(
                f"Currently only support response_format: {', '.join(FORMATS)}.", parameter="response_format"
            )
        if self.stream and self.response_format not in ("json", "text"):
            raise ValidationError(
                f"response_format {self.response_format!r} cannot be streamed; json and text can.",
                parameter="response_format",
            )
        if not self.stream and (self.stream_include_usage or self.stream_continuous_usage_stats):
            raise ValidationError("Stream options can only be defined when `stream=True`.", parameter="stream")
        if self.use_beam_search:
            raise ValidationError("Beam search is not supported.", parameter="use_beam_search")
        if self.n != 1:
            raise ValidationError("A recording has one transcript: n must be 1.", parameter="n")
        if self.granularities and self.response_format != "verbose_json":
            raise ValidationError(
                "`timestamp_granularities[]` needs response_format verbose_json.", parameter="timestamp_granularities[]"
            )

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """The sampling parameters of the form, over the model's defaults."""
        given = {name: getattr(self, name) for name in OF_SPEECH if getattr(self, name) is not None}
        return sampling_params({**given, "max_tokens": self.max_completion_tokens}, defaults)

    @property
    def has_timestamps(self) -> bool:
        return self.response_format in ("verbose_json", "srt", "vtt")


def router(context: ServerContext) -> APIRouter:
    """The routes for speech."""
    routes, speech = APIRouter(), Speech(context.engine)

    @routes.post("/v1/audio/transcriptions", response_model=None, responses=TRANSCRIPT)
    async def transcribe(
        body: Annotated[SpeechForm, Form(media_type="multipart/form-data")], request: Request
    ) -> Response | Json:
        """Transcribe an audio file in the language that is spoken."""
        return await AudioHandler(context, speech, body, request, translate=False).respond()

    @routes.post("/v1/audio/translations", response_model=None, responses=TRANSCRIPT)
    async def translate(
        body: Annotated[SpeechForm, Form(media_type="multipart/form-data")], request: Request
    ) -> Response | Json:
        """Translate the speech in an audio file to English."""
        return await AudioHandler(context, speech, body, request, translate=True).respond()

    return routes


class AudioHandler:
    """One request."""

    def __init__(
        self, context: ServerContext, speech: Speech, body: SpeechForm, request: Request, *, translate: bool
    ) -> None:
        self.context = context
        self.request = request
        self.speech = speech
        self.body = body
        self.kind = "translation" if translate else "transcription"
        language = (body.language or "").strip().lower() or None
        self.task = SpeechTask(
            language, translate, body.prompt, body.has_timestamps, words="word" in body.granularities
        )
        self.id = f"{'trsl' if translate else 'trsc'}-{request.state.request_id}"
        self.created = int(time.time())

    async def respond(self) -> Response | Json:
        """The response, complete or streamed."""
        work = await cancel_on_disconnect(self.request, self._prepare())
        if self.body.stream:
            return sse_response(self._events(work), self.request.state.request_id)
        return self._write(await cancel_on_disconnect(self.request, self._answer(work)))

    async def _prepare(self) -> Any:
        """The recording and its prompts. All errors of the request are raised here."""
        body, most = self.body, self.context.settings.audio_mb * 1e6
        self.context.check_model(body.model)
        body.check()
        if self.task.translate and (body.to_language or "en").lower() != "en":
            raise ValidationError("Translations are into English only.", parameter="to_language")
        self.speech.check(self.task)
        params = body.sampling_params(self.context.engine.llm.get_default_sampling_params())
        if (body.file.size or 0) > most:
            raise ValidationError(f"Maximum file size exceeded: {most / 1e6:g} MB.", parameter="file")
        async with self.context.admitted():
            recording = await self.speech.decode(await body.file.read())
            return await self.speech.prepare(recording, self.task, params)

    async def _answer(self, work: Any) -> Transcript:
        async with self.context.admitted(again=True):
            transcript = await self.speech.transcribe(work, timestamps=self.task.timestamps)
        self._record(transcript.outputs)
        return transcript

    def _record(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self.context.metrics.record(output)

    def _write(self, transcript: Transcript) -> Response | Json:
        """The transcript in the requested format."""
        response_format, seconds = self.body.response_format, transcript.seconds
        if response_format == "text":
            return PlainTextResponse(transcript.text + "\n")
        if response_format == "srt":
            return PlainTextResponse(srt(transcript), media_type="application/x-subrip")
        if response_format == "vtt":
            return PlainTextResponse(vtt(transcript), media_type="text/vtt")
        duration, words = {"type": "duration", "seconds": math.ceil(seconds)}, transcript.words
        if response_format == "json":
            return {"text": transcript.text, "usage": duration}
        return {
            "task": "translate" if self.task.translate else "transcribe",
            "language": transcript.language,
            "duration": round(seconds, 3),
            "text": transcript.text,
            "segments": [dataclasses.asdict(segment) for segment in transcript.segments],
            "words": None if words is None else [dataclasses.asdict(word) for word in words],
            "usage": duration,
        }

    async def _events(self, work: Any) -> AsyncGenerator[Json, None]:
        """The chunks of the text. Each is an event of OpenAI's transcriptions and also a chunk of vLLM's."""
        outputs: list[RequestOutput] = []
        token_ids: list[int] = []
        texts_sent: list[str] = []
        include_usage = self.body.stream_include_usage or self.context.settings.always_usage
        async with self.context.admitted(again=True), aclosing(self.speech.stream(work, outputs, token_ids)) as texts:
            async for text in texts:
                texts_sent.append(text)
                chunk = self._chunk({"content": text}, None) | {"type": "transcript.text.delta", "delta": text}
                if self.body.stream_continuous_usage_stats:
                    chunk["usage"] = self._usage(work, len(token_ids))
                yield chunk
        self._record(outputs)
        done = {"type": "transcript.text.done", "text": "".join(texts_sent)}
        is_truncated = any(output.outputs[0].finish_reason == "length" for output in outputs)
        chunk = self._chunk({"content": ""}, "length" if is_truncated else "stop") | done
        if self.body.stream_continuous_usage_stats:
            chunk["usage"] = self._usage(work, len(token_ids))
        yield chunk
        if include_usage:
            yield {**self._head(), "choices": [], "usage": self._usage(work, len(token_ids))}

    def _usage(self, work: Any, num_generated: int) -> Json:
        counts = usage(sum(len(each.token_ids) for each in work.engine_inputs), num_generated)
        return {"type": "duration", "seconds": math.ceil(work.recording.seconds)} | counts

    def _head(self) -> Json:
        head = {"id": self.id, "object": f"{self.kind}.chunk", "created": self.created}
        return {**head, "model": self.context.name}

    def _chunk(self, delta: Json, reason: str | None) -> Json:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "stop_reason": None}
        return {**self._head(), "choices": [choice]}


def srt(transcript: Transcript) -> str:
    """SubRip subtitles."""
    return "".join(
        f"{number}\n{_clock(segment.start, ',')} --> {_clock(segment.end, ',')}\n{_cue(segment.text)}\n\n"
        for number, segment in enumerate(transcript.segments, 1)
    )


def vtt(transcript: Transcript) -> str:
    """WebVTT subtitles."""
    cues = (
        f"{_clock(segment.start, '.')} --> {_clock(segment.end, '.')}\n{_cue(segment.text)}\n\n"
        for segment in transcript.segments
    )
    return "WEBVTT\n\n" + "".join(cues)


def _cue(text: str) -> str:
    """The text of a cue, which may have neither an empty line nor an arrow."""
    return " ".join(text.split()).replace("-->", "->")


def _clock(seconds: float, point: str) -> str:
    whole = round(seconds * 1000)
    minutes, rest = divmod(whole, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"
