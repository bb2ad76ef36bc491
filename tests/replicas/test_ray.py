"""Replicas on a real Ray of this machine: a batch job that is killed and goes on, and a server that scales."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image, ImageDraw

import ray_job
from mmjax.demo import DIRECTORY
from mmjax.ray import build_openai_app

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray's own
WAIT_S = 300
RAY_SERVICE = Path(__file__).parents[2] / "deploy" / "k8s" / "ray.yaml"


def wait_for(what: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    """The first true value of `what`."""
    start = time.monotonic()
    while not (value := what()):
        assert time.monotonic() < start + WAIT_S and (process is None or process.poll() is None)
        time.sleep(0.05)
    return value


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Pictures, recordings, texts, a file that is no picture, and one that ends the engine which reads it first."""
    folder = tmp_path / "media"
    folder.mkdir()
    for count in range(1, 5):
        picture = Image.new("RGB", (96, 96), "white")
        for i in range(count):
            x, y = 8 + 48 * (i % 2), 8 + 48 * (i // 2)
            ImageDraw.Draw(picture).ellipse((x, y, x + 30, y + 30), fill=("red", "blue", "green", "orange")[i])
        picture.save(folder / f"picture{count}.png")
    for word in ("seven.boris", "three.boris", "cat.m8", "dog.belinda"):
        (folder / f"{word}.ogg").write_bytes((DIRECTORY.parent / "speech" / f"{word}.ogg").read_bytes())
    for i, text in enumerate(("Who are you?", "Hello", "What can you do?", "Thank you")):
        (folder / f"text{i}.txt").write_text(text)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "zz.fatal").touch()
    return folder


def test_batch_job_goes_on(cluster: Any, media: Path, tmp_path: Path) -> None:
    """A job over images, audio and text is killed, and started again: it leaves out what is written. An actor that dies
    is replaced, and its batch tried again; a row that fails has its error."""
    import pyarrow.parquet

    out = tmp_path / "out"
    address = cluster.get_runtime_context().gcs_address
    job = subprocess.Popen([sys.executable, ray_job.__file__, str(media), str(out), address])
    wait_for(lambda: list(out.glob("checkpoint/*[!g].parquet")) and list(out.glob("rows/*.parquet")), job)
    job.send_signal(signal.SIGKILL)
    job.wait()

    ray_job.run(str(media), str(out), "resumed")
    written = pyarrow.parquet.read_table(out / "rows").to_pylist()
    rows = {Path(row["path"]).name: row for row in written}
    assert len(written) == len(rows) and set(rows) == {file.name for file in media.iterdir()}
    assert {row["run"] for row in rows.values()} == {"killed", "resumed"}
    assert media.with_suffix(".mark").exists() and rows["zz.fatal"]["generated_text"]
    failed = {name for name, row in rows.items() if row["__inference_error__"]}
    assert failed == {"broken.png"} and rows["broken.png"]["num_generated_tokens"] == 0
    answers = {name: row["generated_text"] for name, row in rows.items()}
    for count, word in enumerate(("one", "two", "three", "four"), 1):
        assert word in answers[f"picture{count}.png"].lower()
    assert "seven" in answers["seven.boris.ogg"].lower() and "mmjax" in answers["text0.txt"]


def test_jobs_that_cannot_be_resumed_are_refused(cluster: Any, tmp_path: Path) -> None:
    processor = ray_job.build_processor(ray_job.EngineProcessorConfig("demo"))
    with pytest.raises(ValueError, match=r"a dataset that is read .*, not one from FromItems"):
        processor.write(cluster.data.from_items([{"id": 1}]), str(tmp_path), id_column="id")


class Load:
    """Clients that ask one after another, streamed and not, each until its number is above `clients`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.clients = 0
        self.answers: list[tuple[int, str]] = []

    async def ask(self, number: int) -> None:
        body = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 24, "temperature": 0}
        async with httpx.AsyncClient(base_url=self.address, timeout=WAIT_S) as client:
            while number < self.clients:
                answer = await client.post("/v1/chat/completions", json={**body, "stream": bool(number % 2)})
                text = answer.text
                if answer.status_code == 200 and number % 2:
                    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
                    assert lines.pop() == "[DONE]"
                    chunks = [httpx.Response(200, text=line).json() for line in lines]
                    text = "".join(each["choices"][0]["delta"].get("content") or "" for each in chunks)
                elif answer.status_code == 200:
                    text = answer.json()["choices"][0]["message"]["content"]
                self.answers.append((answer.status_code, text))

    async def with_clients(self, count: int, until: Callable[[], bool]) -> None:
        """Keep this many clients asking until something holds, and for a while after."""
        self.clients = count
        tasks = [asyncio.create_task(self.ask(number)) for number in range(count)]
        start = time.monotonic()
        while not until() and not any(task.done() for task in tasks):
            assert time.monotonic() < start + WAIT_S
            await asyncio.sleep(0.1)
        before = len(self.answers)
        while len(self.answers) < before + 2 * count and not any(task.done() for task in tasks):
            await asyncio.sleep(0.1)
        self.clients = 0
        await asyncio.gather(*tasks)


def test_server_scales(cluster: Any) -> None:
    """The Serve config of deploy/k8s/ray.yaml, with a small model and shorter delays: from one replica to two under
    load, and back under less, every request is answered, and alike."""
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"port": port})
    config = yaml.safe_load(yaml.safe_load(RAY_SERVICE.read_text())["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    [application] = config["applications"]
    arguments = {**application["args"], **ray_job.ENGINE, "model": "demo"}
    arguments["deployment_config"]["ray_actor_options"] = {"num_cpus": 0}
    quick = {"upscale_delay_s": 1, "downscale_delay_s": 2, "metrics_interval_s": 0.5, "look_back_period_s": 1}
    quick |= {"max_replicas": 2, "target_ongoing_requests": 3}
    arguments["deployment_config"]["autoscaling_config"] |= quick
    serve.run(build_openai_app(arguments), name=application["name"], route_prefix=application["route_prefix"])
    load = Load(f"http://127.0.0.1:{port}")

    def running() -> int:
        states = serve.status().applications["mmjax"].deployments["mmjax"].replica_states
        return states.get("RUNNING", 0) if set(states) <= {"RUNNING"} else 0

    for path in ("/health", "/v1/models", "/metrics"):
        assert httpx.get(load.address + path).status_code == 200
    assert running() == 1
    asyncio.run(load.with_clients(12, lambda: running() == 2))
    asyncio.run(load.with_clients(2, lambda: running() == 1))
    assert {status for status, _ in load.answers} == {200}
    (text,) = {text for _, text in load.answers}
    assert "mmjax" in text
    serve.shutdown()
