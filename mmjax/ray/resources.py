"""What an engine asks of Ray: the package itself, and devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mmjax.config import MAX_NUM_SEQS, EngineArgs


@contextmanager
def needs_ray() -> Iterator[None]:
    """An ImportError inside says how to install Ray."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"mmjax.ray needs Ray ({error}): pip install 'mmjax[ray]'") from error


def actor_options(args: EngineArgs, accelerator_type: str | None, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the actor that holds an engine: all devices of its mesh, which one process drives.

    accelerator_type: Ray's name, such as "H100" or "TPU-V6E"; None for the CPU, or for what `wanted` asks for. wanted:
    options that replace these. Ray hides the devices that an actor does not ask for. ValueError for an engine of
    several hosts.
    """
    if getattr(args, "nnodes", None) not in (None, 1):
        raise ValueError("nnodes: an engine on Ray has one host; deploy/k8s/tpu_hosts.yaml runs one on several.")
    devices = args.tensor_parallel_size * args.data_parallel_size
    options: dict[str, Any] = {}
    if accelerator_type is not None:
        options["accelerator_type"] = accelerator_type
        if accelerator_type.upper().startswith("TPU"):
            options["resources"] = {"TPU": devices}
        else:
            options["num_gpus"] = devices
    return {**options, **wanted}


def num_seqs(args: EngineArgs, options: Mapping[str, Any]) -> int:
    """How many sequences an engine decodes together in an actor with these options."""
    platform = "gpu" if options.get("num_gpus") else "tpu" if "TPU" in options.get("resources", {}) else "cpu"
    return args.max_num_seqs or MAX_NUM_SEQS[platform]
