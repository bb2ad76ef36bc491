"""What loading a model does otherwise if the model is spread over several hosts."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NoReturn

import jax

from mmjax.config import EngineArgs, Environment, set_xla_flag
from mmjax.distributed.follower import Follower
from mmjax.distributed.host_group import HostGroup
from mmjax.distributed.leader import RELOAD, Leader, LeadingRunner
from mmjax.engine.memory import Device, EngineMemory
from mmjax.engine.model_runner import ModelRunner
from mmjax.engine.program_cache import source_digest

logger = logging.getLogger(__name__)

SAME = ("dtype", "enforce_eager", "load_format", "num_decode_steps", "quantization", "seed", "tensor_parallel_size")
"""Arguments that must be the same on all hosts, and do not show in the sizes."""


class Hosts:
    """The hosts of one engine, and the part of this one: to lead or to follow."""

    def __init__(self, group: HostGroup) -> None:
        self._group = group
        self._leader = Leader(group) if group.rank == 0 else None
        self._follower = Follower(group) if group.rank > 0 else None

    @classmethod
    def join(cls, args: EngineArgs) -> Hosts | None:
        """Meet the other hosts that the arguments or the environment name; None if there are none. ValueError if that
        fails."""
        environment = Environment.read()
        if not jax.distributed.is_initialized() and (args.nnodes or environment.num_processes) == 1:
            return None
        if importlib.util.find_spec("libtpu") is None:  # which ends the process for flags that it does not know
            # A process that finds a program in its cache would not measure its share of the kernels that another one
            # waits for. Only process 0 writes the cache.
            set_xla_flag("xla_gpu_shard_autotuning", "false")
        group = HostGroup.join(args, environment)
        return None if group is None else cls(group)

    def devices(self, count: int) -> list[jax.Device]:
        return self._group.devices(count)

    def least_memory(self, device: Device) -> Device:
        """See `HostGroup.least_memory`."""
        return self._group.least_memory(device)

    @property
    def make_runner(self) -> Callable[..., ModelRunner]:
        return ModelRunner if self._leader is None else functools.partial(LeadingRunner, self._leader)

    @property
    def lost(self) -> Future[NoReturn] | None:
        """See `Leader.lost`."""
        return None if self._leader is None else self._leader.lost

    def reload(self, load: Callable[[], list[Any]]) -> list[Any]:
        """Read the parameters again, on all hosts at once."""
        if self._leader is not None:
            self._leader.send(RELOAD)
        return load()

    def check_same(self, args: EngineArgs, runner: ModelRunner, memory: EngineMemory) -> None:
        """ValueError unless all hosts have the same code, arguments, parameters and sizes."""
        params = [(path, str(leaf)) for path, leaf in zip(runner.paths, runner.param_shapes, strict=True)]
        self._group.check_same(
            {
                "the code of mmjax": source_digest(),
                "the version of jax": jax.__version__,
                **{name: repr(getattr(args, name)) for name in SAME},
                "the model": repr(runner.spec),
                "the parameters": repr(params),
                "the sizes": repr(memory),
            }
        )

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Whatever ends the loading here ends the other hosts, which would wait for this one."""
        try:
            yield
        except SystemExit:  # of a follower, at its end
            raise
        except BaseException as error:
            (self._leader or self._follower).fail(error)  # type: ignore[union-attr]
            raise

    def start(self, runner: ModelRunner, load: Callable[[], list[Any]]) -> None:
        """All is loaded here: wait for the other hosts. Then the leader returns. A follower follows until the leader
        ends, and then ends the process."""
        # A host that finds its programs in the cache is minutes ahead of one that compiles. In its first call it would
        # wait for the other one, and gloo gives up after 30 s.
        self._group.gather("ready", True)
        if self._follower is not None:
            logger.info("host %d of %d follows", self._group.rank, self._group.size)
            self._follower.follow(runner, load)
            raise SystemExit(0)
        assert self._leader is not None
        self._leader.started = True
