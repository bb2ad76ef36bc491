"""Checks before every route: API keys, body sizes, content types; request ids and the log."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import time
import urllib.parse
import uuid
from collections.abc import Sequence
from typing import Any

from mmjax.serve import errors
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

# Monitors, load balancers and browsers request these without a key.
OPEN = frozenset({"/", "/health", "/ping", "/metrics", "/version", "/load", "/docs", "/redoc", "/openapi.json"})


class RequestGate:
    """ASGI middleware. keys: any of them gives access to every route that uses the model; empty = no key is needed.
    max_body: largest body, bytes. add_header: responses have the header X-Request-Id.

    Each request has an id: the client's X-Request-Id, or a random one. It is in the ids of responses and in the log,
    which has one line per request. The bytes of a body are counted as they arrive, because Content-Length may be wrong.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], max_body: int, add_header: bool) -> None:
        self.app = app
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self.max_body = max_body
        self.tell_id = add_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        scope.setdefault("state", {})["request_id"] = given if _is_valid_id(given) else uuid.uuid4().hex
        is_head = scope["method"] == "HEAD"
        status, start = 0, time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.tell_id:
                    name = scope["state"]["request_id"].encode("latin-1")
                    message.setdefault("headers", []).append((b"x-request-id", name))
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            refusal = self._refuse(scope, headers)
            if refusal is not None:
                await self._respond(scope, send_with_id, *refusal)
            else:
                # HEAD is GET without the body: FastAPI's routes only know the methods that they name
                asked = {**scope, "method": "GET"} if is_head else scope
                await self.app(asked, self._counted(receive), send_with_id)
        except Exception as error:  # no route raises it on purpose: a bug
            described = errors.describe(error, scope["state"]["request_id"])
            if not status:  # else the response has begun; it breaks off
                await self._respond(scope, send_with_id, *described)
        finally:
            self._log(scope, status, time.monotonic() - start)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        """Log one line. Requests of monitors are frequent, and logged at DEBUG."""
        path, client = urllib.parse.quote(scope["path"], errors="replace"), (scope.get("client") or ("-",))[0]
        level = logging.DEBUG if scope["path"] in OPEN else logging.INFO
        words = (client, scope["method"], path, status, seconds, scope["state"]["request_id"])
        logger.log(level, "%s %s %s %d in %.3f s, request %s", *words)

    async def _respond(self, scope: Scope, send: Send, status: int, content: dict[str, Any]) -> None:
        if errors.is_messages(_path(scope)):
            content = errors.as_message_error(status, content, scope["state"]["request_id"])
        text = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    def _refuse(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, dict[str, Any]] | None:
        """(status, body) if the request is refused."""
        path, method = _path(scope), scope["method"]
        if method == "OPTIONS":
            return None
        authorization = headers.get(b"authorization", b"")
        if errors.is_messages(path) and b"x-api-key" in headers:  # as Anthropic's clients send it
            authorization = b"Bearer " + headers[b"x-api-key"]
        if self.digests and path not in OPEN and not self._has_key(authorization):
            return 401, {"error": "Unauthorized"}
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            return 413, errors.body(self._too_large(), "Request Entity Too Large", 413)
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if method == "POST" and "/audio/" not in path and kind != b"application/json" and length != b"0":
            return 400, errors.body("Unsupported Media Type: Only 'application/json' is allowed", "Bad Request", 400)
        return None

    def _has_key(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # All keys are compared, so that the time does not reveal which one matches.
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return scheme.lower() == b"bearer" and any(matches)

    def _too_large(self) -> str:
        return f"The body exceeds the limit of {self.max_body} bytes. Send media as URLs, or raise `--max-body-mb`."

    def _counted(self, receive: Receive) -> Receive:
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.max_body:
                raise HTTPException(413, self._too_large())
            return message

        return counted


def _is_valid_id(name: str) -> bool:
    return 0 < len(name) <= 200 and name.isascii() and name.isprintable()


def _path(scope: Scope) -> str:
    """The path of a request, without the prefix that a proxy strips."""
    return str(scope["path"].removeprefix(scope.get("root_path", "")))
