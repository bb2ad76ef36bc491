"""Types of Anthropic's messages, content blocks and tools as the description of the API publishes them. As in
`published_types`, they check nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from mmjax.serve.openapi import PublishedAs
from mmjax.serve.published_types import NonEmptyString, PublishedType
from pydantic import Field, WithJsonSchema

Json = dict[str, Any]


class TextBlock(PublishedType):
    type: Literal["text"]
    text: str


class Base64Source(PublishedType):
    type: Literal["base64"]
    media_type: Annotated[str, WithJsonSchema({"type": "string", "minLength": 1, "examples": ["image/png"]})]
    data: Annotated[str, WithJsonSchema({"type": "string", "minLength": 1, "contentEncoding": "base64"})]


class UrlSource(PublishedType):
    type: Literal["url"]
    url: Annotated[str, WithJsonSchema({"type": "string", "format": "uri", "minLength": 1})]


class ImageBlock(PublishedType):
    type: Literal["image"]
    source: Base64Source | UrlSource


class ToolUseBlock(PublishedType):
    """A call that the model made earlier in the conversation."""

    type: Literal["tool_use"]
    id: NonEmptyString
    name: NonEmptyString
    input: Json


class ToolResultBlock(PublishedType):
    """The output of a call."""

    type: Literal["tool_result"]
    tool_use_id: NonEmptyString
    content: str | list[TextBlock | ImageBlock] = ""
    is_error: bool = False
    """Accepted, but not used: chat templates have no place for it."""


class ThinkingBlock(PublishedType):
    """What the model thought earlier in the conversation."""

    type: Literal["thinking"]
    thinking: str


class UserMessage(PublishedType):
    role: Literal["user"]
    content: str | list[TextBlock | ImageBlock | ToolResultBlock]


class SystemMessage(PublishedType):
    role: Literal["system"]
    content: str | list[TextBlock]


class AssistantMessage(PublishedType):
    role: Literal["assistant"]
    content: str | list[TextBlock | ToolUseBlock | ThinkingBlock]


class MessagesTool(PublishedType):
    name: NonEmptyString
    description: str | None = None
    input_schema: Json
    """A JSON schema."""
    type: Literal["custom"] | None = None


class AutomaticChoice(PublishedType):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool = False
    """Allow one call only."""


class NamedChoice(PublishedType):
    type: Literal["tool"]
    name: NonEmptyString
    disable_parallel_tool_use: bool = False
    """Allow one call only."""


class Thinking(PublishedType):
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]


class SchemaFormat(PublishedType):
    type: Literal["json_schema"]
    json_schema: Annotated[Json, Field(alias="schema")]


class Output(PublishedType):
    format: SchemaFormat | None = None


AnyMessage = UserMessage | AssistantMessage | SystemMessage
Conversation = Annotated[list[Json], PublishedAs(Annotated[list[AnyMessage], Field(min_length=1)])]
System = Annotated[str | list[Json], PublishedAs(str | list[TextBlock])]
Tools = Annotated[list[Json], PublishedAs(list[MessagesTool])]
ToolChoice = Annotated[Json, PublishedAs(AutomaticChoice | NamedChoice)]
ThinkingChoice = Annotated[Json, PublishedAs(Thinking)]
OutputConfig = Annotated[Json, PublishedAs(Output)]
