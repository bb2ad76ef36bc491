"""The processes that run one engine: how they find each other, and what they agree on."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax

from mmjax.config import EngineArgs, Environment
from mmjax.engine.memory import Device

logger = logging.getLogger(__name__)

JOIN_S = 600  # for all processes to start
RESOLVE_S = 60
AGREE_MS = 24 * 3600 * 1000  # a process may read its weights for hours; one that dies is noticed otherwise
PREFIX = "mmjax"


@dataclasses.dataclass(frozen=True)
class HostGroup:
    """This process among those of one engine. rank: 0 leads. address: of the leader, as all reach it."""

    rank: int
    size: int
    address: str

    @classmethod
    def join(cls, args: EngineArgs, environment: Environment) -> HostGroup | None:
        """Wait for the other processes that the arguments or the environment name. None if each of them is to run an
        engine of its own. Called before JAX knows its devices. ValueError if they cannot be joined."""
        if not jax.distributed.is_initialized():
            if args.nnodes is not None:
                _check(args, args.nnodes)
                _join_by_arguments(args, args.nnodes)
            elif environment.num_processes > args.tensor_parallel_size:
                logger.warning(
                    "%s has started %d processes, and each runs an engine of its own: to run one engine over all of "
                    "them, set tensor_parallel_size to the number of their devices",
                    environment.scheduler,
                    environment.num_processes,
                )
                return None
            else:
                _check(args, environment.num_processes)
                _join_by_environment(args, environment)
        if jax.process_count() == 1:
            return None
        _check(args, jax.process_count())
        address = str(_state().coordinator_address).rpartition(":")[0]
        return cls(jax.process_index(), jax.process_count(), address.strip("[]"))

    def devices(self, count: int) -> list[jax.Device]:
        """The first `count` devices, as many of each process. ValueError if a process has too few."""
        each, found = count // self.size, list[jax.Device]()
        for rank in range(self.size):
            local = [device for device in jax.devices() if device.process_index == rank]
            if len(local) < each:
                raise ValueError(
                    f"tensor_parallel_size {count} needs {each} devices of each of {self.size} hosts, but host {rank} "
                    f"has {len(local)} ({local[0].platform})"
                )
            found += local[:each]
        return found

    # -- what the processes agree on ---------------------------------------------------------------------------------

    def publish(self, name: str, value: str) -> None:
        """Tell all processes a value. Each name can be used once by each process."""
        _state().client.key_value_set(f"{PREFIX}/{name}/{self.rank}", value)

    def read(self, name: str, rank: int) -> str:
        """What a process publishes under a name. Waits for it."""
        return str(_state().client.blocking_key_value_get(f"{PREFIX}/{name}/{rank}", AGREE_MS))

    def gather(self, name: str, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks. Called by all of them, with values for JSON."""
        self.publish(name, json.dumps(value))
        return [json.loads(self.read(name, rank)) for rank in range(self.size)]

    def least_memory(self, device: Device) -> Device:
        """A device with the least free memory of those that the processes name, so that all plan alike."""
        return _Least(self.gather("memory", device.memory_stats()))

    def check_same(self, facts: Mapping[str, str]) -> None:
        """ValueError, in every process, unless these are the same in all of them."""
        everyone = self.gather("facts", dict(facts))
        for rank, others in enumerate(everyone):
            for name in facts:
                if others.get(name) != everyone[0].get(name):
                    raise ValueError(
                        f"host {rank} does not run the same as host 0: {name} is {others.get(name)} there, and "
                        f"{everyone[0].get(name)} on host 0. Start all hosts with the same arguments, versions and "
                        "model files."
                    )


@dataclasses.dataclass(frozen=True)
class _Least:
    """The device whose memory is planned: as free as the fullest of several."""

    stats: list[dict[str, int] | None]

    def memory_stats(self) -> dict[str, int] | None:
        known = [stats for stats in self.stats if stats]
        return min(known, key=lambda stats: stats["bytes_limit"] - stats["bytes_in_use"], default=None)


def _check(args: EngineArgs, size: int) -> None:
    """ValueError for arguments that do not go with this number of processes."""
    if args.nnodes not in (None, size):
        raise ValueError(f"nnodes is {args.nnodes}, but jax.distributed has {size} processes")
    if args.data_parallel_size > 1:
        raise ValueError(
            f"{size} hosts hold one copy of the model, so data_parallel_size must be 1, not {args.data_parallel_size}: "
            "start another group of hosts for another copy"
        )
    if args.tensor_parallel_size % size:
        raise ValueError(
            f"tensor_parallel_size {args.tensor_parallel_size} does not divide over {size} hosts: set it to the number "
            "of all their devices"
        )


def _state() -> Any:
    """jax's own: the client of the coordinator's key-value store is not public."""
    from jax._src import distributed

    return distributed.global_state


def _join_by_arguments(args: EngineArgs, size: int) -> None:
    address = f"{args.master_addr}:{args.master_port}"
    logger.info("host %d of %d: waiting for the others at %s", args.node_rank, size, address)
    own = resolve(args.master_addr) if args.node_rank == 0 else args.master_addr
    _initialize(
        address,
        coordinator_address=address,
        # by default, every address of the host
        coordinator_bind_address=f"[{own}]:{args.master_port}" if ":" in own else f"{own}:{args.master_port}",
        num_processes=size,
        process_id=args.node_rank,
        cluster_detection_method="deactivate",
    )


def resolve(host: str) -> str:
    """The address of a host. A cluster may not know the name of a pod yet when the pod starts. ValueError."""
    end = time.monotonic() + RESOLVE_S
    while True:
        try:
            return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except socket.gaierror as error:
            if time.monotonic() > end:
                raise ValueError(f"master_addr {host!r} has no address: {error.strerror}") from error
            time.sleep(1)


def _join_by_environment(args: EngineArgs, environment: Environment) -> None:
    count = environment.num_processes
    logger.info("%s has started %d processes: waiting for the others", environment.scheduler, count)
    # Under Slurm, jax gives a task the one device of its number on the host, also if the host has one task.
    each = args.tensor_parallel_size // count
    _initialize(environment.scheduler, local_device_ids=list(range(each)) if environment.whole_hosts else None)


def _initialize(where: str, **keywords: Any) -> None:
    try:
        jax.distributed.initialize(initialization_timeout=JOIN_S, **keywords)
    except Exception as error:
        raise ValueError(
            f"the hosts did not find each other ({where}): {error}. All must be started within {JOIN_S} s, with the "
            "same nnodes, master_addr and master_port; node_rank 0 runs on master_addr, which must be an address of "
            "that host that the others reach"
        ) from error
