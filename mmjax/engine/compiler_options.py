"""What XLA is told about a program beside its defaults."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from types import MappingProxyType

from mmjax.config import xla_flag_is_set

logger = logging.getLogger(__name__)

# XLA:CPU converts each int8 matrix to floats before it multiplies. By default it schedules for speed, which keeps the
# float copies of all layers alive at once, and hoists them out of loops.
CPU_INT8 = MappingProxyType(
    {
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    }
)

GPU_DECODE = MappingProxyType(
    {
        # What is recorded as CUDA graphs: XLA's own set, and loops. The host drives a loop that is not part of a graph,
        # and waits for the device in every iteration: on an H100 a step of a 3B model at batch 1 took 4.57 ms and held
        # the calling thread throughout, where the graph took 3.83 ms and held it for 0.6 ms.
        "xla_gpu_enable_command_buffer": (
            "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE"
        ),
        # The KV cache takes most of the memory, so XLA finds every program above its limit and computes again, in every
        # layer, what it could have kept: up to 200 kernels a step, for nothing, since the cache stays.
        "xla_disable_hlo_passes": "rematerialization",
    }
)


def compiler_options(platform: str, *, decode: bool, int8: bool, num_devices: int) -> Mapping[str, str]:
    """Options for a program: whether it is a decode loop, whether weights are int8, over how many devices it is split.

    What XLA_FLAGS says is left alone. Collectives cannot be part of a loop's graph, so several GPUs keep the defaults.
    """
    if platform == "cpu":
        return CPU_INT8 if int8 else {}
    return _gpu_decode() if platform == "gpu" and decode and num_devices == 1 else {}


@functools.cache
def _gpu_decode() -> Mapping[str, str]:
    """Logged once per process."""
    chosen = {flag: value for flag, value in GPU_DECODE.items() if not xla_flag_is_set(flag)}
    logger.info("compiler options of decode programs: %s", chosen or "those of XLA_FLAGS")
    return chosen
