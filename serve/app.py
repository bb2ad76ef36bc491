"""The FastAPI application: the routes that a model can serve, behind the middleware."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import HTTPBearer
from mmjax.serve import (
    audio,
    chat,
    completions,
    development_routes,
    embeddings,
    errors,
    messages,
    openapi,
    responses,
    scoring,
    system_routes,
)
from mmjax.serve.context import ServerContext, ServerSettings
from mmjax.serve.middleware import RequestGate
from mmjax.serve.tracing import TracedRequests

from mmjax import AsyncLLM, Speech, __version__


def create_app(engine: AsyncLLM, settings: ServerSettings) -> FastAPI:
    """A FastAPI application over an engine. Closing it closes the engine."""
    context = ServerContext(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()
        if context.tracer is not None:
            context.tracer.close()

    described: dict[str, Any] = {} if settings.api_docs else {"openapi_url": None}  # /docs and /redoc need it
    app = FastAPI(title="mmjax", version=__version__, lifespan=lifespan, **described)
    app.state.context = context
    errors.install(app)

    # RequestGate checks the keys. This dependency only publishes in the API's description that a key is needed.
    keyed: Any = {"dependencies": [Depends(HTTPBearer(auto_error=False))] if settings.keys else []}
    app.include_router(system_routes.router(context))
    app.include_router(system_routes.models_router(context), responses=openapi.MODEL_ERRORS, **keyed)
    if settings.development:
        app.include_router(development_routes.router(context), responses=openapi.MODEL_ERRORS, **keyed)
    for router in (system_routes.tokens_router, *_routers(engine, development=settings.development)):
        app.include_router(router(context), responses=openapi.GENERATION_ERRORS, **keyed)
    if context.tracer is not None:
        app.add_middleware(TracedRequests)
    app.add_middleware(
        RequestGate,
        keys=settings.keys,
        max_body=int(settings.max_body_mb * 2**20),
        add_header=settings.request_id_headers,
    )
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(settings.origins),
        allow_methods=list(settings.origin_methods),
        allow_headers=list(settings.origin_headers),
        allow_credentials=settings.credentials,
    )
    return app


def _routers(engine: AsyncLLM, *, development: bool) -> list[Callable[[ServerContext], APIRouter]]:
    """The routers of the routes that depend on what the model can do."""
    if engine.llm.args.pooling:
        return [embeddings.router, scoring.router]
    if Speech.supports(engine):
        return [audio.router, system_routes.generate_router, scoring.refusing_router]
    chats = [completions.router, chat.router, responses.router, messages.router]
    chats += [development_routes.chat_router] if development else []
    return [*chats, system_routes.generate_router, scoring.refusing_router]
