"""POST /v1/responses: the chat under OpenAI's newer form, of which nothing is kept."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from mmjax.serve import errors
from mmjax.serve.chat import ChatHandler
from mmjax.serve.context import ServerContext, as_json, event_stream, unless_gone
from mmjax.serve.openapi import STREAM
from mmjax.serve.responses_schema import ResponsesRequest
from starlette.exceptions import HTTPException

Json = dict[str, Any]


def router(context: ServerContext) -> APIRouter:
    """The route of responses."""
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=None, responses=STREAM)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation that is given as items; in typed events on request. Nothing is kept."""
        context.check_model(body.model)
        conversation = ChatHandler(context, body.chat(), request.state.request_id, details=True)
        if body.stream:
            await unless_gone(request, conversation.prepare())
            return event_stream(
                _events(conversation, body, request.state.request_id), request.state.request_id, named=True
            )
        told = await unless_gone(request, conversation.answer())
        answer, [choice] = ResponseBuilder(_head(conversation, body)), told["choices"]
        for _ in answer.take(choice["message"], choice["logprobs"]):
            pass
        for _ in answer.end(choice["finish_reason"], told["usage"]):
            pass
        return await as_json(answer.response)

    @routes.api_route("/v1/responses/{name}", methods=["GET", "DELETE"], include_in_schema=False)
    @routes.api_route("/v1/responses/{name}/{of_it}", methods=["GET", "POST"], include_in_schema=False)
    async def earlier(name: str) -> None:
        """There are none."""
        raise HTTPException(404, f"There is no response {name!r}: the server keeps none once they are answered.")

    return routes


async def _events(conversation: ChatHandler, body: ResponsesRequest, request_id: str) -> AsyncGenerator[Json, None]:
    """The chunks of a chat as typed events. What fails on the way is told by the last."""
    answer, reason = ResponseBuilder(_head(conversation, body)), None
    used: Json = {}
    for event in answer.begin():
        yield event
    try:
        async with aclosing(conversation.events()) as chunks:
            async for chunk in chunks:
                used = chunk.get("usage") or used
                for choice in chunk["choices"]:
                    reason = choice["finish_reason"] or reason
                    for event in answer.take(choice["delta"], choice["logprobs"]):
                        yield event
        for event in answer.end(reason, used):
            yield event
    except Exception as error:
        yield answer.failed(errors.describe(error, request_id)[1]["error"]["message"])


def _head(conversation: ChatHandler, body: ResponsesRequest) -> Json:
    """A Response object without an answer: what was asked for, and how it was understood."""
    assert conversation.prepared is not None
    _, params = conversation.prepared
    tools = [{"description": None, "parameters": None, "strict": None, **tool} for tool in body.tools or ()]
    return {
        "id": f"resp_{conversation.id.removeprefix('chatcmpl-')}",
        "object": "response",
        "created_at": conversation.created,
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": conversation.context.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": params.temperature,
        "text": {"format": body.form},
        "tool_choice": body.tool_choice or "auto",
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
    }


class ResponseBuilder:
    """A Response object as it grows, and the events that tell of it, numbered. Each event is as of when it is made."""

    def __init__(self, head: Json) -> None:
        self.response = head
        self._suffix = head["id"].removeprefix("resp_")
        self._made = 0
        self._said: list[str] | None = None  # the pieces of the message that is being written
        self._logprobs: list[Json] = []  # of all its tokens
        self._told = 0  # how many of those a delta has told

    def begin(self) -> Iterator[Json]:
        """Before anything is said."""
        yield self._event("created", response=self._now())
        yield self._event("in_progress", response=self._now())

    def take(self, said: Json, logprobs: Json | None) -> Iterator[Json]:
        """More of it: the `delta` of a chat's chunk, or the `message` of a whole one, and its `logprobs`."""
        self._logprobs += logprobs["content"] if logprobs else ()
        if said.get("content"):
            yield from self._say(said["content"])
        for call in said.get("tool_calls") or ():
            yield from self._close("completed")
            yield from self._call(call)

    def end(self, reason: str | None, used: Json) -> Iterator[Json]:
        """All was said. `reason` and `used`: the chat's finish_reason and usage."""
        status = "incomplete" if reason == "length" else "completed"
        if not self.response["output"]:
            yield from self._open()
        yield from self._close(status)
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        # OpenAI charges for what it writes to its cache; here nobody does
        details = {"cache_write_tokens": 0, "cached_tokens": used["prompt_tokens_details"]["cached_tokens"]}
        self.response["usage"] = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": details,
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        self.response["status"] = status
        yield self._event(status, response=self._now())

    def failed(self, message: str) -> Json:
        """The last event of an answer that will not be finished."""
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        return self._event("failed", response=self._now())

    def _say(self, text: str) -> Iterator[Json]:
        if self._said is None:
            yield from self._open()
        assert self._said is not None
        self._said.append(text)
        fresh, self._told = self._logprobs[self._told :], len(self._logprobs)
        yield self._event("output_text.delta", **self._place(), content_index=0, delta=text, logprobs=fresh)

    def _open(self) -> Iterator[Json]:
        """A message begins."""
        self._said = []
        yield self._add({"id": self._name("msg"), **_message("in_progress")})
        yield self._event("content_part.added", **self._place(), content_index=0, part=_part("", []))

    def _close(self, status: str) -> Iterator[Json]:
        """The message ends, if one had begun."""
        if self._said is None:
            return
        part = _part("".join(self._said), self._logprobs)
        self._said, self._logprobs, self._told = None, [], 0
        place = self._place()
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        yield self._event("output_text.done", **place, content_index=0, **done)
        yield self._event("content_part.done", **place, content_index=0, part=part)
        yield self._finish({"id": place["item_id"], **_message(status, part)})

    def _call(self, call: Json) -> Iterator[Json]:
        """A call, whole: chats tell no parts of one."""
        function = call["function"]
        head = {"id": self._name("fc"), "type": "function_call", "call_id": call["id"], "name": function["name"]}
        yield self._add({**head, "status": "in_progress", "arguments": ""})
        place, arguments = self._place(), function["arguments"]
        yield self._event("function_call_arguments.delta", **place, delta=arguments)
        yield self._event("function_call_arguments.done", **place, name=function["name"], arguments=arguments)
        yield self._finish({**head, "status": "completed", "arguments": arguments})

    def _event(self, kind: str, **more: Any) -> Json:
        self._made += 1
        return {"type": f"response.{kind}", "sequence_number": self._made - 1, **more}

    def _now(self) -> Json:
        return {**self.response, "output": list(self.response["output"])}

    def _name(self, kind: str) -> str:
        return f"{kind}_{self._suffix}_{len(self.response['output'])}"

    def _place(self) -> Json:
        """Where the newest item stands."""
        output = self.response["output"]
        return {"item_id": output[-1]["id"], "output_index": len(output) - 1}

    def _add(self, item: Json) -> Json:
        self.response["output"].append(item)
        return self._event("output_item.added", output_index=len(self.response["output"]) - 1, item=item)

    def _finish(self, item: Json) -> Json:
        self.response["output"][-1] = item
        return self._event("output_item.done", output_index=len(self.response["output"]) - 1, item=item)


def _message(status: str, *model: Json) -> Json:
    return {"type": "message", "status": status, "role": "assistant", "content": list(model)}


def _part(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
