"""POST /score and /rerank: how alike texts and images are, in the forms of vLLM, Jina and Cohere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from mmjax.serve.context import ServerContext, cancel_on_disconnect, gather_or_cancel, json_response, usage
from mmjax.serve.embeddings import MAX_INPUTS, head_of_list
from mmjax.serve.openapi import PublishedAs
from mmjax.serve.published_types import NonEmptyString, Part, PublishedType
from mmjax.serve.schema import ChatFields, RequestBody, TruncatePromptTokens, TruncationSide, tokenization_kwargs
from pydantic import ConfigDict, Field, model_validator

from mmjax import RequestError
from mmjax.types import ValidationError

Json = dict[str, Any]
PATHS = ("/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank", "/classify")


class TextDocument(PublishedType):
    text: NonEmptyString


class ImageDocument(PublishedType):
    image: NonEmptyString
    """A URL, or an image in base64."""


class PartsDocument(PublishedType):
    content: Annotated[list[Part], Field(min_length=1)]
    """The parts of a message."""


Document = NonEmptyString | TextDocument | ImageDocument | PartsDocument
AnyDocument = Annotated[str | Json, PublishedAs(Document)]
Documents = Annotated[
    str | Json | list[str | Json], PublishedAs(Document | Annotated[list[Document], Field(min_length=1)])
]
PAIRS = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items"))
NAMES = {name for pair in PAIRS for name in pair}
ONE_PAIR: Json = {
    "oneOf": [
        {"required": list(pair), "properties": {name: {"type": "null"} for name in sorted(NAMES - set(pair))}}
        for pair in PAIRS
    ]
}


class ComparisonFields(RequestBody):
    """The fields of all routes that compare."""

    model: str | None = None
    """The name of the model; null: the model that the server has."""
    mm_processor_kwargs: Json | None = None
    """Options of the model's processor."""
    truncate_prompt_tokens: TruncatePromptTokens | None = None
    """Use only this many of the tokens of each text; -1: as many as the model's length allows."""
    truncation_side: TruncationSide | None = None
    """Where tokens are left out; null: at the end."""
    user: str | None = None
    """Accepted, but not used."""


class ScoreRequest(ComparisonFields):
    model_config = ConfigDict(json_schema_extra=ONE_PAIR)
    text_1: Documents | None = None
    """What is compared: one text or image with each of `text_2`, or as many as there."""
    text_2: Documents | None = None
    """What it is compared with."""
    data_1: Documents | None = None
    """The same as `text_1`."""
    data_2: Documents | None = None
    """The same as `text_2`."""
    queries: Documents | None = None
    """The same as `text_1`."""
    documents: Documents | None = None
    """The same as `text_2`."""
    items: Documents | None = None
    """The same as `text_2`."""

    @model_validator(mode="after")
    def _one_pair(self) -> ScoreRequest:
        if {name for name in NAMES if getattr(self, name) is not None} not in map(set, PAIRS):
            raise ValueError(f"give two fields: {', or '.join(' and '.join(pair) for pair in PAIRS)}")
        return self

    def pair(self) -> tuple[list[str | Json], list[str | Json]]:
        """What is compared with what."""
        [(first, second)] = [pair for pair in PAIRS if all(getattr(self, name) is not None for name in pair)]
        return _as_list(getattr(self, first)), _as_list(getattr(self, second))


class RerankRequest(ComparisonFields):
    query: AnyDocument
    """A text or image."""
    documents: Documents
    """The texts and images that are ordered by their likeness to it."""
    top_n: Annotated[int, Field(ge=0)] | None = None
    """Return only this many; null or 0: all."""
    return_documents: bool | None = None
    """Return the documents too; null: true, except for /v2/rerank."""
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = None
    """Use only this many of the first tokens of each document."""


