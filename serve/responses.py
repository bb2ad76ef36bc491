"""POST /v1/responses: chat through OpenAI's newer API. The server stores no responses."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from mmjax.serve import errors
from mmjax.serve.chat import ChatHandler
from mmjax.serve.context import ServerContext, cancel_on_disconnect, json_response, sse_response
from mmjax.serve.openapi import STREAM
from mmjax.serve.responses_schema import ResponsesRequest
from starlette.exceptions import HTTPException

Json = dict[str, Any]


def router(context: ServerContext) -> APIRouter:
    """The responses route."""
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=None, responses=STREAM)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, which is a list of items. The server stores no responses."""
        context.check_model(body.model)
        handler = ChatHandler(context, body.chat(), request.state.request_id, details=True)
        if body.stream:
            await cancel_on_disconnect(request, handler.prepare())
            return sse_response(_events(handler, body, request.state.request_id), request.state.request_id, named=True)
        chat = await cancel_on_disconnect(request, handler.answer())
        builder, [choice] = ResponseBuilder(_head(handler, body)), chat["choices"]
        for _ in builder.add(choice["message"], choice["logprobs"]):
            pass
        for _ in builder.end(choice["finish_reason"], chat["usage"]):
            pass
        return await json_response(builder.response)

    @routes.api_route("/v1/responses/{name}", methods=["GET", "DELETE"], include_in_schema=False)
    @routes.api_route("/v1/responses/{name}/{of_it}", methods=["GET", "POST"], include_in_schema=False)
    async def stored_response(name: str) -> None:
        """No response is stored."""
        raise HTTPException(404, f"There is no response {name!r}: the server keeps none once they are answered.")

    return routes


async def _events(handler: ChatHandler, body: ResponsesRequest, request_id: str) -> AsyncGenerator[Json, None]:
    """The chunks of a chat as typed events. After an error, the last event reports it."""
    builder, reason = ResponseBuilder(_head(handler, body)), None
    usage: Json = {}
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
        for event in builder.end(reason, usage):
            yield event
    except Exception as error:
        yield builder.fail(errors.describe(error, request_id)[1]["error"]["message"])


def _head(handler: ChatHandler, body: ResponsesRequest) -> Json:
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
        "previous_response_id": None,
        "store": False,
        "temperature": params.temperature,
        "text": {"format": body.output_format},
        "tool_choice": body.tool_choice or "auto",
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
    }


class ResponseBuilder:
    """Builds a Response object from a chat, and the numbered events of each change."""

    def __init__(self, head: Json) -> None:
        self.response = head
        self._suffix = head["id"].removeprefix("resp_")
        self._num_events = 0
        self._texts: list[str] | None = None  # the pieces of the open message; None = no message is open
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
            yield from self._close("completed")
            yield from self._call(call)

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
        """Close the message or the reasoning that is open."""
        yield from self._close_reasoning(status)
        if self._texts is None:
            return
        part = _part("".join(self._texts), self._logprobs)
        self._texts, self._logprobs, self._num_sent = None, [], 0
        position = self._position()
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        yield self._event("output_text.done", **position, content_index=0, **done)
        yield self._event("content_part.done", **position, content_index=0, part=part)
        yield self._finish_item({"id": position["item_id"], **_message(status, part)})

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

    def _call(self, call: Json) -> Iterator[Json]:
        """Add a complete call: chats do not stream parts of one."""
        function = call["function"]
        head = {"id": self._item_id("fc"), "type": "function_call", "call_id": call["id"], "name": function["name"]}
        yield self._add_item({**head, "status": "in_progress", "arguments": ""})
        position, arguments = self._position(), function["arguments"]
        yield self._event("function_call_arguments.delta", **position, delta=arguments)
        yield self._event("function_call_arguments.done", **position, name=function["name"], arguments=arguments)
        yield self._finish_item({**head, "status": "completed", "arguments": arguments})

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
