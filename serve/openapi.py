"""What the description of the API (/openapi.json, /docs) says of requests and errors beyond what their fields check.

Messages, numbers and schemas are read, and refused, where they are used; the types here only tell clients what will be
taken. Nothing is validated by them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    WithJsonSchema,
)

Json = dict[str, Any]


class As:
    """An annotation: published as another type than the one that is checked."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler(source)

    def __get_pydantic_json_schema__(self, _: Any, handler: GetJsonSchemaHandler) -> Json:
        return handler(TypeAdapter(self.kind).core_schema)


def without_null(schema: Json) -> None:
    """The schema of a form: there, what is not given is left out."""
    for name, field in schema["properties"].items():
        [kind, *others] = [kind for kind in field.pop("anyOf", ()) if kind != {"type": "null"}] or [None]
        if kind is not None:
            schema["properties"][name] = {**field, **({"anyOf": [kind, *others]} if others else kind)}


def _number(kind: Literal["integer", "number"], **bounds: float) -> WithJsonSchema:
    return WithJsonSchema({"type": kind, **bounds})


Penalty = Annotated[float, _number("number", minimum=-2, maximum=2)]
Factor = Annotated[float, _number("number", exclusiveMinimum=0)]
Temperature = Annotated[float, _number("number", minimum=0)]
TopP = Annotated[float, _number("number", exclusiveMinimum=0, maximum=1)]
MinP = Annotated[float, _number("number", minimum=0, maximum=1)]
TopK = Annotated[int, _number("integer", minimum=-1)]
Count = Annotated[int, _number("integer", minimum=0)]
Logprobs = Annotated[int, _number("integer", minimum=-1)]
Token = Annotated[int, _number("integer", minimum=0)]
Word = Annotated[str, WithJsonSchema({"type": "string", "minLength": 1})]
Upload = WithJsonSchema({"type": "string", "format": "binary", "description": "A sound file."})
Bias = WithJsonSchema(
    {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]+$"},
        "additionalProperties": {"type": "number"},
        "description": "By token id; values beyond 100 count as 100.",
    }
)


def _link(media: str) -> WithJsonSchema:
    examples = [f"https://example.org/file.{media.partition('/')[2]}", f"data:{media};base64,AAAA"]
    return WithJsonSchema({"type": "string", "format": "uri", "minLength": 1, "examples": examples})


class TextPart(BaseModel):
    type: Literal["text", "input_text", "output_text"]
    text: str


class ImageLink(BaseModel):
    url: Annotated[str, _link("image/png")]
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(BaseModel):
    """`uuid` names the picture; under its name it may be left out the next time."""

    type: Literal["image_url"]
    image_url: ImageLink
    uuid: Word | None = None


class InputImagePart(BaseModel):
    type: Literal["input_image"]
    image_url: Annotated[str, _link("image/png")]


class VideoLink(BaseModel):
    url: Annotated[str, _link("video/mp4")]


class VideoPart(BaseModel):
    type: Literal["video_url"]
    video_url: VideoLink
    uuid: Word | None = None


class AudioLink(BaseModel):
    url: Annotated[str, _link("audio/wav")]


class AudioPart(BaseModel):
    type: Literal["audio_url"]
    audio_url: AudioLink
    uuid: Word | None = None


class Sound(BaseModel):
    data: Annotated[str, WithJsonSchema({"type": "string", "minLength": 1, "contentEncoding": "base64"})]
    format: Annotated[str, WithJsonSchema({"type": "string", "examples": ["wav", "mp3"]})] = "wav"


class SoundPart(BaseModel):
    type: Literal["input_audio"]
    input_audio: Sound
    uuid: Word | None = None


Tensor = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {"type": "object"}]})]


class ImageEmbedsPart(BaseModel):
    """Tensors in base64, one or by name. Only with --enable-mm-embeds."""

    type: Literal["image_embeds"]
    image_embeds: Tensor


class VideoEmbedsPart(BaseModel):
    """As for images."""

    type: Literal["video_embeds"]
    video_embeds: Tensor