def router(context: ServerContext) -> APIRouter:
    """The routes that compare."""
    routes = APIRouter()

    @routes.post("/score", response_model=None)
    @routes.post("/v1/score", response_model=None)
    async def score(body: ScoreRequest, request: Request) -> Response:
        """Compute how alike texts and images are: the cosines of their embeddings, from -1 to 1."""
        context.check_model(body.model)
        work = _scores(context, body, *body.pair(), tokenization_kwargs(body))
        scores, num_tokens = await cancel_on_disconnect(request, work)
        data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)]
        head = {"id": f"score-{request.state.request_id}", **head_of_list(context)}
        return await json_response({**head, "data": data, "usage": usage(num_tokens, 0)})

    @routes.post("/rerank", response_model=None)
    @routes.post("/v1/rerank", response_model=None)
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Order documents by how alike a query they are, in Jina's form."""
        return await json_response(await _rerank(body, request, tell_documents=body.return_documents is not False))

    @routes.post("/v2/rerank", response_model=None)
    async def rerank_2(body: RerankRequest, request: Request) -> Response:
        """Order documents by how alike a query they are, in Cohere's form."""
        answer = await _rerank(body, request, tell_documents=bool(body.return_documents))
        return await json_response({**answer, "meta": {"api_version": {"version": "2"}}})

    async def _rerank(body: RerankRequest, request: Request, *, tell_documents: bool) -> Json:
        context.check_model(body.model)
        documents, options = _as_list(body.documents), tokenization_kwargs(body)
        if body.max_tokens_per_doc is not None:
            options = {"truncate_prompt_tokens": body.max_tokens_per_doc, "truncation_side": "right"}
        scores, num_tokens = await cancel_on_disconnect(
            request, _scores(context, body, [body.query], documents, options)
        )
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: body.top_n or None]
        told = [{"document": _told(documents[i])} if tell_documents else {} for i in order]
        return {
            "id": f"rerank-{request.state.request_id}",
            "model": context.name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
            "results": [
                {"index": i, "relevance_score": scores[i], **more} for i, more in zip(order, told, strict=True)
            ],
        }

    return routes


def refusing_router(context: ServerContext) -> APIRouter:
    """The routes of pooling models, for a server that has none: they say so."""
    routes = APIRouter()

    async def refuse(request: Request) -> None:
        path = request.scope["route"].path
        raise RequestError(f"{path} is only supported for pooling models. Start the server with `--runner pooling`.")

    for path in PATHS:
        routes.add_api_route(path, refuse, methods=["POST"], include_in_schema=False)
    return routes


async def _scores(
    context: ServerContext, body: ComparisonFields, first: Sequence[Any], second: Sequence[Any], options: Json
) -> tuple[list[float], int]:
    """(scores of each pair, number of all tokens). options: how `second` is tokenized."""
    if len(first) + len(second) > MAX_INPUTS:
        raise RequestError(f"{len(first) + len(second)} texts and images in one request, at most {MAX_INPUTS}")
    fields = ChatFields(add_generation_prompt=False, mm_processor_kwargs=body.mm_processor_kwargs)
    chat = context.chat_kwargs(fields.chat_kwargs())
    shared = tokenization_kwargs(body)

    async def prepare(document: str | Json, tokenization: Json) -> Any:
        content = _parts(document)
        if isinstance(content, str):
            return await context.engine.prepare({"prompt": content}, tokenization)
        messages = [{"role": "user", "content": content}]
        return await context.engine.prepare_chat(messages, {"add_special_tokens": False, **tokenization}, **chat)

    async with context.admitted():
        work = [*(prepare(each, shared) for each in first), *(prepare(each, options) for each in second)]
        inputs = await gather_or_cancel(*work)
        outputs = await context.engine.score(inputs[: len(first)], inputs[len(first) :])
    return [output.outputs.score for output in outputs], sum(len(each.token_ids) for each in inputs)


def _as_list(given: str | Json | list[str | Json]) -> list[str | Json]:
    """The texts and images. As in vLLM, an object that is not in a list has one in each of its parts."""
    if isinstance(given, list):
        return given
    if isinstance(given, dict) and isinstance(given.get("content"), list):
        return [{"content": [part]} for part in given["content"]]
    return [given]


def _parts(document: str | Json) -> str | list[Any]:
    """A text, or the parts of a message."""
    if isinstance(document, str):
        return document
    content, text, image = (document.get(name) for name in ("content", "text", "image"))
    if isinstance(content, (str, list)):
        return content
    if isinstance(image, str):
        url = image if image.startswith(("http:", "https:", "data:", "file:")) else f"data:image/png;base64,{image}"
        parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}}]
        return [*parts, {"type": "text", "text": text}] if isinstance(text, str) else parts
    if isinstance(text, str):
        return text
    words = (
        "a document is a text, or an object with `text`, `image` (a URL or base64) or `content` (parts of a message)"
    )
    raise ValidationError(words, parameter="documents")


def _told(document: str | Json) -> Json:
    """A document in a response."""
    content = _parts(document)
    if isinstance(content, str):
        return {"text": content}
    return {"multi_modal": content}
