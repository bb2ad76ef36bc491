"""One engine over several processes: the recorded outputs, and what happens when a process dies."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from api_server import wait_until
from distributed.processes import ONE_HOST, free_port, processes, told

pytestmark = pytest.mark.hosts
RECORDED = json.loads((Path(__file__).parents[1] / "models" / "recorded.json").read_text())
TinyDir = Callable[[str], Path]


@pytest.mark.parametrize(
    ("family", "cases", "size", "devices", "by"),
    [
        ("qwen2_vl", ("text", "image"), 2, 2, "flags"),  # four devices, so that keys and values are repeated
        ("qwen3_moe", ("question",), 4, 1, "slurm"),
    ],
)
def test_outputs_are_the_recorded_ones(
    tiny_dir: TinyDir, tmp_path: Path, family: str, cases: tuple[str, ...], size: int, devices: int, by: str
) -> None:
    port = free_port()
    rest = [str(tiny_dir(family)), family, ",".join(cases), json.dumps({"tensor_parallel_size": size * devices})]
    commands = [[str(ONE_HOST), str(i), str(size), str(port if by == "flags" else 0), *rest] for i in range(size)]
    with processes(commands, tmp_path, devices, slurm_port=port if by == "slurm" else 0) as started:
        assert [process.wait(300) for process in started] == [0] * size, told(tmp_path, 0)
    runs = json.loads((tmp_path / "0.out").read_text().splitlines()[-1])  # after what gloo says
    assert runs == [[RECORDED[family][case]["ids"] for case in cases]] * 4
    assert all(f"host {rank} of {size} follows" in told(tmp_path, rank) for rank in range(1, size))


@pytest.fixture
def served(tiny_dir: TinyDir, tmp_path: Path) -> Iterator[tuple[list[subprocess.Popen[str]], str, Path]]:
    """(processes, address, folder of logs) of `mmjax serve` on two hosts."""
    port, master = free_port(), free_port()
    words = ["-m", "mmjax", "serve", str(tiny_dir("qwen2_vl")), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--max-model-len=384", "--block-size=16", "--max-num-seqs=4", "--max-num-batched-tokens=128"]
    words += ["--num-decode-steps=4", "--enforce-eager", "-tp=2", "--nnodes=2", f"--master-port={master}"]
    with processes([[*words, "--node-rank", "0"], [*words, "--node-rank", "1", "--headless"]], tmp_path) as started:
        address = f"http://127.0.0.1:{port}"

        def up() -> bool:
            assert [process.poll() for process in started] == [None, None], told(tmp_path, 0) + told(tmp_path, 1)
            try:
                return httpx.get(f"{address}/health").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(up, "the server answers", 120)
        yield started, address, tmp_path


LONG = {"prompt": "the lazy", "max_tokens": 350, "ignore_eos": True, "temperature": 0}


def in_the_middle(address: str, answers: list[httpx.Response]) -> threading.Thread:
    """Ask for a long answer on a thread, and return when some of it has been computed."""

    def ask() -> None:
        while not answers:  # again and again, so that one is running at any moment
            answer = httpx.post(f"{address}/v1/completions", json=LONG, timeout=120)
            if answer.status_code != 200:
                answers.append(answer)

    thread = threading.Thread(target=ask)
    thread.start()
    metric = "vllm:generation_tokens_total"

    def begun() -> bool:
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        return any(line.startswith(metric) and float(line.split()[-1]) > 0 for line in lines)

    wait_until(begun, "tokens have been generated", 120)
    return thread


def test_a_follower_that_dies_gives_503(served: tuple[list[subprocess.Popen[str]], str, Path]) -> None:
    (leader, follower), address, folder = served
    answers: list[httpx.Response] = []
    thread = in_the_middle(address, answers)
    begin = time.monotonic()
    follower.kill()
    thread.join(30)
    assert not thread.is_alive() and time.monotonic() - begin < 20
    assert answers[0].status_code == 503 and "host 1 was lost" in answers[0].text
    assert httpx.get(f"{address}/health").status_code == 503
    assert httpx.post(f"{address}/v1/completions", json=LONG, timeout=20).status_code == 503
    assert "host 1 was lost" in told(folder, 0)
    leader.terminate()
    assert leader.wait(30) is not None


def test_a_leader_that_dies_ends_its_followers(served: tuple[list[subprocess.Popen[str]], str, Path]) -> None:
    (leader, follower), address, folder = served
    follower.terminate()  # all hosts of a job may get it: this one stays until the leader has drained
    assert httpx.post(f"{address}/v1/completions", json=LONG | {"max_tokens": 4}, timeout=60).status_code == 200
    leader.kill()
    assert follower.wait(20) != 0
    assert "host 0, which leads, was lost" in told(folder, 1)
