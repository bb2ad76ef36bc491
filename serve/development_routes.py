"""The routes of MMJAX_SERVER_DEV_MODE: caches, sleep, profiles, the tokenizer, and prompts of chats."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from mmjax.serve.chat import ChatHandler
from mmjax.serve.context import ServerContext, cancel_on_disconnect, json_response
from mmjax.serve.sampling_schema import OF_GENERATE
from mmjax.serve.schema import ChatRequest
from mmjax.serve.system_routes import to_json

from mmjax import RequestError

Json = dict[str, Any]


def router(context: ServerContext) -> APIRouter:
    """The routes for the development of every model."""
    routes = APIRouter()
    engine = context.engine

    @routes.post("/reset_mm_cache")
    async def reset_mm_cache() -> Response:
        """Empty the cache of processed media."""
        await engine.reset_mm_cache()
        return Response()

    @routes.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Json:
        """Empty the prefix cache, if no request is running."""
        return {"done": await engine.reset_prefix_cache()}

    @routes.post("/sleep")
    async def sleep(level: int = 1, mode: Literal["abort", "wait"] = "abort") -> Response:
        """Free the devices' memory until /wake_up. Level 1 copies the weights to the host, level 2 discards them. mode:
        what happens to running requests."""
        await engine.sleep(level, mode)
        return Response()

    @routes.post("/wake_up")
    async def wake_up(tags: Annotated[list[str] | None, Query()] = None) -> Response:
        """Allocate what /sleep has freed: `weights`, `kv_cache`, or without tags both."""
        await engine.wake_up(tags)
        return Response()

    @routes.get("/is_sleeping")
    async def is_sleeping() -> Json:
        """Whether the engine sleeps, at least in part."""
        return {"is_sleeping": await engine.is_sleeping()}

    @routes.post("/start_profile")
    async def start_profile() -> Response:
        """Start a profile of the device and the host."""
        return await _profile(engine.llm.start_profile)

    @routes.post("/stop_profile")
    async def stop_profile() -> Response:
        """End the profile, and write it."""
        return await _profile(engine.llm.stop_profile)

    @routes.get("/tokenizer_info", response_model=None)
    async def tokenizer_info() -> Response:
        """The tokenizer's class, its arguments, and the chat template."""
        tokenizer = engine.get_tokenizer()
        arguments = await asyncio.to_thread(_plain, tokenizer.init_kwargs)
        info = {"tokenizer_class": type(tokenizer).__name__, "chat_template": tokenizer.chat_template}
        return await json_response({**arguments, **info})

    return routes


def chat_router(context: ServerContext) -> APIRouter:
    """The routes for the development of chats."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions/render", response_model=None)
    async def render(body: ChatRequest, request: Request) -> Response:
        """The prompt of a chat, and its sampling parameters as /generate takes them. Nothing is generated."""
        context.check_model(body.model)
        handler = ChatHandler(context, body, request.state.request_id)
        engine_input, params = await cancel_on_disconnect(request, handler.prepare())
        given = {name: getattr(params, name) for name in sorted(OF_GENERATE)}
        return await json_response(
            {
                "request_id": handler.id,
                "model": context.name,
                "prompt": engine_input.prompt,
                "token_ids": engine_input.token_ids.tolist(),
                "sampling_params": to_json({name: value for name, value in given.items() if value is not None}),
            }
        )

    return routes


async def _profile(call: Callable[[], None]) -> Response:
    """Call a method that starts or ends a profile. RequestError if that is not possible now."""
    try:
        await asyncio.to_thread(call)
    except RuntimeError as error:
        raise RequestError(str(error)) from None
    return Response()


def _plain(value: Any) -> Any:
    """A value as JSON can write it; other objects as their text."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
