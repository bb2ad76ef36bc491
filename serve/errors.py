"""Every way a request can go wrong, as OpenAI's clients expect to be told: {"error": {message, type, param, code}}."""

from __future__ import annotations

import http
import logging
import re
from typing import Any

import jinja2
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mmjax import EngineDeadError
from mmjax.types import RequestError, ValidationError

logger = logging.getLogger(__name__)
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class NoSuchModel(Exception):
    """The request names a model that is not served here."""


class TooBusy(Exception):
    """More requests are waiting than the operator allows."""


class ClientGone(Exception):
    """The client has closed the connection; nobody reads the answer."""


def body(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """The JSON of one error. Addresses of objects are nobody's business, and half a surrogate pair is no text."""
    message = ADDRESS.sub("", message).encode(errors="replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: BaseException) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) of whatever was raised."""
    if isinstance(error, ValidationError):
        return 400, body(str(error), "BadRequestError", 400, error.parameter)
    if isinstance(error, NoSuchModel):
        return 404, body(f"The model `{error}` does not exist.", "NotFoundError", 404, "model")
    if isinstance(error, TooBusy):
        return 429, body(str(error), "RateLimitError", 429)
    if isinstance(error, NotImplementedError):  # what a client asks for, and nobody here does, is its own mistake
        return 400, body(str(error), "NotImplementedError", 400)
    if isinstance(error, RequestError) and error.code == "fetch_status":
        return 422, body(str(error), "UnprocessableEntityError", 422)
    if isinstance(error, RequestValidationError):
        if any(fault["loc"][-1] == "file" for fault in error.errors()):  # a text where OpenAI's clients upload
            return 422, body(_first(error), "Unprocessable Entity", 422, "file")
        return 400, body(_first(error), "Bad Request", 400, _param(error))
    if isinstance(error, (ValueError, TypeError, OverflowError, jinja2.TemplateError)):
        return 400, body(str(error), "BadRequestError", 400)
    if isinstance(error, RecursionError):
        return 400, body("The request is nested too deeply.", "BadRequestError", 400)
    if isinstance(error, EngineDeadError):
        return 503, body(str(error), "ServiceUnavailableError", 503)
    if isinstance(error, HTTPException):
        return error.status_code, body(str(error.detail), http.HTTPStatus(error.status_code).phrase, error.status_code)
    logger.error("a request failed", exc_info=error)
    return 500, body("Internal server error; its cause is in the server's log.", "InternalServerError", 500)


def _first(error: RequestValidationError) -> str:
    told = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"] if part != "body")
        words = str(fault["msg"]).removeprefix("Value error, ")
        told.append(f"{where}: {words}" if where else words)
    return "; ".join(told[:5])


def _param(error: RequestValidationError) -> str | None:
    model = [str(part) for part in error.errors()[0]["loc"] if part != "body"] if error.errors() else []
    return model[0] if model else None


def install(app: FastAPI) -> None:
    """Answer every exception with its description."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        status, content = describe(error)
        headers = {"Retry-After": "1"} if status == 429 else dict(getattr(error, "headers", None) or {})
        return JSONResponse(content, status, headers)

    kinds = (
        ValueError, TypeError, OverflowError, jinja2.TemplateError, RequestValidationError, HTTPException, NoSuchModel,
        TooBusy, NotImplementedError, RecursionError, EngineDeadError, Exception,
    )  # fmt: skip
    for kind in kinds:
        app.add_exception_handler(kind, answer)
