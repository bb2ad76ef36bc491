"""Where the time of a run goes, by phase and by kernel, from a trace of jax.profiler.

A phase is a program of the engine: `encode`, `prefill`, `decode` and the small ones. Events of a device are kernels
(GPU) or the operations of a program (CPU). Kernels that run inside a CUDA graph are in the trace only if the driver
reports them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOP = 25
OTHER = "other"
# They last as long as what runs inside them, which has events of its own.
CONTROL_FLOW = re.compile(r"(while|cond|conditional|call)([._]\d+|\.clone)*")
NUMBERS = re.compile(r"([._]\d+|\.clone)+$")


@dataclasses.dataclass
class Spent:
    """Device time in ns, and the number of events."""

    ns: float = 0.0
    count: int = 0

    def add(self, ns: float) -> None:
        self.ns += ns
        self.count += 1


@contextlib.contextmanager
def trace(directory: Path) -> Iterator[None]:
    """Trace what runs inside, without Python's own calls, which would slow it down."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(directory), profiler_options=options):
        yield


def read_trace(directory: Path) -> Any:
    """The newest trace in a directory."""
    from jax.profiler import ProfileData

    files = sorted(directory.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ValueError(f"{directory} holds no trace")
    return ProfileData.from_file(str(files[-1]))


def device_events(data: Any) -> Iterator[tuple[str, str, float]]:
    """(phase, kernel, ns) of every event of a device."""
    planes = list(data.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue  # lines that sum up others
            for event in line.events:
                stats = {name: value for name, value in event.stats if name in ("hlo_module", "hlo_op")}
                if (devices or "hlo_op" in stats) and not CONTROL_FLOW.fullmatch(event.name):
                    yield phase_of(str(stats.get("hlo_module", ""))), kernel_of(event.name), event.duration_ns


def phase_of(module: str) -> str:
    """The program of a compiled module: jit_prefill is prefill."""
    return NUMBERS.sub("", module).removeprefix("jit_") or OTHER


def kernel_of(event: str) -> str:
    """The name of a kernel without the numbers that tell its copies apart."""
    return NUMBERS.sub("", event) or event


def tables(data: Any) -> str:
    """Two tables of device time: by phase, and the TOP kernels."""
    phases: dict[str, Spent] = collections.defaultdict(Spent)
    kernels: dict[tuple[str, str], Spent] = collections.defaultdict(Spent)
    for phase, kernel, ns in device_events(data):
        phases[phase].add(ns)
        kernels[phase, kernel].add(ns)
    total = sum(spent.ns for spent in phases.values())
    if not total:
        return "the trace has no events of a device"
    rows = [f"{'phase':<20}{'ms':>12}{'share':>8}{'kernels':>10}"]
    for phase, spent in sorted(phases.items(), key=lambda item: -item[1].ns):
        rows.append(f"{phase:<20}{spent.ns / 1e6:>12.2f}{spent.ns / total:>8.1%}{spent.count:>10}")
    rows += ["", f"{'kernel':<60}{'phase':<20}{'ms':>12}{'share':>8}{'count':>10}{'us each':>10}"]
    for (phase, kernel), spent in sorted(kernels.items(), key=lambda item: -item[1].ns)[:TOP]:
        figures = (
            f"{spent.ns / 1e6:>12.2f}{spent.ns / total:>8.1%}{spent.count:>10}{spent.ns / spent.count / 1e3:>10.2f}"
        )
        rows.append(f"{kernel[:58]:<60}{phase:<20}{figures}")
    return "\n".join(rows)