class AudioEmbedsPart(BaseModel):
    """As for images."""

    type: Literal["audio_embeds"]
    audio_embeds: Tensor


Part = (
    TextPart | ImagePart | InputImagePart | VideoPart | AudioPart | SoundPart
    | ImageEmbedsPart | VideoEmbedsPart | AudioEmbedsPart
)  # fmt: skip


class CalledFunction(BaseModel):
    name: str
    arguments: Annotated[str, WithJsonSchema({"type": "string", "contentMediaType": "application/json"})]


class ToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """Which roles there are is for the model's template to say."""

    role: Annotated[str, WithJsonSchema({"type": "string", "minLength": 1, "examples": ["system", "user", "tool"]})]
    content: str | list[Part] | None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None


Conversation = Annotated[list[Message], Field(min_length=1)]


class MessageItem(BaseModel):
    """Roles as in messages; `developer` is `system`."""

    type: Literal["message"] = "message"
    role: Annotated[str, WithJsonSchema({"type": "string", "minLength": 1, "examples": ["developer", "user"]})]
    content: str | list[Part]


class CallItem(BaseModel):
    """A call that the model made before."""

    type: Literal["function_call"]
    call_id: Word
    name: Word
    arguments: Annotated[str, WithJsonSchema({"type": "string", "contentMediaType": "application/json"})]


class CallOutputItem(BaseModel):
    """What the call gave."""

    type: Literal["function_call_output"]
    call_id: Word
    output: str | list[Part]


Items = Annotated[list[MessageItem | CallItem | CallOutputItem], Field(min_length=1)]


class Function(BaseModel):
    name: str
    description: str | None = None
    parameters: Json | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"]
    function: FunctionName


class FlatTool(BaseModel):
    type: Literal["function"]
    name: Word
    description: str | None = None
    parameters: Json | None = None


class FlatChoice(BaseModel):
    type: Literal["function"]
    name: str


class PlainFormat(BaseModel):
    type: Literal["text", "json_object"]


class NamedSchema(BaseModel):
    name: str | None = None
    given: Annotated[Json, Field(alias="schema")]


class SchemaFormat(BaseModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class FlatSchemaFormat(BaseModel):
    type: Literal["json_schema"]
    name: str | None = None
    given: Annotated[Json, Field(alias="schema")]


class TextOptions(BaseModel):
    format: PlainFormat | FlatSchemaFormat | None = None


class JsonAnswer(BaseModel):
    given: Annotated[str | Json, Field(alias="json")]
    disable_any_whitespace: bool = False


class JsonObjectAnswer(BaseModel):
    json_object: Literal[True]


class RegexAnswer(BaseModel):
    regex: Word


class ChoiceAnswer(BaseModel):
    choice: Annotated[list[Word], Field(min_length=1)]


class GrammarAnswer(BaseModel):
    """In Lark's form."""

    grammar: Word


Shade = Annotated[int, Field(ge=0, le=255)]


class SamplingFields(BaseModel):
    """The fields of `SamplingParams`."""

    model_config = ConfigDict(extra="forbid")
    n: Annotated[int, Field(ge=1)] = 1
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Factor = 1.0
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    seed: int | None = None
    stop: Word | list[Word] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[Word] | None = None
    ignore_eos: bool = False
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    min_tokens: Count = 0
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: Structure | None = None
    logit_bias: Annotated[dict[str, float], Bias] | None = None
    allowed_token_ids: list[Token] | None = None
    extra_args: Json | None = None


class TokenizationFields(BaseModel):
    """What is done to the prompt's tokens."""

    model_config = ConfigDict(extra="forbid")
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None


Link = Annotated[str, WithJsonSchema({"type": "string", "format": "uri", "minLength": 1})]


Media = Link | list[Link] | Json | None


class MediaByKind(BaseModel):
    """URLs (http, https, data, file); with --enable-mm-embeds tensors in base64, by name."""

    model_config = ConfigDict(extra="forbid")
    image: Media = None
    video: Media = None
    audio: Media = None


class TextPrompt(BaseModel):
    prompt: str
    multi_modal_data: MediaByKind | None = None
    mm_processor_kwargs: Json | None = None
    cache_salt: Word | None = None


class TokensPrompt(BaseModel):
    prompt_token_ids: Annotated[list[Token], Field(min_length=1)]
    multi_modal_data: MediaByKind | None = None
    mm_processor_kwargs: Json | None = None
    cache_salt: Word | None = None


class EmbedsPrompt(BaseModel):
    """A tensor in base64. Only with --enable-prompt-embeds."""

    prompt_embeds: Word
    cache_salt: Word | None = None


class ImageIo(BaseModel):
    rgba_background_color: tuple[Shade, Shade, Shade] = (255, 255, 255)


class VideoIo(BaseModel):
    num_frames: Annotated[int, WithJsonSchema({"type": "integer", "anyOf": [{"const": -1}, {"minimum": 1}]})] = 32
    fps: float | None = None
    max_duration: float = 300
    video_backend: Literal["opencv", "opencv_dynamic"] = "opencv"
    frame_recovery: bool = False


class MediaIo(BaseModel):
    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"type": "object"}})
    image: ImageIo = ImageIo()
    video: VideoIo = VideoIo()


