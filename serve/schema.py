"""The bodies of requests: OpenAI's fields, and those that vLLM adds to them.

Unknown fields are ignored with a warning in the log, or refused; see `tell_unserved`. Only the form of a field is
checked here; its value is checked where it is used. The text below a field is its description in the API's own
documentation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from typing import Annotated, Any, Literal, Protocol, Self

from mmjax.serve import published_types as published
from mmjax.serve.errors import TooDeep
from mmjax.serve.openapi import PublishedAs
from mmjax.serve.sampling_schema import (
    OF_COMPLETIONS,
    OF_RESPONSES,
    PositiveInt,
    SamplingParamsBody,
    description,
    sampling_fields,
)
from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from mmjax import RequestError, SamplingParams
from mmjax.types import GENERATION_KEYS, ValidationError

logger = logging.getLogger(__name__)
_unserved: set[str] = set()  # of which the log has told
Json = dict[str, Any]
MAX_DEPTH = 200  # nested lists and objects; recursive code that reads them needs up to 3 calls for each level
CONTAINERS = frozenset({dict, list})
GUIDED = {
    **{f"guided_{name}": f'"structured_outputs": {{"{name}": ...}}' for name in ("json", "regex", "choice", "grammar")},
    "guided_json_object": '"structured_outputs": {"json_object": true}',
    "guided_whitespace_pattern": '"disable_any_whitespace": true in "structured_outputs", beside "json"',
    "guided_decoding_backend": '"structured_outputs"; there is one backend',
}
MAX_TOLD = 100  # names of unknown fields in the log; clients choose them
MAX_TOKENIZED = 1 << 20  # characters or tokens in one call of the tokenizer, during which other requests wait
Text = Annotated[str, Field(max_length=MAX_TOKENIZED)]
CacheSalt = Annotated[str, Field(min_length=1)]
TruncatePromptTokens = Annotated[int, Field(ge=-1)]
TruncationSide = Literal["left", "right"]


class RequestBody(BaseModel):
    """A JSON body. Numbers must be finite. A boolean field that is null has its default: many clients send null for
    fields that they do not set."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_null_booleans(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        _check_depth(given)
        booleans = {name for name, field in cls.model_fields.items() if isinstance(field.default, bool)}
        return {name: value for name, value in given.items() if value is not None or name not in booleans}


def _check_depth(value: Any) -> None:
    """TooDeep for more than MAX_DEPTH levels of lists and objects."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise TooDeep
        members_of_level = [container.values() if isinstance(container, dict) else container for container in level]
        # a list of a million numbers is scanned by C alone, ten times as fast
        nested = (members for members in members_of_level if not CONTAINERS.isdisjoint(map(type, members)))
        level = [member for members in nested for member in members if type(member) in CONTAINERS]


def tell_unserved(given: Json, served: Set[str]) -> None:
    """ValidationError for fields of other servers that change what the output is; a warning in the log, once for each
    name, for every other field that is not served."""
    for name, value in given.items():
        if name in served or value is None:
            continue
        if name in GUIDED:
            raise ValidationError(f"{name} is not served; write {GUIDED[name]}.", parameter=name)
        if name == "best_of":
            if value not in (1, given.get("n")):
                raise ValidationError("best_of is not served; use `n`, and choose among the outputs.", parameter=name)
        elif name not in _unserved and len(_unserved) < MAX_TOLD:
            _unserved.add(name)
            logger.warning("the field %.100r of a request is not served, and has no effect", name)


class StreamOptions(RequestBody):
    include_usage: bool = False
    """Send a last chunk with the usage."""
    continuous_usage_stats: bool = False
    """Send the usage with every chunk."""


class GenerationFields(
    create_model("ResponsesSampling", __base__=RequestBody, **sampling_fields(OF_RESPONSES))  # type: ignore[misc]
):
    """The fields that all routes that generate text share. A sampling parameter that is null has the model's
    default."""

    model: str | None = None
    """The name of the model; null: the model that the server has."""
    stream: bool = False
    """Send the output in chunks, as it is generated."""

    @model_validator(mode="before")
    @classmethod
    def _tell_unserved(cls, given: Any) -> Any:
        if isinstance(given, dict):
            tell_unserved(given, cls.model_fields.keys())
        return given

    truncate_prompt_tokens: TruncatePromptTokens | None = None
    """Use only this many of the prompt's tokens; -1: as many as the model's length allows."""
    truncation_side: TruncationSide | None = None
    """Where tokens are left out; null: at the start, and at the end of what is embedded."""
    cache_salt: CacheSalt | None = None
    """Share cached prefixes only with requests that have the same salt."""
    request_id: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.:-]+$")] | None = None
    """The last part of the response's `id`."""


