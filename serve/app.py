"""The application: which routes a model has, and what every request passes on its way to them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from mmjax.serve import chat, completions, errors, plain
from mmjax.serve.context import Context, Settings
from mmjax.serve.gate import Gate

from mmjax import AsyncLLM, __version__


def create_app(engine: AsyncLLM, settings: Settings) -> FastAPI:
    """A FastAPI application over an engine. Closing it closes the engine."""
    context = Context(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(title="mmjax", version=__version__, lifespan=lifespan, root_path=settings.root_path)
    app.state.context = context
    errors.install(app)

    @app.exception_handler(errors.ClientGone)
    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    app.include_router(plain.router(context))
    app.include_router(plain.tokens_router(context))
    app.include_router(plain.generate_router(context))
    app.include_router(completions.router(context))
    app.include_router(chat.router(context))
    app.add_middleware(
        Gate,
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
