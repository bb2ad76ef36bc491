"""POST /v1/responses: chat through OpenAI's newer API, which continues conversations that the server stores."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from mmjax.serve import errors
from mmjax.serve.chat import ChatHandler
from mmjax.serve.context import ServerContext, cancel_on_disconnect, json_response, sse_response
from mmjax.serve.openapi import STREAM
from mmjax.serve.response_store import StoredResponse, owner_of
from mmjax.serve.responses_schema import ResponsesRequest
from starlette.exceptions import HTTPException

from mmjax.types import RequestError, ValidationError

Json = dict[str, Any]
TOO_LONG = ("input_tokens", "input_text", "max_tokens")  # what errors name if a prompt leaves too little room


def router(context: ServerContext) -> APIRouter:
    """The responses route."""
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=None, responses=STREAM)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, which is a list of items."""
        context.check_model(body.model)
        conversation = Conversation(context, body, request)
        handler = ChatHandler(context, body.chat(conversation.before), conversation.request_id, details=True)
        await cancel_on_disconnect(request, _prepare(handler, body))
        builder = ResponseBuilder(_head(handler, body, is_stored=await conversation.may_be_stored()))
        if body.stream:
            events = _events(handler, builder, conversation, request.state.request_id)
            return sse_response(events, request.state.request_id, named=True)
        chat = await cancel_on_disconnect(request, handler.complete())
        [choice] = chat["choices"]
        for _ in builder.add(choice["message"], choice["logprobs"]):
            pass
        for _ in builder.end(choice["finish_reason"], chat["usage"]):
            pass
        await conversation.store(builder.response)
        return await json_response(builder.response)

    @routes.get("/v1/responses/{name}", response_model=None)
    async def stored(name: str, request: Request, stream: bool = False) -> Response:
        """A stored response."""
        if stream:
            raise RequestError("stream: a stored response is not sent in events; leave `stream` out")
        found = context.responses.get((owner_of(request), name))
        if found is None:
            raise _no_response(name)
        return await json_response(found.response)

    @routes.delete("/v1/responses/{name}", response_model=None)
    async def delete(name: str, request: Request) -> Json:
        """Delete a stored response. Those that continue it remain."""
        if not context.responses.delete((owner_of(request), name)):
            raise _no_response(name)
        return {"id": name, "object": "response", "deleted": True}

    @routes.api_route("/v1/responses/{name}/{of_it}", methods=["GET", "POST"], include_in_schema=False)
    async def of_stored(name: str, of_it: str, request: Request) -> None:
        """Not supported."""
        if context.responses.get((owner_of(request), name)) is None:
            raise _no_response(name)
        if of_it == "cancel":
            raise RequestError("Only responses that are made in the background can be cancelled, and none are here.")
        raise HTTPException(404, f"{of_it!r} of a response is not offered.")

    return routes


def _no_response(name: str) -> HTTPException:
    words = "it was not stored, was deleted, or had to make room for newer ones"
    return HTTPException(404, f"There is no response {name!r}: {words}.")


class Conversation:
    """The stored conversation of a request. before: the items that its input continues. ValidationError if it names a
    response that is not stored, or wants to store one where none are."""

    def __init__(self, context: ServerContext, body: ResponsesRequest, request: Request) -> None:
        self._store, self._body, self._owner = context.responses, body, owner_of(request)
        self._previous = None
        if (name := body.previous_response_id) is not None:
            self._previous = self._store.get((self._owner, name))
            if self._previous is None:
                raise ValidationError(f"{_no_response(name).detail}", parameter="previous_response_id")
        asks_to_store = body.store and "store" in body.model_fields_set
        if asks_to_store and not self._store.max_bytes:
            words = "store: this server stores no responses (MMJAX_RESPONSES_STORE_MB); leave it out, or send false"
            raise ValidationError(words, parameter="store")
        self.before = self._previous.items if self._previous is not None else []
        self.request_id: str = request.state.request_id
        given_id = body.request_id or self.request_id
        if body.store and self._store.get((self._owner, f"resp_{given_id}")) is not None:
            if body.request_id is not None:
                raise ValidationError("request_id: a response with this id is stored.", parameter="request_id")
            self.request_id = uuid.uuid4().hex
        self._size = 0  # of the items, as JSON

    async def may_be_stored(self) -> bool:
        """Whether the response will be stored, as far as the length of its input shows."""
        if not self._body.store:
            return False
        before = 0 if self._previous is None else self._previous.size
        self._size = before + await asyncio.to_thread(_size, self._body.items)
        return self._size < self._store.max_bytes

    async def store(self, response: Json) -> None:
        """Store the response, if it says so."""
        if response["store"]:
            items = [*self.before, *self._body.items, *response["output"]]
            size = self._size + await asyncio.to_thread(_size, response)
            response["store"] = self._store.put((self._owner, response["id"]), StoredResponse(response, items, size))


