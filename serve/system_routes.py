"""The routes that answer at once: models, health, figures, tokens; and POST /generate, the offline call as JSON."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from mmjax.serve.context import ServerContext, as_json, together, unless_gone
from mmjax.serve.schema import DetokenizeRequest, GenerateRequest, TokenizeRequest, sampling

from mmjax import EngineDeadError, RequestError, RequestOutput, SamplingParams, __version__

Json = dict[str, Any]
PAGE = pathlib.Path(__file__).parent / "page" / "index.html"
DEAD: dict[int | str, Json] = {503: {"description": "The engine has stopped."}}
POLICY = (
    "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
    "media-src blob: data:; frame-ancestors 'none'"
)


def router(context: ServerContext) -> APIRouter:
    """Health, metrics, version, load, and the page."""
    routes = APIRouter()

    @routes.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        """A page to try the model with. It asks nothing of any other host."""
        return FileResponse(PAGE, media_type="text/html", headers={"Content-Security-Policy": POLICY})

    @routes.get("/health", response_class=Response, responses=DEAD)
    @routes.get("/ping", response_class=Response, responses=DEAD)
    @routes.post("/ping", response_class=Response, responses=DEAD)
    async def health() -> Response:
        """200 while requests can be served, else 503."""
        try:
            context.engine.check()
        except EngineDeadError:
            return Response(status_code=503)
        return Response()

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(context.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/version")
    async def version() -> Json:
        """The version of mmjax."""
        return {"version": __version__}

    @routes.get("/load")
    async def load() -> Json:
        """Requests under way."""
        return {"server_load": context.open}

    return routes


def models_router(context: ServerContext) -> APIRouter:
    """What is served."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> Json:
        """What is served, under each of its names."""
        limit = context.engine.llm.model.max_model_len
        cards: list[Json] = [
            {
                "id": name, "object": "model", "created": context.started, "owned_by": "mmjax",
                "root": context.engine.llm.args.model, "parent": None, "max_model_len": limit, "permission": [],
            }
            for name in context.settings.names
        ]  # fmt: skip
        return {"object": "list", "data": cards}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str = Path(examples=list(context.settings.names))) -> Json:
        """One model."""
        context.check_model(name)
        return {**(await models())["data"][0], "id": name}

    return routes


def development_router(context: ServerContext) -> APIRouter:
    """What only developers need: emptying the caches."""
    routes = APIRouter()

    @routes.post("/reset_mm_cache")
    async def reset_mm_cache() -> Response:
        """Forget processed media."""
        await context.engine.between_steps(context.engine.llm.reset_mm_cache)
        return Response()

    @routes.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Json:
        """Forget cached prefixes, if nothing runs."""
        return {"done": await context.engine.between_steps(context.engine.llm.reset_prefix_cache)}

    return routes


def tokens_router(context: ServerContext) -> APIRouter:
    """Tokenize and detokenize."""
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Token ids of a text or of a conversation, media expanded."""
        context.check_model(body.model)
        engine = context.engine
        if body.messages is None:
            tokens = await engine.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
        else:
            options = context.chat_options(body.options())
            special = {"add_special_tokens": bool(body.add_special_tokens)}
            engine_input = await unless_gone(request, engine.prepare_chat(body.messages, special, **options))
            tokens = engine_input.token_ids.tolist()
        strings = await engine.texts([[token] for token in tokens]) if body.return_token_strs else None
        limit = engine.llm.model.max_model_len
        return await as_json({"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": strings})

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Json:
        """The text of token ids."""
        context.check_model(body.model)
        vocab = context.engine.llm.model.vocab_size
        if (largest := max(body.tokens, default=0)) >= vocab:
            raise RequestError(f"Token id {largest} is out of vocabulary")
        return {"prompt": (await context.engine.texts([body.tokens]))[0]}

    return routes


def generate_router(context: ServerContext) -> APIRouter:
    """POST /generate."""
    routes = APIRouter()

    @routes.post("/generate")
    async def generate(body: GenerateRequest, request: Request) -> JSONResponse:
        """`LLM.generate` as JSON: prompts as dictionaries, their media as URLs; outputs in the prompts' order."""
        engine = context.engine
        fields = body.sampling_params
        defaults = engine.llm.get_default_sampling_params()
        params = defaults if fields is None else sampling({"max_tokens": 16, **_known(fields)}, defaults)
        many = isinstance(body.prompts, list) and not all(isinstance(entry, int) for entry in body.prompts)
        prompts = body.prompts if many else [body.prompts]
        context.check_prompts(len(prompts))
        context.check_stops((fields or {}).get("stop"))

        async def one(prompt: Any) -> RequestOutput:
            engine_input = await engine.prepare_from_urls(prompt, body.tokenization_kwargs)
            output = await engine.generate(engine_input, params, grammar)
            context.metrics.note(output)
            return output

        async with context.admitted():
            grammar = await unless_gone(request, engine.compile_grammar(params))
            outputs = await unless_gone(request, together(*map(one, prompts)))
        return JSONResponse(await asyncio.to_thread(_plain, outputs))

    return routes


def _known(fields: Mapping[str, Any]) -> Json:
    known = {field.name for field in dataclasses.fields(SamplingParams)} - {"output_kind"}
    for name in fields:
        if name not in known:
            raise RequestError(f"sampling_params: unknown field {name!r}; known are {', '.join(sorted(known))}")
    return dict(fields)


def _plain(value: Any) -> Any:
    """Outputs as JSON: dataclasses by field, numbers finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(9999.0, value)
    return value
