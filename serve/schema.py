"""What clients may send: the fields of OpenAI's requests and those that users of the best-known GPU engine add.

Unknown fields are ignored. What a field means to the model is checked where it is used; here only its form is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from mmjax.serve import openapi as say
from mmjax.serve.errors import TooDeep
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mmjax import RequestError, SamplingParams

Json = dict[str, Any]
MAX_DEPTH = 200  # lists and objects in each other; what walks through them by recursion needs up to 3 calls for each
NESTS = frozenset({dict, list})
MAX_TOKENIZED = 1 << 20  # characters or tokens in one request of the tokenizer, which is done before others go on
Text = Annotated[str, Field(max_length=MAX_TOKENIZED)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class RequestBody(BaseModel):
    """A JSON body. Numbers are finite, and nothing is coerced that a client did not mean. A switch that is null, as
    many clients send those they do not set, is as its default."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _unset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        _check_depth(given)
        switches = {name for name, field in cls.model_fields.items() if isinstance(field.default, bool)}
        return {name: value for name, value in given.items() if value is not None or name not in switches}


def _check_depth(value: Any) -> None:
    """TooDeep when more than MAX_DEPTH lists and objects lie in each other."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise TooDeep
        inside = [each.values() if isinstance(each, dict) else each for each in level]
        # a million numbers are looked at by C alone, ten times as fast
        nested = (members for members in inside if not NESTS.isdisjoint(map(type, members)))
        level = [member for members in nested for member in members if type(member) in NESTS]


class StreamOptions(RequestBody):
    """`include_usage`: a last chunk with the usage; `continuous_usage_stats`: usage in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationFields(RequestBody):
    """How tokens are chosen, and the prompt cut: the fields that mean the same in every generating route. None: the
    model's default."""

    model: str | None = None
    stream: bool = False
    min_tokens: say.Count | None = None
    temperature: say.Temperature | None = None
    top_p: say.TopP | None = None
    top_k: say.TopK | None = None
    min_p: say.MinP | None = None
    seed: Seed | None = None
    presence_penalty: say.Penalty | None = None
    frequency_penalty: say.Penalty | None = None
    repetition_penalty: say.Factor | None = None
    stop: say.Word | list[say.Word] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[say.Word] | None = None
    allowed_token_ids: list[say.Token] | None = None
    logit_bias: Annotated[dict[str, float], say.Bias] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    structured_outputs: say.Structure | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.:-]+$")] | None = None


