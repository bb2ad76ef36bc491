"""Many clients at once against a real server: text, pictures, sounds, clients that leave, requests that cannot be
served.

`python benchmarks/serve_load.py MODEL [--clients 64] [--seconds 30] [flags of mmjax serve]` starts the server, keeps
it busy, and says what it saw. It fails when a request ended in a 5xx, when an answer kept a page or a place in the
queue after its client had gone, or when the server's memory grew by more than --growth between the middle and the end.
"""

import argparse
import asyncio
import base64
import collections
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import wave
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

SETTLE_S = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--warmup", type=float, default=10.0, help="seconds before anything is measured")
    parser.add_argument("--growth", type=float, default=48.0, help="MiB that memory may grow in the second half")
    parser.add_argument("--sounds", action="store_true", help="also send audio, to a model that takes it")
    parser.add_argument("--seed", type=int, default=0)
    known, rest = parser.parse_known_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "mmjax", "serve", known.model, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--served-model-name", "m", "--uvicorn-log-level", "error", *rest]
    server = subprocess.Popen(words)
    try:
        faults = asyncio.run(Load(f"http://127.0.0.1:{port}", server, known).run())
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            faults = ["the server did not stop within 60 s"]
    for fault in faults:
        print(f"FAULT: {fault}")
    sys.exit(bool(faults))