class SamplingFields(
    create_model("CompletionsSampling", __base__=GenerationFields, **sampling_fields(OF_COMPLETIONS - OF_RESPONSES))  # type: ignore[misc]
):
    """The fields that chats and completions share beyond those."""

    stream_options: StreamOptions | None = None
    """Allowed only if `stream` is true."""
    response_format: published.ResponseFormat | None = None
    """The form of the output. Do not combine with `structured_outputs`."""
    return_token_ids: bool = False
    """Return the token ids of the prompt and of the output."""
    return_tokens_as_token_ids: bool = False
    """Write tokens as `token_id:ID` in log-probabilities."""
    use_beam_search: Literal[False] | None = None
    """Not supported."""
    user: str | None = None
    """Accepted, but not used."""

    @model_validator(mode="after")
    def _check_streaming(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("Stream options can only be defined when `stream=True`.")
        if self.prompt_logprobs is not None:
            if self.prompt_logprobs < -1:
                raise ValueError("`prompt_logprobs` must be -1 or at least 0.")
            if self.stream and self.prompt_logprobs != 0:
                raise ValueError("`prompt_logprobs` are not available when `stream=True`.")
        return self

    @property
    def has_strict_schema(self) -> bool:
        """Whether `response_format` has a schema with `strict`."""
        schema = (self.response_format or {}).get("json_schema")
        return isinstance(schema, dict) and schema.get("strict") is True

    def sampling_fields(self) -> Json:
        """The fields of `SamplingParams` that are not null."""
        given = {name: getattr(self, name) for name in OF_COMPLETIONS if getattr(self, name) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = _by_token_id(self.logit_bias)
        constraint = merge_structured_outputs(self.structured_outputs, self.response_format)
        if constraint is not None:
            given["structured_outputs"] = constraint
        return given


def _by_token_id(bias: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise RequestError("logit_bias: the keys must be token ids") from None


def merge_structured_outputs(structured: Json | None, response_format: Json | None) -> Json | None:
    """The `structured_outputs` of a request that has them, or OpenAI's `response_format`, or neither."""
    if response_format is None:
        return structured
    format_type = response_format.get("type")
    if format_type == "text":
        return structured
    if structured is not None:
        raise RequestError("give response_format or structured_outputs, not both")
    if format_type == "json_object":
        return {"json_object": True}
    if format_type == "json_schema":
        schema = response_format.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise RequestError("When using `json_schema` response format, `json_schema.schema` is required.")
        return {"json": schema["schema"]}
    raise RequestError(f"response_format: unknown type {format_type!r}; known are text, json_object, json_schema")


class ChatFields(RequestBody):
    """The fields that all routes that take a conversation share."""

    add_generation_prompt: bool = True
    """End the prompt where the model's answer begins."""
    continue_final_message: bool = False
    """Let the model continue the last message."""
    tools: published.Tools | None = None
    """The functions that the model may call."""
    documents: list[Json] | None = None
    """Documents for a chat template that uses them."""
    chat_template: str | None = None
    """A template to use instead of the model's. Needs `--trust-request-chat-template`."""
    chat_template_kwargs: Json | None = None
    """Variables of the chat template."""
    mm_processor_kwargs: Json | None = None
    """Options of the model's processor."""
    media_io_kwargs: published.MediaIoOptions | None = None
    """Options of the decoders, by modality."""
    cache_salt: CacheSalt | None = None
    """Share cached prefixes only with requests that have the same salt."""

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[Json] | None) -> list[Json] | None:
        for tool in tools or ():
            function = tool.get("function")
            has_name = isinstance(function, dict) and isinstance(function.get("name"), str)
            if tool.get("type", "function") != "function" or not has_name:
                raise ValueError("each must be {'type': 'function', 'function': {'name': ..., 'parameters': ...}}")
        return tools

    @model_validator(mode="after")
    def _check_continuation(self) -> Self:
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
        return self

    def chat_kwargs(self) -> Json:
        """The keywords of `AsyncLLM.prepare_chat`."""
        return {name: getattr(self, name) for name in ChatFields.model_fields}


class ChatRequest(SamplingFields, ChatFields):
    messages: published.Messages
    """The conversation. The parts of a message are text, images, videos and audio."""
    max_completion_tokens: PositiveInt | None = None
    """The same as `max_tokens`, which it overrides."""
    logprobs: bool = False
    """Return the log-probability of each sampled token."""
    top_logprobs: Annotated[int, Field(ge=-1)] | None = None
    """Also return those of this many most likely tokens; -1 is the whole vocabulary. Needs `logprobs`."""
    tool_choice: published.ToolChoice | None = None
    """Which tools the model may or must call; null: `auto`."""
    parallel_tool_calls: bool | None = None
    """Allow several calls in one output; null: true, but one call if `tool_choice` is `required`."""
    echo: bool = False
    """Begin each output with the last message, if it has the role of the output: with `continue_final_message`, what
    the model continues."""
    add_special_tokens: bool = False
    """Let the tokenizer add special tokens to what the chat template wrote."""
    reasoning_effort: str | None = None
    """Accepted, but not used."""

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("when using `top_logprobs`, `logprobs` must be set to true.")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("When using `tool_choice`, `tools` must be set.")
        return self

    def sampling_fields(self) -> Json:
        given = super().sampling_fields()
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given

    def chat_kwargs(self) -> Json:
        """The keywords of `AsyncLLM.prepare_chat`. The template does not see tools that the model must not call."""
        return super().chat_kwargs() | ({"tools": None} if self.tool_choice == "none" else {})

    def echoed(self, role: str) -> str:
        """The text that outputs of this role begin with."""
        last = self.messages[-1] if self.echo and self.messages else {}
        content = last.get("content") if last.get("role") == role else None
        if isinstance(content, list):
            texts = (part if isinstance(part, str) else part.get("text") for part in content)
            return "\n".join(text for text in texts if isinstance(text, str))
        return content if isinstance(content, str) else ""

    def tokenization_kwargs(self) -> Json:
        return tokenization_kwargs(self) | {"add_special_tokens": self.add_special_tokens}


class ConversationsRequest(ChatRequest):
    messages: published.Conversations  # type: ignore[assignment]
    """Several conversations; all other fields apply to each of them."""
    stream: Literal[False] = False
    """Not supported."""

    def chat_requests(self) -> list[ChatRequest]:
        """One request for each conversation."""
        return [ChatRequest.model_construct(**{**dict(self), "messages": messages}) for messages in self.messages]


class CompletionRequest(SamplingFields):
    prompt: str | list[int] | list[str] | list[list[int]]
    """A text or a list of token ids, or a list of several such prompts. Media cannot be sent to this route."""
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        SamplingParams.max_tokens, description=description("max_tokens")
    )
    logprobs: Annotated[int, Field(ge=-1)] | None = Field(None, description=description("logprobs"))
    echo: bool = False
    """Begin each output with the prompt."""
    suffix: None = None
    """Not supported."""
    add_special_tokens: bool = True
    """Let the tokenizer add its special tokens to the prompt."""

    @model_validator(mode="after")
    def _check_max_tokens(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, or 0 with `echo`.")
        return self

    @property
    def only_echoes(self) -> bool:
        """Whether the prompt alone is wanted. The engine then samples one token, which is left out."""
        return self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    def sampling_fields(self) -> Json:
        given = super().sampling_fields()
        if self.only_echoes:
            given |= {"max_tokens": 1, "min_tokens": 0}
        if self.logprobs is not None:
            given["logprobs"] = self.logprobs
            if self.echo and "prompt_logprobs" not in given:
                given["prompt_logprobs"] = self.logprobs
        return given


class GenerateRequest(RequestBody):
    prompts: published.Prompts
    """One prompt or a list of prompts, as for `LLM.generate`. Media are URLs (http, https, data, file)."""
    sampling_params: Annotated[Json, PublishedAs(SamplingParamsBody)] | None = None
    """Null: the model's defaults."""
    tokenization_kwargs: published.TokenizationOptions | None = None
    """How to tokenize text prompts."""


class TokenizeRequest(ChatFields):
    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})
    model: str | None = None
    """The name of the model; null: the model that the server has."""
    prompt: Annotated[Text | None, PublishedAs(Text)] = None
    """A text. Give either this or `messages`."""
    messages: Annotated[list[Json] | None, PublishedAs(published.Conversation)] = None
    """A conversation. Give either this or `prompt`."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add its special tokens; null: true for a prompt, false for a conversation."""
    return_token_strs: bool = False
    """Also return the text of each token."""

    @model_validator(mode="after")
    def _check_one_prompt(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either `prompt` or `messages`")
        return self


class DetokenizeRequest(RequestBody):
    model: str | None = None
    """The name of the model; null: the model that the server has."""
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_TOKENIZED)]
    """Token ids."""


class TruncatedRequest(Protocol):
    truncate_prompt_tokens: int | None
    truncation_side: TruncationSide | None


def tokenization_kwargs(body: TruncatedRequest) -> Json:
    """`tokenization_kwargs` of `AsyncLLM.prepare`."""
    given = {name: getattr(body, name) for name in ("truncate_prompt_tokens", "truncation_side")}
    return {name: value for name, value in given.items() if value is not None}


def sampling_params(given: Json, defaults: SamplingParams) -> SamplingParams:
    """SamplingParams with the given fields. defaults: of the model; those that generation_config.json can set apply to
    the other fields, except max_tokens, which is None. ValidationError for invalid values."""
    inherited = {name: getattr(defaults, name) for name in GENERATION_KEYS.values()}
    return SamplingParams(**{**inherited, "max_tokens": None, **given})
