"""Types of messages, prompts, media, tools and formats as the description of the API publishes them.

They check nothing: requests carry these values as plain JSON, and the code that uses a value checks it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from mmjax.serve.openapi import PublishedAs
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

Json = dict[str, Any]


class PublishedType(BaseModel):
    """A JSON object. The texts below its fields are their descriptions."""

    model_config = ConfigDict(use_attribute_docstrings=True)


NonEmptyString = Annotated[str, WithJsonSchema({"type": "string", "minLength": 1})]
TokenId = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0})]
JsonText = Annotated[str, WithJsonSchema({"type": "string", "contentMediaType": "application/json"})]


def _role(*examples: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "minLength": 1, "examples": list(examples)})


def _url(media_type: str) -> WithJsonSchema:
    examples = [f"https://example.org/file.{media_type.partition('/')[2]}", f"data:{media_type};base64,AAAA"]
    return WithJsonSchema({"type": "string", "format": "uri", "minLength": 1, "examples": examples})


class MediaPart(PublishedType):
    uuid: NonEmptyString | None = None
    """A name for the item. A later part with the same name may be null instead of the item."""


class TextPart(PublishedType):
    type: Literal["text", "input_text", "output_text"]
    text: str


class ImageLink(PublishedType):
    url: Annotated[str, _url("image/png")]
    detail: Literal["auto", "low", "high"] = "auto"
    """Accepted, but not used."""


class ImagePart(MediaPart):
    type: Literal["image_url"]
    image_url: ImageLink


class InputImagePart(PublishedType):
    type: Literal["input_image"]
    image_url: Annotated[str, _url("image/png")]


class VideoLink(PublishedType):
    url: Annotated[str, _url("video/mp4")]


class VideoPart(MediaPart):
    type: Literal["video_url"]
    video_url: VideoLink


class AudioLink(PublishedType):
    url: Annotated[str, _url("audio/wav")]


class AudioPart(MediaPart):
    type: Literal["audio_url"]
    audio_url: AudioLink


class InputAudio(PublishedType):
    data: Annotated[str, WithJsonSchema({"type": "string", "minLength": 1, "contentEncoding": "base64"})]
    format: Annotated[str, WithJsonSchema({"type": "string", "examples": ["wav", "mp3"]})] = "wav"


class InputAudioPart(MediaPart):
    type: Literal["input_audio"]
    input_audio: InputAudio


Tensors = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {"type": "object"}]})]


class ImageEmbedsPart(PublishedType):
    """Needs `--enable-mm-embeds`."""

    type: Literal["image_embeds"]
    image_embeds: Tensors
    """A tensor in base64, or an object of tensors by name."""


class VideoEmbedsPart(PublishedType):
    """Needs `--enable-mm-embeds`."""

    type: Literal["video_embeds"]
    video_embeds: Tensors
    """A tensor in base64, or an object of tensors by name."""


class AudioEmbedsPart(PublishedType):
    """Needs `--enable-mm-embeds`."""

    type: Literal["audio_embeds"]
    audio_embeds: Tensors
    """A tensor in base64, or an object of tensors by name."""


Part = (
    TextPart | ImagePart | InputImagePart | VideoPart | AudioPart | InputAudioPart
    | ImageEmbedsPart | VideoEmbedsPart | AudioEmbedsPart
)  # fmt: skip


class CalledFunction(PublishedType):
    name: str
    arguments: JsonText


class ToolCall(PublishedType):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(PublishedType):
    role: Annotated[str, _role("system", "user", "tool")]
    """The model's chat template determines which roles are valid."""
    content: str | list[Part] | None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None


Conversation = Annotated[list[Message], Field(min_length=1)]


class MessageItem(PublishedType):
    type: Literal["message"] = "message"
    role: Annotated[str, _role("developer", "user")]
    """The roles of messages; `developer` is the same as `system`."""
    content: str | list[Part]


class CallItem(PublishedType):
    """A call that the model made earlier in the conversation."""

    type: Literal["function_call"]
    call_id: NonEmptyString
    name: NonEmptyString
    arguments: JsonText


class CallOutputItem(PublishedType):
    """The output of a call."""

    type: Literal["function_call_output"]
    call_id: NonEmptyString
    output: str | list[Part]


class ReasoningItem(PublishedType):
    """What the model thought before an earlier answer. It is left out."""

    type: Literal["reasoning"]


Items = Annotated[list[MessageItem | CallItem | CallOutputItem | ReasoningItem], Field(min_length=1)]


class Function(PublishedType):
    name: str
    description: str | None = None
    parameters: Json | None = None
    """A JSON schema."""


class Tool(PublishedType):
    type: Literal["function"]
    function: Function


class FunctionName(PublishedType):
    name: str


class NamedTool(PublishedType):
    type: Literal["function"]
    function: FunctionName


class ResponsesTool(PublishedType):
    type: Literal["function"]
    name: NonEmptyString
    description: str | None = None
    parameters: Json | None = None
    """A JSON schema."""


class ResponsesNamedTool(PublishedType):
    type: Literal["function"]
    name: str


class PlainFormat(PublishedType):
    type: Literal["text", "json_object"]


class NamedSchema(PublishedType):
    name: str | None = None
    json_schema: Annotated[Json, Field(alias="schema")]


