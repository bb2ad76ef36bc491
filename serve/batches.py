"""`mmjax run-batch`: answers a file of requests in OpenAI's batch format, with the routes of the server."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import httpx
from mmjax.serve.app import create_app
from mmjax.serve.context import ServerSettings
from tqdm import tqdm

from mmjax import LLM, AsyncLLM

Json = dict[str, Any]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    group = parser.add_argument_group("batch")
    group.add_argument("-i", "--input-file", type=Path, required=True, metavar="FILE", help="requests, one per line")
    group.add_argument(
        "-o", "--output-file", type=Path, required=True, metavar="FILE",
        help="responses, in the order in which they are finished; failed requests of an existing file are tried again",
    )  # fmt: skip
    group.add_argument("--concurrency", type=int, default=128, help="requests under way at once (default: 128)")


def run(arguments: argparse.Namespace, engine: Mapping[str, Any], chosen: ServerSettings) -> None:
    """Answer every request that the output file has no successful response to. ValueError for an input file that is not
    in the batch format."""
    requests = read_requests(arguments.input_file.read_text())
    answered = read_answered(arguments.output_file)
    left = [line for line in requests if line["custom_id"] not in answered]
    if not left:
        print(f"{arguments.output_file}: all {len(requests)} requests have their answers")
        return
    settings = dataclasses.replace(chosen, keys=(), max_queue=max(arguments.concurrency, 1))
    served = AsyncLLM(LLM(arguments.model, **engine))
    try:
        with (
            arguments.output_file.open("a") as out,
            tqdm(total=len(requests), initial=len(requests) - len(left)) as bar,
        ):
            failed = asyncio.run(answer_all(served, settings, left, out, bar))
    finally:
        served.close()
    print(f"{arguments.output_file}: {len(requests)} requests, {failed} of them failed")


def read_requests(text: str) -> list[Json]:
    """The requests in a batch file. ValueError names a line that is not JSON, lacks a field or repeats a custom_id."""
    found: dict[str, Json] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON: {error}") from error
        known = isinstance(entry, dict) and isinstance(entry.get("custom_id"), str)
        if not known or not isinstance(entry.get("url"), str) or not isinstance(entry.get("body"), dict):
            raise ValueError(f"line {number} needs custom_id and url (texts) and body (an object)")
        if entry["custom_id"] in found:
            raise ValueError(f"line {number}: custom_id {entry['custom_id']!r} is taken by an earlier line")
        found[entry["custom_id"]] = entry
    return list(found.values())


def read_answered(file: Path) -> set[str]:
    """The custom_ids of the successful responses in an output file. All other lines are removed from it: failures and a
    truncated last line."""
    if not file.exists():
        return set()
    answered = {}
    for line in file.read_text().splitlines():
        try:
            entry = json.loads(line)
            if entry["response"]["status_code"] == 200:
                answered[entry["custom_id"]] = line
        except (ValueError, KeyError, TypeError):
            continue
    rewritten = file.with_name(f"{file.name}.{os.getpid()}")
    rewritten.write_text("".join(f"{line}\n" for line in answered.values()))
    rewritten.replace(file)
    return set(answered)


async def answer_all(
    served: AsyncLLM, settings: ServerSettings, requests: Iterable[Json], out: TextIO, bar: Any
) -> int:
    """Write the response to each request as soon as it is finished. Returns how many requests failed."""
    transport = httpx.ASGITransport(create_app(served, settings), raise_app_exceptions=False)
    remaining, failed = iter(requests), 0

    async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:

        async def work() -> None:
            nonlocal failed
            for line in remaining:
                answer = await _answer(client, line)
                failed += answer["error"] is not None
                out.write(json.dumps(answer) + "\n")
                out.flush()
                bar.update(1)

        async with asyncio.TaskGroup() as group:
            for _ in range(settings.max_queue):
                group.create_task(work())
    return failed


async def _answer(client: httpx.AsyncClient, line: Json) -> Json:
    head = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line["custom_id"]}
    mistake = None
    if line.get("method", "POST") != "POST":
        mistake = f"method {line['method']!r}: only POST can be batched"
    elif not line["url"].startswith("/v1/"):
        mistake = f"url {line['url']!r}: write the path only, such as /v1/chat/completions"
    elif line["body"].get("stream"):
        mistake = "stream: the answers of a batch are whole"
    if mistake is not None:
        return {**head, "response": None, "error": {"code": "bad_request", "message": mistake}}
    answer = await client.post(line["url"], json=line["body"])
    try:
        body = answer.json()
    except ValueError:
        body = None
    error = None
    if answer.status_code != 200:
        details = body.get("error", body.get("detail")) if isinstance(body, dict) else None
        message = details.get("message") if isinstance(details, dict) else str(details)
        error = {"code": str(answer.status_code), "message": message}
    response = {"status_code": answer.status_code, "request_id": head["id"], "body": body}
    return {**head, "response": response, "error": error}
