"""The application: which routes a model has, and what every request passes on its way to them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import HTTPBearer
from mmjax.serve import audio, chat, completions, embeddings, errors, openapi, responses, system_routes
from mmjax.serve.context import ServerContext, ServerSettings
from mmjax.serve.middleware import RequestGate

from mmjax import AsyncLLM, Speech, __version__


def create_app(engine: AsyncLLM, settings: ServerSettings) -> FastAPI:
    """A FastAPI application over an engine. Closing it closes the engine."""
    context = ServerContext(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(title="mmjax", version=__version__, lifespan=lifespan)
    app.state.context = context
    errors.install(app)

    # The gate asks for keys; this only tells clients so.
    keyed: Any = {"dependencies": [Depends(HTTPBearer(auto_error=False))] if settings.keys else []}
    app.include_router(system_routes.router(context))
    app.include_router(system_routes.models_router(context), responses=openapi.MODEL_ERRORS, **keyed)
    if settings.development:
        app.include_router(system_routes.development_router(context), responses=openapi.UNAUTHORIZED, **keyed)
    for router in (system_routes.tokens_router, *_routers(engine)):
        app.include_router(router(context), responses=openapi.GENERATION_ERRORS, **keyed)
    app.add_middleware(
        RequestGate,
        keys=settings.keys,
        max_body=int(settings.max_body_mb * 2**20),
        tell_id=settings.tell_ids,
    )
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(settings.origins),
        allow_methods=list(settings.origin_methods),
        allow_headers=list(settings.origin_headers),
        allow_credentials=settings.credentials,
    )
    return app


def _routers(engine: AsyncLLM) -> list[Callable[[ServerContext], APIRouter]]:
    """The routes that the model can serve."""
    if engine.llm.args.pooling:
        return [embeddings.router]
    if Speech.supports(engine):
        return [audio.router, system_routes.generate_router]
    return [completions.router, chat.router, responses.router, system_routes.generate_router]
