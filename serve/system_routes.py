"""Models, health, metrics, tokenization, and POST /generate, which is `LLM.generate` as JSON."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from mmjax.serve.context import ServerContext, cancel_on_disconnect, gather_or_cancel, json_response
from mmjax.serve.sampling_schema import OF_GENERATE
from mmjax.serve.schema import DetokenizeRequest, GenerateRequest, TokenizeRequest, sampling_params

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
        """A page to try the model. It sends no requests to other hosts."""
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
        """Metrics for Prometheus."""
        return Response(context.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/version")
    async def version() -> Json:
        """The version of mmjax."""
        return {"version": __version__}

    @routes.get("/load")
    async def load() -> Json:
        """The number of requests in progress."""
        return {"server_load": context.num_requests}

    return routes


def models_router(context: ServerContext) -> APIRouter:
    """The routes that describe the model."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> Json:
        """The model, once for each of its names."""
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
        """The model, if it has this name."""
        context.check_model(name)
        return {**(await models())["data"][0], "id": name}

    return routes


def tokens_router(context: ServerContext) -> APIRouter:
    """The routes of the tokenizer."""
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Token ids of a text, or of a conversation with the placeholders of its media."""
        context.check_model(body.model)
        engine = context.engine
        if body.messages is None:
            tokens = await engine.tokenize(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
        else:
            options = context.chat_kwargs(body.chat_kwargs())
            special = {"add_special_tokens": bool(body.add_special_tokens)}
            engine_input = await cancel_on_disconnect(request, engine.prepare_chat(body.messages, special, **options))
            tokens = engine_input.token_ids.tolist()
        strings = await engine.texts([[token] for token in tokens]) if body.return_token_strs else None
        limit = engine.llm.model.max_model_len
        return await json_response(
            {"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": strings}
        )

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Json:
        """Text of token ids."""
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
        """Call `LLM.generate`. The outputs have the order of the prompts."""
        engine = context.engine
        fields = body.sampling_params
        defaults = engine.llm.get_default_sampling_params()
        params = (
            defaults
            if fields is None
            else sampling_params({"max_tokens": SamplingParams.max_tokens, **_check_names(fields)}, defaults)
        )
        is_list = isinstance(body.prompts, list) and not all(isinstance(entry, int) for entry in body.prompts)
        prompts = body.prompts if is_list else [body.prompts]
        context.check_prompts(len(prompts))
        context.check_stops((fields or {}).get("stop"))

        async def generate_one(prompt: Any) -> RequestOutput:
            engine_input = await engine.prepare_from_urls(prompt, body.tokenization_kwargs)
            output = await engine.complete(engine_input, params, grammar)
            context.metrics.record(output)
            return output

        async with context.admitted():
            grammar = await cancel_on_disconnect(request, engine.compile_grammar(params))
            outputs = await cancel_on_disconnect(request, gather_or_cancel(*map(generate_one, prompts)))
        return JSONResponse(await asyncio.to_thread(to_json, outputs))

    return routes


def _check_names(fields: Mapping[str, Any]) -> Json:
    """RequestError for a name that is not a sampling parameter."""
    for name in fields:
        if name not in OF_GENERATE:
            raise RequestError(f"sampling_params: unknown field {name!r}; known are {', '.join(sorted(OF_GENERATE))}")
    return dict(fields)


def to_json(value: Any) -> Any:
    """Outputs as values that JSON can write: dataclasses become objects, and infinite numbers +-9999."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(9999.0, value)
    return value
