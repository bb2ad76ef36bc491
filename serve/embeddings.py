"""POST /v1/embeddings: a vector for each text, or for a conversation with its media. POST /pooling: the same, or the
hidden states of all tokens."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from mmjax.serve.context import ServerContext, cancel_on_disconnect, gather_or_cancel, json_response, usage
from mmjax.serve.openapi import PublishedAs
from mmjax.serve.published_types import Conversation
from mmjax.serve.schema import ChatFields, TruncatePromptTokens, TruncationSide, tokenization_kwargs
from pydantic import ConfigDict, Field, model_validator

from mmjax import PoolingParams, PoolingRequestOutput, RequestError

Json = dict[str, Any]
MAX_INPUTS = 2048
Inputs = str | list[int] | list[str] | list[list[int]]


class EmbeddingRequest(ChatFields):
    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["input"]}, {"required": ["messages"]}]})
    model: str | None = None
    """The name of the model; null: the model that the server has."""
    input: Annotated[Inputs | None, PublishedAs(Inputs)] = None
    """A text or a list of token ids, or a list of several of them. Give either this or `messages`."""
    messages: Annotated[list[Json] | None, PublishedAs(Conversation)] = None
    """A conversation. Give either this or `input`."""
    encoding_format: Literal["float", "base64"] = "float"
    """How vectors are written; `base64` has little-endian float32 numbers."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Return only this many leading numbers of each vector."""
    normalize: bool | None = None
    """Scale vectors to length 1; null: as the model does by default."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add its special tokens; null: true for `input`, false for `messages`."""
    add_generation_prompt: bool = False
    """End the prompt where the model's answer would begin."""
    truncate_prompt_tokens: TruncatePromptTokens | None = None
    """Use only this many of the prompt's tokens; -1: as many as the model's length allows."""
    truncation_side: TruncationSide | None = None
    """Where tokens are left out; null: at the start, and at the end of what is embedded."""
    user: str | None = None
    """Accepted, but not used."""

    @model_validator(mode="after")
    def _one_of_two(self) -> EmbeddingRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give either `input` or `messages`")
        return self

    def prompts(self) -> list[Json]:
        """The prompts of `input`, as `AsyncLLM.prepare` takes them."""
        given = self.input
        if isinstance(given, str):
            return [{"prompt": given}]
        if given and isinstance(given[0], int):
            return [{"prompt_token_ids": given}]
        return [{"prompt" if isinstance(each, str) else "prompt_token_ids": each} for each in given or ()]


class PoolingRequest(EmbeddingRequest):
    task: Literal["embed", "token_embed"] = "token_embed"
    """`token_embed` returns the hidden states of all tokens, `embed` the vector of /v1/embeddings."""
    use_activation: bool | None = None
    """The same as `normalize`, which it overrides."""

    @model_validator(mode="after")
    def _one_name(self) -> PoolingRequest:
        if self.use_activation is not None:
            self.normalize = self.use_activation
        return self


def router(context: ServerContext) -> APIRouter:
    """The embeddings route."""
    routes = APIRouter()

    @routes.post("/v1/embeddings", response_model=None)
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        """Compute embeddings: the hidden state of the last token, by default scaled to length 1."""
        context.check_model(body.model)
        outputs = await cancel_on_disconnect(request, _answer(context, body, "embed"))
        head = {"id": f"embd-{request.state.request_id}", **head_of_list(context)}
        return await _list_response(head, outputs, body, "embedding", "embedding")

    @routes.post("/pooling", response_model=None)
    async def pool(body: PoolingRequest, request: Request) -> Response:
        """Compute the final hidden states of all tokens, or embeddings."""
        context.check_model(body.model)
        outputs = await cancel_on_disconnect(request, _answer(context, body, body.task))
        head = {"id": f"pool-{request.state.request_id}", **head_of_list(context)}
        return await _list_response(head, outputs, body, "pooling", "data")

    @routes.post("/classify", include_in_schema=False)
    async def classify() -> None:
        """Not supported."""
        context.engine.llm.classify()

    return routes


def head_of_list(context: ServerContext) -> Json:
    """The fields of a response that is a list, but its id."""
    return {"object": "list", "created": int(time.time()), "model": context.name}


async def _list_response(
    head: Json, outputs: Sequence[PoolingRequestOutput], body: EmbeddingRequest, object_type: str, field: str
) -> Response:
    """The response with an object for each output. field: the name of its numbers."""
    token_usage = usage(sum(len(output.prompt_token_ids) for output in outputs), 0)

    def rows() -> list[Json]:
        vectors = [_encode_numbers(output.outputs.data, body.encoding_format) for output in outputs]
        return [{"index": i, "object": object_type, field: vector} for i, vector in enumerate(vectors)]

    return await json_response({**head, "data": await asyncio.to_thread(rows), "usage": token_usage})


async def _answer(context: ServerContext, body: EmbeddingRequest, task: str) -> list[PoolingRequestOutput]:
    engine = context.engine
    params = PoolingParams(dimensions=body.dimensions, use_activation=body.normalize, task=task)
    options = tokenization_kwargs(body)
    if body.add_special_tokens is not None:
        options["add_special_tokens"] = body.add_special_tokens
    if body.messages is not None:
        async with context.admitted():
            engine_input = await engine.prepare_chat(body.messages, options, **context.chat_kwargs(body.chat_kwargs()))
            return [await engine.embed(engine_input, params, task=task)]
    prompts = body.prompts()
    if not prompts:
        raise RequestError("input: the list is empty")
    if len(prompts) > MAX_INPUTS:
        raise RequestError(f"input: {len(prompts)} texts in one request, at most {MAX_INPUTS}")

    async def embed(prompt: Json) -> PoolingRequestOutput:
        return await engine.embed(await engine.prepare(prompt, options), params, task=task)

    async with context.admitted():
        return await gather_or_cancel(*map(embed, prompts))


def _encode_numbers(array: Any, encoding_format: str) -> list[Any] | str:
    """Lists of numbers, or row by row as little-endian float32 in base64."""
    if encoding_format == "float":
        numbers: list[Any] = array.tolist()
        return numbers
    return base64.b64encode(array.astype("<f4").tobytes()).decode()
