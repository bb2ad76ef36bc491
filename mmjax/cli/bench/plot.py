"""A picture of throughput and latency against concurrency. Needs the extra `mmjax[bench]`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from mmjax.cli.bench import METRICS
from mmjax.cli.bench.serve_metrics import ServeResult


def check_installed() -> None:
    """ValueError if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'mmjax[bench]'")


def plot_sweep(results: Sequence[ServeResult], title: str, file: Path) -> None:
    """Write a PNG: output tokens/s, then TTFT and TPOT (median, and the largest percentile), by concurrency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 3)
    levels = [result.load.max_concurrency for result in results]
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_xticks(levels, [str(level) for level in levels])
        panel.set_xlabel("concurrent requests")
        panel.grid(alpha=0.3)
    panels[0].plot(levels, [result.as_json()["output_throughput"] for result in results], "o-")
    panels[0].set_ylabel("output tokens/s")
    for panel, metric in zip(panels[1:], ("ttft", "tpot"), strict=True):
        statistics = [result.statistics(metric) for result in results]
        for name in ("median", f"p{max(results[0].selection.percentiles):g}"):
            panel.plot(levels, [found.get(name, float("nan")) for found in statistics], "o-", label=name)
        panel.set_ylabel(f"{METRICS[metric][0]} (ms)")
        panel.legend()
    for panel in panels:
        panel.set_ylim(0, 1.05 * panel.dataLim.ymax)
    figure.savefig(file, format="png", dpi=120)
