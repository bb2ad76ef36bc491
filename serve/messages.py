"""POST /v1/messages and /v1/messages/count_tokens: chat through Anthropic's API."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from mmjax.serve import errors
from mmjax.serve.chat import ChatHandler
from mmjax.serve.context import ServerContext, cancel_on_disconnect, json_response, sse_response
from mmjax.serve.messages_schema import CountTokensRequest, MessagesRequest
from mmjax.serve.openapi import MESSAGES_ERRORS, STREAM

Json = dict[str, Any]


def router(context: ServerContext) -> APIRouter:
    """The routes of messages."""
    routes = APIRouter()

    @routes.post("/v1/messages", response_model=None, responses={**STREAM, **MESSAGES_ERRORS})
    async def create(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation of text and images, in the form of Anthropic's API."""
        context.check_model(body.model)
        handler = ChatHandler(context, body.chat(), request.state.request_id, details=True)
        if body.stream:
            await cancel_on_disconnect(request, handler.prepare())
            return sse_response(_events(handler, request.state.request_id), request.state.request_id, named=True)
        chat = await cancel_on_disconnect(request, handler.answer())
        builder, [choice] = MessageBuilder(_head(handler)), chat["choices"]
        for _ in builder.add(choice["message"]):
            pass
        for _ in builder.end(choice["finish_reason"], choice["stop_reason"], chat["usage"]):
            pass
        return await json_response(builder.message)

    @routes.post("/v1/messages/count_tokens", response_model=None, responses=MESSAGES_ERRORS)
    async def count_tokens(body: CountTokensRequest, request: Request) -> Json:
        """The number of tokens of a conversation with its media and tools."""
        context.check_model(body.model)
        chat = body.chat()
        options = context.chat_kwargs(chat.chat_kwargs())
        work = context.engine.prepare_chat(chat.messages, chat.tokenization_kwargs(), **options)
        return {"input_tokens": len((await cancel_on_disconnect(request, work)).token_ids)}

    return routes


async def _events(handler: ChatHandler, request_id: str) -> AsyncGenerator[Json, None]:
    """The chunks of a chat as typed events. An error ends them."""
    assert handler.prepared is not None
    builder = MessageBuilder(_head(handler))
    reason, stop, usage = None, None, None
    for event in builder.begin(len(handler.prepared[0].token_ids)):
        yield event
    try:
        async with aclosing(handler.events()) as chunks:
            async for chunk in chunks:
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    reason, stop = choice["finish_reason"] or reason, choice.get("stop_reason") or stop
                    for event in builder.add(choice["delta"]):
                        yield event
        for event in builder.end(reason, stop, usage or {}):
            yield event
    except Exception as error:
        yield errors.as_message_error(*errors.describe(error, request_id), request_id)


def _head(handler: ChatHandler) -> Json:
    """A message without content."""
    return {
        "id": f"msg_{handler.id.removeprefix('chatcmpl-')}",
        "type": "message",
        "role": "assistant",
        "model": handler.context.name,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(0, 0, 0),
    }


def _usage(prompt: int, cached: int, completion: int) -> Json:
    """Anthropic's usage: tokens read from the cache are not among `input_tokens`."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": completion,
    }


class MessageBuilder:
    """Builds a message from a chat, and the events of each change. The last block of the content is the open one."""

    def __init__(self, head: Json) -> None:
        self.message = head
        self._pieces: list[str] = []  # of the open block: its text, or the JSON of its input
        self._is_open = False

    def begin(self, prompt_tokens: int) -> Iterator[Json]:
        """The events before any content."""
        started = {**self.message, "content": [], "usage": _usage(prompt_tokens, 0, 0)}
        yield {"type": "message_start", "message": started}
        yield {"type": "ping"}

    def add(self, message: Json) -> Iterator[Json]:
        """Add the `delta` of a chat's chunk, or the `message` of a complete chat."""
        if message.get("reasoning"):
            yield from self._open_text({"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": message["reasoning"]}, message["reasoning"])
        if message.get("content"):
            yield from self._open_text({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": message["content"]}, message["content"])
        for call in message.get("tool_calls") or ():
            function = call["function"]
            if call.get("id"):  # else more arguments of the same call
                yield from self._open({"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}})
            if arguments := function.get("arguments"):
                yield self._delta({"type": "input_json_delta", "partial_json": arguments}, arguments)

    def end(self, reason: str | None, stop: int | str | None, usage: Json) -> Iterator[Json]:
        """Complete the message. reason, stop, usage: the chat's finish_reason, stop_reason and usage."""
        yield from self._close()
        called = any(block["type"] == "tool_use" for block in self._content)
        if reason == "length":
            reason = "max_tokens"
        elif called:
            reason = "tool_use"
        else:
            reason = "stop_sequence" if isinstance(stop, str) else "end_turn"
        ending = {"stop_reason": reason, "stop_sequence": stop if reason == "stop_sequence" else None}
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        counts = _usage(usage["prompt_tokens"], cached, usage["completion_tokens"])
        self.message |= {**ending, "usage": counts}
        yield {"type": "message_delta", "delta": ending, "usage": counts}
        yield {"type": "message_stop"}

    @property
    def _content(self) -> list[Json]:
        content: list[Json] = self.message["content"]
        return content

    def _open_text(self, block: Json) -> Iterator[Json]:
        """Open a block of text, unless one of its type is open."""
        if not self._is_open or self._content[-1]["type"] != block["type"]:
            yield from self._open(block)

    def _open(self, block: Json) -> Iterator[Json]:
        yield from self._close()
        self._content.append(block)
        self._is_open = True
        yield {"type": "content_block_start", "index": len(self._content) - 1, "content_block": dict(block)}

    def _delta(self, delta: Json, piece: str) -> Json:
        self._pieces.append(piece)
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    def _close(self) -> Iterator[Json]:
        """Close the open block, if there is one."""
        if not self._is_open:
            return
        block, text = self._content[-1], "".join(self._pieces)
        if block["type"] == "tool_use":
            block["input"] = _read_input(text)
        else:
            block[block["type"]] = text
        self._pieces, self._is_open = [], False
        yield {"type": "content_block_stop", "index": len(self._content) - 1}


def _read_input(arguments: str) -> Json:
    """The arguments of a call. A text that is no JSON object, which a model may write, is the argument `arguments`."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}