class SchemaFormat(PublishedType):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class ResponsesSchemaFormat(PublishedType):
    type: Literal["json_schema"]
    name: str | None = None
    json_schema: Annotated[Json, Field(alias="schema")]


class ResponsesText(PublishedType):
    format: PlainFormat | ResponsesSchemaFormat | None = None


class JsonConstraint(PublishedType):
    json_schema: Annotated[str | Json, Field(alias="json")]
    """A JSON schema, or its text."""
    disable_any_whitespace: bool = False


class JsonObjectConstraint(PublishedType):
    json_object: Literal[True]


class RegexConstraint(PublishedType):
    regex: NonEmptyString


class ChoiceConstraint(PublishedType):
    choice: Annotated[list[NonEmptyString], Field(min_length=1)]


class GrammarConstraint(PublishedType):
    grammar: NonEmptyString
    """In Lark's syntax."""


class TokenizationKwargs(PublishedType):
    model_config = ConfigDict(extra="forbid")
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    """Use only this many of the prompt's tokens; -1: as many as the model's length allows."""
    truncation_side: Literal["left", "right"] | None = None
    """Where tokens are left out; null: at the start, and at the end of what is embedded."""
    max_length: Annotated[int, Field(ge=1)] | None = None
    """Refuse a longer prompt or, with `truncation`, use only this many of its tokens."""
    truncation: bool | None = None


Link = Annotated[str, WithJsonSchema({"type": "string", "format": "uri", "minLength": 1})]
Media = Link | list[Link] | Json | None


class MultiModalData(PublishedType):
    """URLs (http, https, data, file) or, with `--enable-mm-embeds`, an object of tensors in base64 by name."""

    model_config = ConfigDict(extra="forbid")
    image: Media = None
    video: Media = None
    audio: Media = None


class TextPrompt(PublishedType):
    prompt: str
    multi_modal_data: MultiModalData | None = None
    mm_processor_kwargs: Json | None = None
    cache_salt: NonEmptyString | None = None


class TokensPrompt(PublishedType):
    prompt_token_ids: Annotated[list[TokenId], Field(min_length=1)]
    multi_modal_data: MultiModalData | None = None
    mm_processor_kwargs: Json | None = None
    cache_salt: NonEmptyString | None = None


class EmbedsPrompt(PublishedType):
    """Needs `--enable-prompt-embeds`."""

    prompt_embeds: NonEmptyString
    """A tensor in base64."""
    cache_salt: NonEmptyString | None = None


ColorValue = Annotated[int, Field(ge=0, le=255)]


class ImageOptions(PublishedType):
    rgba_background_color: tuple[ColorValue, ColorValue, ColorValue] = (255, 255, 255)
    """The color that transparent pixels get."""


class VideoOptions(PublishedType):
    num_frames: Annotated[int, WithJsonSchema({"type": "integer", "anyOf": [{"const": -1}, {"minimum": 1}]})] = 32
    """Frames to sample; -1 is all."""
    fps: float | None = None
    """Most frames per second; with `opencv_dynamic`, how many per second (2 if unset)."""
    max_duration: float = 300
    """Seconds; of a longer video, `opencv_dynamic` samples as many frames as of one of this length."""
    video_backend: Literal["opencv", "opencv_dynamic"] = "opencv"
    """How frames are sampled."""
    frame_recovery: bool = False
    """Replace a frame that cannot be decoded with the next one that can."""


class MediaIoKwargs(PublishedType):
    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"type": "object"}})
    image: ImageOptions = ImageOptions()
    video: VideoOptions = VideoOptions()


AnyPrompt = str | list[TokenId] | TextPrompt | TokensPrompt | EmbedsPrompt
Choice = Literal["none", "auto", "required"]

# The types of fields: what is checked, and what is published.
Prompts = Annotated[Json | str | list[int] | list[Json | str | list[int]], PublishedAs(AnyPrompt | list[AnyPrompt])]
TokenizationOptions = Annotated[Json, PublishedAs(TokenizationKwargs)]
Messages = Annotated[list[Json], PublishedAs(Conversation)]
Conversations = Annotated[list[list[Json]], PublishedAs(Annotated[list[Conversation], Field(min_length=1)])]
Tools = Annotated[list[Json], PublishedAs(list[Tool])]
ToolChoice = Annotated[str | Json, PublishedAs(Choice | NamedTool)]
ResponseFormat = Annotated[Json, PublishedAs(PlainFormat | SchemaFormat)]
ResponsesInput = Annotated[str | list[Json], PublishedAs(NonEmptyString | Items)]
ResponsesTools = Annotated[list[Json], PublishedAs(list[ResponsesTool])]
ResponsesToolChoice = Annotated[str | Json, PublishedAs(Choice | ResponsesNamedTool)]
ResponsesTextOptions = Annotated[Json, PublishedAs(ResponsesText)]
StructuredOutputs = Annotated[
    Json,
    PublishedAs(JsonConstraint | JsonObjectConstraint | RegexConstraint | ChoiceConstraint | GrammarConstraint),
]
MediaIoOptions = Annotated[dict[str, Json], PublishedAs(MediaIoKwargs)]
Upload = WithJsonSchema({"type": "string", "format": "binary", "description": "An audio file, or a video with sound."})
