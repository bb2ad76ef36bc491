"""A web server for tests, on the loopback address: media, redirects, errors and wrong bodies; and clients for it."""

import base64
import contextlib
import functools
import gzip
import http.server
import io
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmjax.multimodal.media import MediaConnector
from mmjax.multimodal.network import FetchPolicy
from mmjax.types import RequestError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
OPEN = FetchPolicy(block_private=False, attempts=1)


class Site:
    """`site.pages[path]` is what is served there: bytes, a status, or a function of the request handler."""

    def __init__(self, port: int):
        self.port = port
        self.pages: dict[str, bytes | int | Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []  # path and headers of each request

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


def redirect(place: str, status: int = 302) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Location", place)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def body(data: bytes, **headers: str) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    """Bytes with headers; with a `Content-Length` of None, the length is not sent."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        with contextlib.suppress(OSError):  # the client may have seen enough
            request.wfile.write(data)

    return answer


def gzipped(data: bytes) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    """`data`, packed when it is asked for: modules are imported by every process, and some have 200 MB to pack."""
    packed = functools.cache(lambda: gzip.compress(data, compresslevel=1))
    return lambda request: body(packed(), Content_Encoding="gzip")(request)


def trickle(pause_s: float, count: int) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    """One byte at a time."""

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(count):
                request.wfile.write(b"x")
                request.wfile.flush()
                time.sleep(pause_s)

    return answer


@contextlib.contextmanager
def running_site() -> Iterator[Site]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            site.seen.append((self.path, dict(self.headers)))
            page = site.pages.get(path, 404)
            if isinstance(page, int):
                self.send_response(page)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif isinstance(page, bytes):
                body(page, Content_Length=str(len(page)))(self)
            else:
                page(self)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        site = Site(server.server_address[1])
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield site
        server.shutdown()


def png(array: np.ndarray = PIXELS) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def wav() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.linspace(-0.5, 0.5, 800), 8000, format="WAV")
    return buffer.getvalue()


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def connector(policy: FetchPolicy = OPEN, **options: Any) -> MediaConnector:
    return MediaConnector(connection=policy, **options)


def fetch_pixels(url: str, policy: FetchPolicy = OPEN) -> np.ndarray:
    return np.asarray(connector(policy).fetch_image(url))


def fetch_error(url: Any, policy: FetchPolicy = OPEN, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        connector(policy, **options).fetch_image(url)
    return caught.value
