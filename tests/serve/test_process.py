"""A server in its own process: broken connections, slow media sites, a full queue, shutdown."""

import base64
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from api_server import client_over, wait_until
from http_server import listening_server as on_a_port
from mmjax import AsyncLLM
from prompts import base64_wav, image_url_part, random_chord, random_image, user_messages
from web import png, running_site

LONG = {
    "messages": user_messages(image_url_part(random_image(1)), "Tell me more"),
    "max_tokens": 300,
    "ignore_eos": True,
    "temperature": 0,
}

QUEUE = 12


def disconnect(address: str, path: str, body: dict[str, Any], wait: Callable[[socket.socket], object]) -> None:
    """Send a request, call `wait`, and reset the connection."""
    host, port = address.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + content)
        wait(connection)
        # reset the connection instead of closing it
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/completions", "/generate"])
def test_a_disconnect_frees_the_blocks(address: str, served: AsyncLLM, path: str, stream: bool) -> None:
    body: dict[str, Any] = {**LONG, "stream": stream}
    if path == "/v1/completions":
        body = {"prompt": ["the lazy", "a"], "max_tokens": 300, "ignore_eos": True, "stream": stream}
    if path == "/v1/responses":
        body = {"input": "Tell me more", "max_output_tokens": 300, "ignore_eos": True, "stream": stream}
    if path == "/generate":
        body = {"prompts": ["the", "a"], "sampling_params": {"max_tokens": 300, "ignore_eos": True}}
    made = served.llm.counters()["output_tokens"]

    def begun(connection: socket.socket) -> None:
        if stream and path != "/generate":
            assert b"200 OK" in connection.recv(4096)
        wait_until(lambda: served.llm.counters()["output_tokens"] > made + 4, "tokens are generated")

    disconnect(address, path, body, begun)
    wait_until(lambda: served.open == 0 and served.load()[:2] == (0, 0), "the request has ended", 10)
    assert served.load()[2] == 0, "no block is in use"
    assert httpx.get(f"{address}/load").json() == {"server_load": 0}
    assert served.llm.counters()["output_tokens"] < made + 500


def test_a_disconnect_before_the_response(address: str, served: AsyncLLM) -> None:
    for _ in range(5):
        disconnect(address, "/v1/chat/completions", {**LONG, "stream": True}, lambda _: None)
    wait_until(lambda: served.open == 0 and served.load() == (0, 0, 0), "the requests have ended", 20)
    assert httpx.get(f"{address}/health").status_code == 200


def test_a_disconnect_during_a_transcript(listening: AsyncLLM) -> None:
    sound = base64.b64decode(base64_wav(random_chord(1, 60.0)))
    with on_a_port(client_over(listening).app) as where:
        form: dict[str, Any] = {"files": {"file": ("a.wav", sound)}, "data": {"stream": "true", "language": "en"}}
        with httpx.stream("POST", f"{where}/v1/audio/transcriptions", timeout=300, **form) as answer:
            next(answer.iter_lines())
        wait_until(lambda: listening.open == 0 and listening.load() == (0, 0, 0), "the request has ended", 20)


@pytest.fixture(scope="module")
def process(tiny_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(process, address) of `mmjax serve` with its flags in a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("serve")
    flags = folder / "flags.yaml"
    flags.write_text(
        "max-model-len: 384\nmax_num_seqs: 4\nblock-size: 16\nmax-num-batched-tokens: 128\nnum-decode-steps: 1\n"
        "enforce-eager: true\nserved-model-name: [tiny, other]\nlimit-mm-per-prompt: {image: 2}\n"
        f"max-queue: {QUEUE}\nallowed-media-domains: [127.0.0.1]\n"
    )
    words = ["serve", str(tiny_dir("qwen2_vl")), "--config", str(flags), "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "log"
    with log.open("w") as out:
        env = {**os.environ, "MMJAX_IMAGE_FETCH_TIMEOUT": "300"}
        server = subprocess.Popen([sys.executable, "-m", "mmjax", *words], stdout=out, stderr=out, env=env)
    address = f"http://127.0.0.1:{port}"

    def up() -> bool:
        assert server.poll() is None, log.read_text()
        try:
            return httpx.get(f"{address}/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(up, "the server answers", 300)
        yield server, address
    finally:
        server.kill()
        server.wait()


def test_slow_sites_do_not_delay_others_and_a_full_queue_answers_429(process: Any) -> None:
    """Images that arrive byte by byte; more of them than threads that decode media."""
    _, address = process
    ended, answers = threading.Event(), []

    def drip(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        while not ended.wait(0.05):
            request.wfile.write(b"x")
            request.wfile.flush()

    def ask(link: str | None) -> httpx.Response:
        parts = [{"type": "image_url", "image_url": {"url": link}}] if link else []
        return httpx.post(
            f"{address}/v1/chat/completions",
            json={"messages": user_messages(*parts, "?"), "max_tokens": 2},
            timeout=300,
        )

    with running_site() as site:
        site.pages = {"/slow.png": drip, "/quick.png": png(np.asarray(random_image(1)))}
        slow, quick = site.url("/slow.png"), site.url("/quick.png")
        threads = [threading.Thread(target=lambda: answers.append(ask(slow))) for _ in range(QUEUE)]
        try:
            for thread in threads[:-1]:
                thread.start()
            wait_until(lambda: len(site.seen) == QUEUE - 1, "the slow images are being fetched")
            assert [ask(link).status_code for link in (None, quick, None)] == [200, 200, 200]
            threads[-1].start()
            wait_until(lambda: httpx.get(f"{address}/load").json() == {"server_load": QUEUE}, "the queue is full")
            refused = ask(None)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert "--max-queue" in refused.json()["error"]["message"]
            assert httpx.get(f"{address}/health").status_code == 200
            assert answers == []
        finally:
            ended.set()
        for thread in threads:
            thread.join(300)
        assert [answer.status_code for answer in answers] == [400] * QUEUE  # the bytes are not an image
        assert ask(quick).status_code == 200
    assert httpx.get(f"{address}/load").json() == {"server_load": 0}


def test_running_requests_finish_before_a_shutdown(process: Any) -> None:
    server, address = process
    assert [card["id"] for card in httpx.get(f"{address}/v1/models").json()["data"]] == ["tiny", "other"]
    three = {**LONG, "messages": user_messages(*[image_url_part(random_image(seed)) for seed in range(3)], "?")}
    refused = httpx.post(f"{address}/v1/chat/completions", json=three)
    assert refused.status_code == 400 and re.search("At most 2", refused.text)
    texts = []

    def stream() -> None:
        with httpx.stream(
            "POST", f"{address}/v1/chat/completions", json={**LONG, "stream": True}, timeout=300
        ) as answer:
            for line in answer.iter_lines():
                texts.append(line)

    client = threading.Thread(target=stream)
    client.start()
    wait_until(lambda: len(texts) > 4, "the answer has begun", 300)
    server.send_signal(signal.SIGTERM)
    client.join(300)
    assert texts[-2] == "data: [DONE]" or texts[-1] == "data: [DONE]"
    assert any('"finish_reason": "length"' in text for text in texts)
    end = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert server.poll() in (0, -signal.SIGTERM)
