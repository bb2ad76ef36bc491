"""The engine on an accelerator: a Qwen2-VL of published 2B sizes with random weights, made on the device.

    python3 benchmarks/gpu_engine.py [--quick]

Run it twice to see a cold and a warm start. Needs no checkpoint: it is `mmjax bench --model-config qwen2-vl-2b`.

Two measures of how well the device is fed. "of wall time" is the engine's own: the thread that calls programs was in a
call for `call_s`. "device idle" is of the device: the share of the wall time during which it had been handed nothing
that was not done, as a second thread sees results become ready.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mmjax.cli.bench.engine import Bench, Workload  # noqa: E402
from mmjax.cli.bench.published_sizes import write_model  # noqa: E402

WORK = {
    "batch 1, text 128 in, 128 out": Workload(prompts=1, text=128, output=128),
    "batch 32, text 128 in, 128 out": Workload(prompts=32, text=128, output=128),
    "batch 128, text 128 in, 128 out": Workload(prompts=128, text=128, output=128),
    "128 images of 640x480, 32 out": Workload(prompts=128, text=32, images=((640, 480),), output=32),
}


class Watch:
    """When the device had work: from the call of a program until a thread beside sees its results ready.

    What an encoder's program gives is donated to the next one and cannot be waited for; it counts until its call
    returns, and what it runs after that only through the prefill that follows.
    """

    def __init__(self, llm: Any) -> None:
        self.spans: list[tuple[float, float]] = []
        self.whole = (0.0, 0.0)  # when the last `generate` began and ended
        self.waiter = ThreadPoolExecutor(max_workers=1)
        runner, self.generate, llm.generate = llm.model.engines[0].runner, llm.generate, self.timed
        runner.encode = self.watched(runner.encode, ready=False)
        runner.prefill = self.watched(runner.prefill, ready=True)
        runner.decode = self.watched(runner.decode, ready=True)

    def timed(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        out = self.generate(*args, **kwargs)
        self.whole = (begin, time.perf_counter())
        return out

    def watched(self, program: Callable[..., Any], *, ready: bool) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            out = program(*args)
            if ready:
                self.waiter.submit(self.wait, begin, out)
            else:
                self.spans.append((begin, time.perf_counter()))
            return out

        return call

    def wait(self, begin: float, out: Any) -> None:
        jax.block_until_ready(out)
        self.spans.append((begin, time.perf_counter()))

    def gaps(self) -> list[tuple[float, float]]:
        """(when, how long) the device had nothing to do in the last run, in seconds from its begin."""
        begin, end = self.whole
        self.waiter.submit(int).result()  # all before it is done
        found, free = [], begin
        for start, stop in [*sorted(span for span in self.spans if span[0] >= begin), (end, end)]:
            if start > free:
                found.append((free - begin, start - free))
            free = max(free, stop)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first two cases only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model("qwen2-vl-2b", Path(folder))
        engine = {
            "load_format": "dummy", "max_model_len": 4096, "max_num_seqs": 128,
            "max_num_batched_tokens": 8192, "enable_prefix_caching": False,
        }  # fmt: skip
        bench = Bench(folder, engine)
        print("parts", json.dumps({k: round(v, 2) for k, v in bench.llm.counters().items()}), flush=True)
        watch = Watch(bench.llm)
        for name, work in list(WORK.items())[: 2 if args.quick else None]:
            bench.warm_up(work)
            before = bench.llm.counters()
            report = bench.run(work, seed=1)
            gaps = watch.gaps()
            now = bench.llm.counters()
            shares = {
                part: (now[part] - before[part]) / report.wall_s for part in ("call_s", "wait_s", "host_s", "idle_s")
            }
            print(f"== {name}\n{report.as_table()}", flush=True)
            print("of wall time", {part: f"{share:.1%}" for part, share in shares.items()}, flush=True)
            longest = sorted(gaps, key=lambda gap: -gap[1])[:8]
            told = ", ".join(f"{length * 1e3:.1f} ms at {at * 1e3:.0f}" for at, length in sorted(longest))
            print(f"device idle {sum(length for _, length in gaps) / report.wall_s:.1%}: {told}", flush=True)
            print(json.dumps({"case": name, **dataclasses.asdict(report)}), flush=True)


if __name__ == "__main__":
    main()
