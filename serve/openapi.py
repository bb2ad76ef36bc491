"""What FastAPI cannot derive for the description of the API (/openapi.json, /docs): types that are published but not
checked, and the responses that routes have in common."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter

Json = dict[str, Any]


class PublishedAs:
    """An annotation of a field: the description of the API has `published_type`, while the annotated type is what is
    checked."""

    def __init__(self, published_type: Any) -> None:
        self.published_type = published_type

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler(source)

    def __get_pydantic_json_schema__(self, _: Any, handler: GetJsonSchemaHandler) -> Json:
        return handler(TypeAdapter(self.published_type).core_schema)


def without_null(schema: Json) -> None:
    """Remove null from the types of a form's fields: a form leaves a field out, but cannot set it to null."""
    for name, field in schema["properties"].items():
        [first, *others] = [option for option in field.pop("anyOf", ()) if option != {"type": "null"}] or [None]
        if first is not None:
            schema["properties"][name] = {**field, **({"anyOf": [first, *others]} if others else first)}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(BaseModel):
    """The body of every error except a missing or wrong key."""

    error: ErrorDetail


class UnauthorizedResponse(BaseModel):
    error: Literal["Unauthorized"]


class MessageErrorDetail(BaseModel):
    type: str
    message: str


class MessageErrorResponse(BaseModel):
    """The body of every error of Anthropic's API."""

    type: Literal["error"]
    error: MessageErrorDetail
    request_id: str


Responses = dict[int | str, Json]


def _error(description: str) -> Json:
    return {"model": ErrorResponse, "description": description}


STREAM: Responses = {200: {"content": {"text/event-stream": {}}}}
TRANSCRIPT: Responses = {
    200: {
        "content": {
            media_type: {} for media_type in ("text/event-stream", "text/plain", "application/x-subrip", "text/vtt")
        }
    }
}
UNAUTHORIZED: Responses = {401: {"model": UnauthorizedResponse, "description": "The API key is missing or wrong."}}
MODEL_NOT_FOUND: Responses = {404: _error("The server has no model of this name.")}
MODEL_ERRORS: Responses = {**UNAUTHORIZED, **MODEL_NOT_FOUND, "4XX": _error("The request is invalid.")}
GENERATION_ERRORS: Responses = {
    400: _error("The request is invalid, or asks for what the server does not offer."),
    **UNAUTHORIZED,
    **MODEL_NOT_FOUND,
    413: _error("The body is too large."),
    422: _error("A site answered a media URL with an error status, or `file` is not a file."),
    429: _error("Too many requests are in progress."),
    503: _error("The engine has stopped."),
}
MESSAGES_ERRORS: Responses = {
    status: {"model": MessageErrorResponse, "description": response["description"]}
    for status, response in GENERATION_ERRORS.items()
}