def _size(value: Any) -> int:
    """Bytes as JSON, where all is ASCII; Python's objects of a text take about as much."""
    return len(json.dumps(value))


async def _prepare(handler: ChatHandler, body: ResponsesRequest) -> None:
    """Prepare a chat. With truncation `auto`, as few of the first turns as possible are left out of a conversation that
    is too long; a turn begins with a message of the user."""
    try:
        await handler.prepare()
        return
    except ValidationError as error:
        if body.truncation != "auto" or error.parameter not in TOO_LONG:
            raise
        too_long = error
    messages = handler.body.messages
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    starts = [i for i, message in enumerate(messages) if message["role"] == "user" and i > first]

    async def fits(start: int) -> bool:
        handler.body = handler.body.model_copy(update={"messages": [*messages[:first], *messages[start:]]})
        try:
            await handler.prepare()
        except ValidationError as error:
            if error.parameter not in TOO_LONG:
                raise
            return False
        return True

    if not starts or not await fits(starts[-1]):
        raise too_long
    low, high = 0, len(starts) - 1  # bisect: starts[high] fits, and was the last one that did
    while low < high:
        middle = (low + high) // 2
        if await fits(starts[middle]):
            high = middle
        else:
            low = middle + 1


async def _events(
    handler: ChatHandler, builder: ResponseBuilder, conversation: Conversation, request_id: str
) -> AsyncGenerator[Json, None]:
    """The chunks of a chat as typed events. After an error, the last event reports it."""
    reason, usage = None, dict[str, Any]()
    for event in builder.begin():
        yield event
    try:
        async with aclosing(handler.events()) as chunks:
            async for chunk in chunks:
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    reason = choice["finish_reason"] or reason
                    for event in builder.add(choice["delta"], choice["logprobs"]):
                        yield event
        ending = list(builder.end(reason, usage))
        await conversation.store(builder.response)  # before the client knows, and goes on
        for event in ending:
            yield event
    except Exception as error:
        yield builder.fail(errors.describe(error, request_id)[1]["error"]["message"])


def _head(handler: ChatHandler, body: ResponsesRequest, *, is_stored: bool) -> Json:
    """A Response object without output: the request's fields, with the defaults that apply."""
    assert handler.prepared is not None
    _, params = handler.prepared
    tools = [{"description": None, "parameters": None, "strict": None, **tool} for tool in body.tools or ()]
    return {
        "id": f"resp_{handler.id.removeprefix('chatcmpl-')}",
        "object": "response",
        "created_at": handler.created,
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": handler.context.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "store": is_stored,
        "temperature": params.temperature,
        "text": {"format": body.output_format},
        "tool_choice": body.tool_choice or "auto",
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
    }