class SamplingFields(GenerationFields):
    """What else chats and completions share."""

    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    prompt_logprobs: say.Logprobs | None = None
    response_format: say.ResponseFormat | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    use_beam_search: Literal[False] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _streaming(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("Stream options can only be defined when `stream=True`.")
        if self.prompt_logprobs is not None:
            if self.prompt_logprobs < -1:
                raise ValueError("`prompt_logprobs` must be -1 or at least 0.")
            if self.stream and self.prompt_logprobs != 0:
                raise ValueError("`prompt_logprobs` are not available when `stream=True`.")
        return self

    def fields(self) -> Json:
        """The given fields that `SamplingParams` knows by the same name."""
        names = SAMPLED & type(self).model_fields.keys()
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = _by_token(self.logit_bias)
        if (structured := structure(self.structured_outputs, self.response_format)) is not None:
            given["structured_outputs"] = structured
        return given


SAMPLED = frozenset(
    {
        "n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "stop", "stop_token_ids", "bad_words", "allowed_token_ids",
        "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens",
        "prompt_logprobs",
    }
)  # fmt: skip


def _by_token(bias: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise RequestError("logit_bias: the keys must be token ids") from None


def structure(structured: Json | None, response_format: Json | None) -> Json | None:
    """The constraint that `structured_outputs` or OpenAI's `response_format` asks for, in the former's words."""
    if response_format is None:
        return structured
    kind = response_format.get("type")
    if kind == "text":
        return structured
    if structured is not None:
        raise RequestError("give response_format or structured_outputs, not both")
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        schema = response_format.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise RequestError("When using `json_schema` response format, `json_schema.schema` is required.")
        return {"json": schema["schema"]}
    raise RequestError(f"response_format: unknown type {kind!r}; known are text, json_object, json_schema")


class ChatFields(RequestBody):
    """How messages become a prompt: the fields of every route that takes a conversation."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: say.Tools | None = None
    documents: list[Json] | None = None
    chat_template: str | None = None
    chat_template_kwargs: Json | None = None
    mm_processor_kwargs: Json | None = None
    media_io_kwargs: say.IoOptions | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None

    @field_validator("tools")
    @classmethod
    def _functions(cls, tools: list[Json] | None) -> list[Json] | None:
        for tool in tools or ():
            function = tool.get("function")
            named = isinstance(function, dict) and isinstance(function.get("name"), str)
            if tool.get("type", "function") != "function" or not named:
                raise ValueError("each must be {'type': 'function', 'function': {'name': ..., 'parameters': ...}}")
        return tools

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("Cannot set both `continue_final_message` and `add_generation_prompt` to True.")
        return self

    def options(self) -> Json:
        """The keywords of `AsyncLLM.prepare_chat`."""
        return {name: getattr(self, name) for name in ChatFields.model_fields}


class ChatRequest(SamplingFields, ChatFields):
    """POST /v1/chat/completions."""

    messages: say.Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=-1)] | None = None
    tool_choice: say.ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_special_tokens: bool = False
    reasoning_effort: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("when using `top_logprobs`, `logprobs` must be set to true.")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("When using `tool_choice`, `tools` must be set.")
        return self

    def fields(self) -> Json:
        given = super().fields()
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given

    def options(self) -> Json:
        """Tools that must not be called are not told."""
        return super().options() | ({"tools": None} if self.tool_choice == "none" else {})

    def tokenization(self) -> Json:
        return tokenization(self.truncate_prompt_tokens) | {"add_special_tokens": self.add_special_tokens}


class ConversationsRequest(ChatRequest):
    """POST /v1/chat/completions/batch: many conversations, and what they have in common."""

    messages: say.Batch  # type: ignore[assignment]
    stream: Literal[False] = False

    def each(self) -> list[ChatRequest]:
        """One request for every conversation."""
        return [ChatRequest.model_construct(**{**dict(self), "messages": messages}) for messages in self.messages]


class CompletionRequest(SamplingFields):
    """POST /v1/completions: text without media."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=-1)] | None = None
    echo: bool = False
    suffix: None = None
    add_special_tokens: bool = True

    def prompts(self) -> list[str | list[int]]:
        """One prompt each."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    def fields(self) -> Json:
        given = super().fields()
        if self.logprobs is not None:
            given["logprobs"] = self.logprobs
            if self.echo and "prompt_logprobs" not in given:
                given["prompt_logprobs"] = self.logprobs
        return given


class GenerateRequest(RequestBody):
    """POST /generate: one prompt or a list of them as `LLM.generate` takes them, their media as URLs (http, https,
    data, file)."""

    prompts: say.Prompts
    sampling_params: say.SamplingOptions | None = None
    tokenization_kwargs: say.TokenOptions | None = None


class TokenizeRequest(ChatFields):
    """POST /tokenize: a prompt, or messages as for a chat."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})
    model: str | None = None
    prompt: Annotated[Text | None, say.As(Text)] = None
    messages: Annotated[list[Json] | None, say.As(say.Conversation)] = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either `prompt` or `messages`")
        return self


class DetokenizeRequest(RequestBody):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_TOKENIZED)]


def tokenization(truncate: int | None) -> Json:
    """tokenization_kwargs of a request."""
    return {} if truncate is None else {"truncate_prompt_tokens": truncate}


def sampling(given: Json, defaults: SamplingParams) -> SamplingParams:
    """Sampling parameters of the given fields over the model's defaults. ValidationError for values that cannot be."""
    kept = {name: getattr(defaults, name) for name in DEFAULTED}
    if given.get("temperature", kept["temperature"]) == 0:
        kept |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return SamplingParams(**{**kept, "max_tokens": None, **given})


DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
