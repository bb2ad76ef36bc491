"""Slices of accelerators by name, and their devices, without having them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

GIB = 1 << 30
DISTRIBUTIONS = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}
EXTRAS = {"tpu": "mmjax[tpu]", "gpu": "mmjax[gpu]"}

# XLA's description of an H100 SXM for compiling without one; fields of its `GpuTargetConfigProto`.
H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x:
 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
 clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448 cuda_compute_capability {
 major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 13 minor: 0 patch: 0 }"""

H200 = H100.replace("H100 80GB HBM3", "H200").replace("84978434048", "150754820096")
GPUS = {"h100": H100, "h200": H200}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator, as published by its maker, per device of jax. memory_bytes: what XLA may use of a
    device, which it says when a program does not fit. bandwidth: bytes a second. flops: of bfloat16, dense, a second.
    devices: of jax, per chip. chips_per_host: the most on one host."""

    name: str
    platform: str
    memory_bytes: int
    bandwidth: float
    flops: float
    devices: int = 1
    chips_per_host: int = 8


V5E = Chip("v5e", "tpu", int(15.75 * GIB), 819e9, 197e12)
V6E = Chip("v6e", "tpu", int(31.25 * GIB), 1640e9, 918e12)
V5P = Chip("v5p", "tpu", int(95.74 * GIB), 2765e9, 459e12, chips_per_host=4)
TPU7X = Chip("tpu7x", "tpu", int(94.75 * GIB), 3690e9, 1153.5e12, devices=2, chips_per_host=4)
H100_CHIP = Chip("h100", "gpu", 84978434048, 3352e9, 989e12)
H200_CHIP = Chip("h200", "gpu", 150754820096, 4800e9, 989e12)
CPU = Chip("cpu", "cpu", 0, 0.0, 0.0)

FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
CUBES = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
ONE_HOST = {n: f"1x1x{n}" for n in (1, 2, 4, 8)}
SHAPES: Mapping[str, tuple[Chip, Mapping[int, str]]] = MappingProxyType(
    {
        "v5e": (V5E, FLAT),
        "v6e": (V6E, FLAT),
        "v5p": (V5P, CUBES),
        "tpu7x": (TPU7X, CUBES),
        "h100": (H100_CHIP, ONE_HOST),
        "h200": (H200_CHIP, ONE_HOST),
        "cpu": (CPU, {n: "" for n in (1, 2, 4, 8)}),
    }
)
"""chip -> (what it is, the shape of a slice by its number of chips)."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of so many chips."""

    chip: Chip
    chips: int
    shape: str

    @classmethod
    def of(cls, name: str) -> Topology:
        """A slice by its name, such as v5e-8. ValueError, with the known names, for any other."""
        kind, _, count = name.lower().partition("-")
        chip, shapes = SHAPES.get(kind, (CPU, {}))
        if not count.isdecimal() or int(count) not in shapes:
            raise ValueError(f"--topology {name!r} is not known; known are: {', '.join(names())}")
        return cls(chip, int(count), shapes[int(count)])

    @property
    def name(self) -> str:
        return f"{self.chip.name}-{self.chips}"

    @property
    def num_devices(self) -> int:
        """Devices of jax."""
        return self.chips * self.chip.devices

    @property
    def num_hosts(self) -> int:
        return -(-self.chips // self.chip.chips_per_host)

    def devices(self) -> list[jax.Device]:
        """Devices to compile for. ValueError, which says what to install, where the compiler is missing."""
        import jax

        platform = self.chip.platform
        if platform == "cpu":
            found = jax.local_devices(backend="cpu")
            if len(found) < self.num_devices:
                raise ValueError(
                    f"{self.name} needs {self.num_devices} devices, but there are {len(found)}: set "
                    f"XLA_FLAGS=--xla_force_host_platform_device_count={self.num_devices}"
                )
            return found[: self.num_devices]
        if importlib.util.find_spec(DISTRIBUTIONS[platform]) is None:
            raise ValueError(
                f"{self.name} needs the compiler in {DISTRIBUTIONS[platform]}: pip install '{EXTRAS[platform]}'. "
                "No device is needed."
            )
        return list(_describe(platform, self.chip.name, self.shape))


def names() -> Iterator[str]:
    """The names of all slices."""
    return (f"{kind}-{count}" for kind, (_, shapes) in SHAPES.items() for count in shapes)


@functools.cache
def _describe(platform: str, chip: str, shape: str) -> tuple[Any, ...]:
    from jax.experimental import topologies

    if platform == "gpu":
        return tuple(topologies.get_topology_desc(shape, platform="cuda", target_config=GPUS[chip]).devices)
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if set(shape) <= set("1x") else {}
    return tuple(topologies.get_topology_desc(f"{chip}:{shape}", platform="tpu", **bounds).devices)


def compile_without_devices(topology: Topology) -> None:
    """Tell jax, before it starts, that programs are only compiled: libtpu then neither asks for the machine's metadata
    nor for its chips."""
    for name, value in (
        ("JAX_PLATFORMS", "cpu"),
        ("XLA_FLAGS", f"--xla_force_host_platform_device_count={topology.num_devices}"),
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_WORKER_ID", "0"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(name, value)