class ResponseBuilder:
    """Builds a Response object from a chat, and the numbered events of each change."""

    def __init__(self, head: Json) -> None:
        self.response = head
        self._suffix = head["id"].removeprefix("resp_")
        self._num_events = 0
        self._texts: list[str] | None = None  # the pieces of the open message; None = no message is open
        self._arguments: str | None = None  # of the open call; None = no call is open
        self._reasoning: list[str] | None = None  # likewise, of the open item of reasoning
        self._logprobs: list[Json] = []  # of all tokens of the open message
        self._num_sent = 0  # how many of those a delta has had

    def begin(self) -> Iterator[Json]:
        """The events before any output."""
        yield self._event("created", response=self._snapshot())
        yield self._event("in_progress", response=self._snapshot())

    def add(self, message: Json, logprobs: Json | None) -> Iterator[Json]:
        """Add the `delta` of a chat's chunk, or the `message` of a complete chat, and its `logprobs`."""
        self._logprobs += logprobs["content"] if logprobs else ()
        if message.get("reasoning"):
            yield from self._add_reasoning(message["reasoning"])
        if message.get("content"):
            yield from self._add_text(message["content"])
        for call in message.get("tool_calls") or ():
            if "id" in call:
                yield from self._close("completed")
                yield self._begin_call(call)
            if call["function"]["arguments"]:
                self._arguments = (self._arguments or "") + call["function"]["arguments"]
                delta = {"delta": call["function"]["arguments"]}
                yield self._event("function_call_arguments.delta", **self._position(), **delta)

    def end(self, reason: str | None, usage: Json) -> Iterator[Json]:
        """Complete the response. reason, usage: the chat's finish_reason and usage."""
        status = "incomplete" if reason == "length" else "completed"
        if not self.response["output"]:
            yield from self._open()
        yield from self._close(status)
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        # OpenAI bills writes to its cache; mmjax has nothing to report there
        details = {"cache_write_tokens": 0, "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]}
        self.response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": details,
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        self.response["status"] = status
        yield self._event(status, response=self._snapshot())

    def fail(self, message: str) -> Json:
        """The last event of a response that failed."""
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        return self._event("failed", response=self._snapshot())

    def _add_text(self, text: str) -> Iterator[Json]:
        if self._arguments is not None:
            yield from self._end_call("completed")
        if self._texts is None:
            yield from self._open()
        assert self._texts is not None
        self._texts.append(text)
        new, self._num_sent = self._logprobs[self._num_sent :], len(self._logprobs)
        yield self._event("output_text.delta", **self._position(), content_index=0, delta=text, logprobs=new)

    def _open(self) -> Iterator[Json]:
        """Open a message."""
        yield from self._close_reasoning("completed")
        self._texts = []
        yield self._add_item({"id": self._item_id("msg"), **_message("in_progress")})
        yield self._event("content_part.added", **self._position(), content_index=0, part=_part("", []))

    def _close(self, status: str) -> Iterator[Json]:
        """Close the message, the call or the reasoning that is open."""
        yield from self._close_reasoning(status)
        if self._arguments is not None:
            yield from self._end_call(status)
        if self._texts is None:
            return
        part = _part("".join(self._texts), self._logprobs)
        self._texts, self._logprobs, self._num_sent = None, [], 0
        position = self._position()
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        yield self._event("output_text.done", **position, content_index=0, **done)
        yield self._event("content_part.done", **position, content_index=0, part=part)
        yield self._finish_item({"id": position["item_id"], **_message(status, part)})

    def _begin_call(self, call: Json) -> Json:
        """Open a call, whose arguments follow."""
        self._arguments = ""
        head = {"id": self._item_id("fc"), "type": "function_call", "call_id": call["id"]}
        return self._add_item({**head, "name": call["function"]["name"], "status": "in_progress", "arguments": ""})

    def _end_call(self, status: str) -> Iterator[Json]:
        arguments, self._arguments = self._arguments, None
        item = self.response["output"][-1]
        done = {"name": item["name"], "arguments": arguments}
        yield self._event("function_call_arguments.done", **self._position(), **done)
        yield self._finish_item({**item, "status": status, "arguments": arguments})

    def _add_reasoning(self, text: str) -> Iterator[Json]:
        if self._reasoning is None:
            yield from self._close("completed")
            self._reasoning = []
            yield self._add_item({"id": self._item_id("rs"), **_reasoning("in_progress")})
            part = {"type": "reasoning_text", "text": ""}
            yield self._event("content_part.added", **self._position(), content_index=0, part=part)
        self._reasoning.append(text)
        yield self._event("reasoning_text.delta", **self._position(), content_index=0, delta=text)

    def _close_reasoning(self, status: str) -> Iterator[Json]:
        if self._reasoning is None:
            return
        part = {"type": "reasoning_text", "text": "".join(self._reasoning)}
        self._reasoning, position = None, self._position()
        yield self._event("reasoning_text.done", **position, content_index=0, text=part["text"])
        yield self._event("content_part.done", **position, content_index=0, part=part)
        yield self._finish_item({"id": position["item_id"], **_reasoning(status, part)})

    def _event(self, kind: str, **more: Any) -> Json:
        self._num_events += 1
        return {"type": f"response.{kind}", "sequence_number": self._num_events - 1, **more}

    def _snapshot(self) -> Json:
        """A copy, which later changes leave alone."""
        return {**self.response, "output": list(self.response["output"])}

    def _item_id(self, kind: str) -> str:
        return f"{kind}_{self._suffix}_{len(self.response['output'])}"

    def _position(self) -> Json:
        """The id and index of the newest item."""
        output = self.response["output"]
        return {"item_id": output[-1]["id"], "output_index": len(output) - 1}

    def _add_item(self, item: Json) -> Json:
        self.response["output"].append(item)
        return self._event("output_item.added", output_index=len(self.response["output"]) - 1, item=item)

    def _finish_item(self, item: Json) -> Json:
        self.response["output"][-1] = item
        return self._event("output_item.done", output_index=len(self.response["output"]) - 1, item=item)


def _message(status: str, *parts: Json) -> Json:
    return {"type": "message", "status": status, "role": "assistant", "content": list(parts)}


def _reasoning(status: str, *parts: Json) -> Json:
    return {"type": "reasoning", "status": status, "summary": [], "content": list(parts)}


def _part(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
