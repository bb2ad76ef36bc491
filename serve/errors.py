"""Errors as OpenAI's clients expect them: {"error": {message, type, param, code}}.

A mistake of the client is a RequestError, or a body that does not fit the schema. Every other exception is a bug of the
server: it is logged with the request's id, and the response has only that id.
"""

from __future__ import annotations

import http
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from mmjax import EngineDeadError
from mmjax.types import RequestError, TooDeepError, ValidationError

logger = logging.getLogger(__name__)
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
MESSAGES = "/v1/messages"  # routes below it have errors in Anthropic's form
MESSAGE_ERRORS: Mapping[int, str] = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class NoSuchModel(Exception):
    """The request names a model that the server does not have."""


class TooBusy(Exception):
    """As many requests are in progress as the operator allows."""


class TooDeep(Exception):
    """The body is nested too deeply. Not a ValueError, which pydantic would report as an error of one field."""


class ClientDisconnected(Exception):
    """The client has closed the connection; nobody reads the response."""


def body(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """The JSON of one error, without addresses of objects and without lone surrogates, which UTF-8 cannot encode."""
    message = ADDRESS.sub("", message).encode(errors="replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: BaseException, request_id: str) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) for an exception. Bugs of the server are logged here."""
    if isinstance(error, RequestError):
        return _refusal(error)
    if isinstance(error, RequestValidationError):
        if any(fault["loc"][-1] == "file" for fault in error.errors()):  # a text field in place of an upload
            return 422, body(_messages(error), "Unprocessable Entity", 422, "file")
        return 400, body(_messages(error), "Bad Request", 400, _param(error))
    if isinstance(error, TooDeep):
        return _refusal(TooDeepError())
    if isinstance(error, NoSuchModel):
        return 404, body(f"The model `{error}` does not exist.", "NotFoundError", 404, "model")
    if isinstance(error, TooBusy):
        return 429, body(str(error), "RateLimitError", 429)
    if isinstance(error, EngineDeadError):
        return 503, body(str(error), "ServiceUnavailableError", 503)
    if isinstance(error, HTTPException):
        return error.status_code, body(str(error.detail), http.HTTPStatus(error.status_code).phrase, error.status_code)
    logger.error("request %s failed", request_id, exc_info=error)
    words = f"Internal server error; its cause is in the server's log, under request {request_id}."
    return 500, body(words, "InternalServerError", 500)


def is_messages(path: str) -> bool:
    """Whether a path is one of Anthropic's API."""
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")


def as_message_error(status: int, content: dict[str, Any], request_id: str) -> dict[str, Any]:
    """An error in the form of Anthropic's API. content: as from `body`, or the refusal of a key."""
    error = content["error"]
    kind = MESSAGE_ERRORS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    message = error if isinstance(error, str) else error["message"]
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def _refusal(error: RequestError) -> tuple[int, dict[str, Any]]:
    if error.code == "fetch_status":
        return 422, body(str(error), "UnprocessableEntityError", 422)
    kind = "NotImplementedError" if isinstance(error, NotImplementedError) else "BadRequestError"
    return 400, body(str(error), kind, 400, error.parameter if isinstance(error, ValidationError) else None)


def _messages(error: RequestValidationError) -> str:
    messages = []
    for fault in error.errors():
        if fault["type"] == "json_invalid":  # its location is an offset, which says nothing to whoever built the body
            messages.append(f"The body is not valid JSON: {fault.get('ctx', {}).get('error', fault['msg'])}")
            continue
        where = ".".join(str(part) for part in fault["loc"] if part != "body")
        words = str(fault["msg"]).removeprefix("Value error, ")
        messages.append(f"{where}: {words}" if where else words)
    return "; ".join(messages[:5])


def _param(error: RequestValidationError) -> str | None:
    first = next(iter(error.errors()), None)
    if first is None or first["type"] == "json_invalid":
        return None
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ValidationError) and cause.parameter is not None:  # of a check of the whole body
        return cause.parameter
    return next((str(part) for part in first["loc"] if part != "body"), None)


def install(app: FastAPI) -> None:
    """Answer the exceptions that routes raise on purpose. RequestGate answers all others."""

    async def answer(request: Request, error: Exception) -> Response:
        status, content = describe(error, request.state.request_id)
        if is_messages(request.scope["path"].removeprefix(request.scope.get("root_path", ""))):
            content = as_message_error(status, content, request.state.request_id)
        headers = {"Retry-After": "1"} if status == 429 else dict(getattr(error, "headers", None) or {})
        return JSONResponse(content, status, headers)

    async def disconnected(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    for kind in (RequestError, RequestValidationError, HTTPException, TooDeep, NoSuchModel, TooBusy, EngineDeadError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientDisconnected, disconnected)