class Load:
    """The clients, and what they have seen."""

    def __init__(self, address: str, server: "subprocess.Popen[bytes]", known: argparse.Namespace) -> None:
        self.address, self.server, self.known = address, server, known
        self.seen: collections.Counter[str] = collections.Counter()
        self.latencies: list[float] = []
        self.faults: list[str] = []
        self.end = 0.0
        rng = np.random.default_rng(known.seed)
        self.pictures = [_picture(rng, side) for side in (28, 56, 84, 112)]

    async def run(self) -> list[str]:
        """Load the server, then look at what is left."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.address, timeout=120, limits=limits) as client:
            await self._up(client)
            await self._keep_busy(client, self.known.warmup)
            self.seen.clear()
            self.latencies.clear()
            before = await self._figures(client)
            memory = [self._memory()]
            for _ in range(2):
                await self._keep_busy(client, self.known.seconds / 2)
                memory.append(self._memory())
            after = await self._figures(client)
            await self._settle(client)
        grown = memory[2] - memory[1]
        if grown > self.known.growth:
            self.faults.append(f"memory grew by {grown:.0f} MiB in the second half")
        self._report(before, after, memory)
        return self.faults

    async def _up(self, client: httpx.AsyncClient) -> None:
        while self.server.poll() is None:
            try:
                if (await client.get("/health")).status_code == 200:
                    return
            except httpx.TransportError:
                await asyncio.sleep(0.2)
        raise SystemExit("the server did not start")

    async def _keep_busy(self, client: httpx.AsyncClient, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        await asyncio.gather(
            *(self._client(client, random.Random(f"{self.known.seed} {i}")) for i in range(self.known.clients))
        )

    async def _client(self, client: httpx.AsyncClient, dice: random.Random) -> None:
        while time.monotonic() < self.end:
            kind = dice.choices(KINDS, (4, 4, 4, 2, 2, 3 * self.known.sounds))[0]
            begin = time.monotonic()
            try:
                status = await getattr(self, f"_{kind}")(client, dice)
            except httpx.HTTPError as error:
                status = 599
                self.faults.append(f"{kind}: {type(error).__name__} {error}")
            self.seen[f"{kind} {status}"] += 1
            if kind in ("text", "picture", "stream", "sound"):
                self.latencies.append(time.monotonic() - begin)
            if status >= 500:
                self.faults.append(f"{kind}: status {status}")

    def _body(self, dice: random.Random, pictures: int, **more: Any) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": dice.choice(self.pictures)}} for _ in range(pictures)
        ]
        text = " ".join(dice.choices(("the", "lazy", "dog", "tin", "on", "is", "a", "she"), k=dice.randint(1, 20)))
        parts.append({"type": "text", "text": text})
        tokens = dice.randint(1, 24)
        return {"messages": [{"role": "user", "content": parts}], "max_tokens": tokens, "ignore_eos": True, **more}

    async def _text(self, client: httpx.AsyncClient, dice: random.Random) -> int:
        return (await client.post("/v1/chat/completions", json=self._body(dice, 0))).status_code

    async def _picture(self, client: httpx.AsyncClient, dice: random.Random) -> int:
        return (await client.post("/v1/chat/completions", json=self._body(dice, dice.randint(1, 2)))).status_code

    async def _sound(self, client: httpx.AsyncClient, dice: random.Random) -> int:
        body = self._body(dice, 0)
        heard = {"type": "input_audio", "input_audio": {"data": _noise(dice), "format": "wav"}}
        body["messages"][0]["content"].insert(0, heard)
        return (await client.post("/v1/chat/completions", json=body)).status_code

    async def _stream(self, client: httpx.AsyncClient, dice: random.Random) -> int:
        body = self._body(dice, dice.randint(0, 1), stream=True, n=dice.randint(1, 2), temperature=0.8)
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        if lines[-1] != "data: [DONE]" or any('"error"' in line for line in lines):
            self.faults.append(f"a stream ended with {lines[-2:]}")
        return answer.status_code

    async def _leave(self, client: httpx.AsyncClient, dice: random.Random) -> int:
        """Go away in the middle: of a stream, or of waiting for an answer."""
        body = self._body(dice, dice.randint(0, 1), stream=dice.random() < 0.5) | {"max_tokens": 200}
        try:
            async with asyncio.timeout(dice.uniform(0.01, 1.0)):
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    async for _ in answer.aiter_lines():
                        pass
                return answer.status_code
        except TimeoutError:
            return 0

    async def _bad(self, client: httpx.AsyncClient, dice: random.Random) -> int:
        broken = "data:image/png;base64," + base64.b64encode(dice.randbytes(64)).decode()
        body = self._body(dice, 0) | dice.choice(
            (
                {"model": "other"},
                {"temperature": -1},
                {"max_tokens": 10**6},
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": broken}}]}]},
                {"messages": [{"role": "user", "content": [{"type": "smell"}]}]},
                {"messages": "text"},
                {"bad_words": ["\\ud800"], "stop_token_ids": list(range(999))},
            )
        )
        answer = await client.post("/v1/chat/completions", json=body)
        if answer.status_code == 200:
            self.faults.append(f"a request that cannot be served was: {json.dumps(body)[:200]}")
        return answer.status_code

    async def _settle(self, client: httpx.AsyncClient) -> None:
        """Once every client has gone, nothing may be left of their requests."""
        end = time.monotonic() + SETTLE_S
        while time.monotonic() < end:
            figures = await self._figures(client)
            figures["server_load"] = (await client.get("/load")).json()["server_load"]
            held = {name: figures[name] for name in HELD if figures[name]}
            if not held:
                return
            await asyncio.sleep(0.2)
        self.faults.append(f"still held {SETTLE_S:g} s after the last client had gone: {held}")

    async def _figures(self, client: httpx.AsyncClient) -> dict[str, float]:
        lines = (await client.get("/metrics")).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#") and "_bucket" not in line)
        return {name.partition("{")[0]: float(value) for name, value in pairs}

    def _memory(self) -> float:
        """MiB that the server holds."""
        pages = int(Path(f"/proc/{self.server.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _report(self, before: dict[str, float], after: dict[str, float], memory: list[float]) -> None:
        def gained(name: str) -> float:
            return after.get(name, 0) - before.get(name, 0)

        done, seconds = sum(self.seen.values()), self.known.seconds
        print(f"{done} requests of {self.known.clients} clients in {seconds:g} s: {done / seconds:.1f} per second")
        print("  " + ", ".join(f"{name}: {count}" for name, count in sorted(self.seen.items())))
        if self.latencies:
            half, most = np.percentile(self.latencies, [50, 99])
            print(f"  answered in {half:.2f} s (median), {most:.2f} s (99 of 100)")
        tokens = (gained("vllm:prompt_tokens_total"), gained("vllm:generation_tokens_total"))
        print(f"  tokens per second: {tokens[0] / seconds:.0f} in, {tokens[1] / seconds:.0f} out")
        compiled = gained("mmjax:compiles_after_warmup_total")
        print(
            f"  MiB: {memory[0]:.0f} at first, {memory[1]:.0f}, {memory[2]:.0f} at the end; {compiled:g} compiled late"
        )


KINDS = ("text", "picture", "stream", "leave", "bad", "sound")
HELD = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "server_load")


def _noise(dice: random.Random) -> str:
    buffer, count = io.BytesIO(), dice.randint(4000, 32000)
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 16000, count, "NONE", ""))
        file.writeframes(dice.randbytes(2 * count))
    return base64.b64encode(buffer.getvalue()).decode()


def _picture(rng: np.random.Generator, side: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main()
