"""One engine over several processes of this machine, beside one process with the same devices.

    python3 benchmarks/hosts.py [--model qwen2.5-vl-3b] [--processes 2] [--devices 1] [--seconds 280]

A published size has random weights, which are the same however they are spread; --model may also be a directory, or
`demo`. Prints whether the token ids are equal, and the times. On
GPUs each process sees its own (CUDA_VISIBLE_DEVICES); with JAX_PLATFORMS=cpu it has its own virtual ones.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def measure(model: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, and generate three times: what each took, and the token ids."""
    import logging

    import numpy as np

    logging.basicConfig(level=logging.INFO)
    sys.path.insert(0, str(ROOT))
    from mmjax import LLM, SamplingParams
    from mmjax.cli.bench.published_sizes import MODELS, write_model

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if model in MODELS:
            write_model(model, Path(folder))
            model, keywords = folder, keywords | {"load_format": "dummy", "max_model_len": 2048}
        llm = LLM(model, max_num_seqs=16, **keywords)
    found: dict[str, Any] = {"start_s": time.perf_counter() - begin}
    rng = np.random.default_rng(0)
    text = [{"prompt_token_ids": rng.integers(0, 256, 128).tolist()} for _ in range(16)]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for name, prompts in (("first", text), ("batch of 16", text), ("batch of 1", text[:1])):
        llm.reset_prefix_cache()
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found[f"{name}, s"] = time.perf_counter() - begin
        found[f"{name}, ids"] = [list(output.outputs[0].token_ids) for output in outputs]
    return found


def start(rank: int, size: int, arguments: argparse.Namespace, port: int, out: Path) -> subprocess.Popen[bytes]:
    """A process that measures, or follows the one that does. size: of how many."""
    each = arguments.devices * arguments.processes // size
    keywords = {"tensor_parallel_size": arguments.devices * arguments.processes}
    if size > 1:
        keywords |= {"nnodes": size, "node_rank": rank, "master_port": port}
    environment = dict(os.environ)
    if environment.get("JAX_PLATFORMS") == "cpu":
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={each}"
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(rank * each + i) for i in range(each))
    words = [sys.executable, __file__, "--model", arguments.model, "--run", json.dumps(keywords), "--out", str(out)]
    return subprocess.Popen(words, env=environment)


def run(size: int, arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """What `measure` finds in `size` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [start(rank, size, arguments, port, out) for rank in range(size)]
    try:
        codes = [process.wait(arguments.seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * size, codes
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="qwen2.5-vl-3b")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="of each process")
    parser.add_argument("--seconds", type=float, default=280, help="that a run may take")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        arguments.out.write_text(json.dumps(measure(arguments.model, arguments.run)))
        return
    with tempfile.TemporaryDirectory() as folder:
        several = run(arguments.processes, arguments, Path(folder) / "several")
        one = run(1, arguments, Path(folder) / "one")
    for name, value in one.items():
        if name.endswith("ids"):
            equal = sum(
                a == b
                for ours, theirs in zip(several[name], value, strict=True)
                for a, b in zip(ours, theirs, strict=True)
            )
            print(f"{name}: {equal} of {sum(map(len, value))} are equal")
        else:
            print(f"{name}: {arguments.processes} processes {several[name]:.3f}, one process {value:.3f}")


if __name__ == "__main__":
    main()