class Fault(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class Refusal(BaseModel):
    """What every error but a missing key looks like."""

    error: Fault


class NoKey(BaseModel):
    error: Literal["Unauthorized"]


Prompt = str | list[Token] | TextPrompt | TokensPrompt | EmbedsPrompt
Prompts = Annotated[Json | str | list[int] | list[Json | str | list[int]], As(Prompt | list[Prompt])]
TokenOptions = Annotated[Json, As(TokenizationFields)]
SamplingOptions = Annotated[Json, As(SamplingFields)]
Messages = Annotated[list[Json], As(Conversation)]
Batch = Annotated[list[list[Json]], As(Annotated[list[Conversation], Field(min_length=1)])]
Tools = Annotated[list[Json], As(list[Tool])]
ToolChoice = Annotated[str | Json, As(Literal["none", "auto", "required"] | NamedTool)]
ResponseFormat = Annotated[Json, As(PlainFormat | SchemaFormat)]
ResponseInput = Annotated[str | list[Json], As(Word | Items)]
FlatTools = Annotated[list[Json], As(list[FlatTool])]
FlatToolChoice = Annotated[str | Json, As(Literal["none", "auto", "required"] | FlatChoice)]
TextForm = Annotated[Json, As(TextOptions)]
Structure = Annotated[Json, As(JsonAnswer | JsonObjectAnswer | RegexAnswer | ChoiceAnswer | GrammarAnswer)]
IoOptions = Annotated[dict[str, Json], As(MediaIo)]

STREAM: dict[int | str, Json] = {200: {"content": {"text/event-stream": {}}}}
TRANSCRIPT: dict[int | str, Json] = {
    200: {"content": {kind: {} for kind in ("text/event-stream", "text/plain", "application/x-subrip", "text/vtt")}}
}
KEYLESS: dict[int | str, Json] = {401: {"model": NoKey, "description": "The request brings no valid key."}}
NO_SUCH_MODEL: dict[int | str, Json] = {
    **KEYLESS,
    404: {"model": Refusal, "description": "The model is not served here."},
    "4XX": {"model": Refusal, "description": "The request is none."},
}
REFUSALS: dict[int | str, Json] = {
    400: {"model": Refusal, "description": "Something is wrong with the request, or not to be had."},
    **KEYLESS,
    404: NO_SUCH_MODEL[404],
    413: {"model": Refusal, "description": "The body is too large."},
    422: {"model": Refusal, "description": "A site refused to give a medium, or a file is none."},
    429: {"model": Refusal, "description": "Too many requests are under way."},
    503: {"model": Refusal, "description": "The engine has stopped."},
}
