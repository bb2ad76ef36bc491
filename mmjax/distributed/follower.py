"""A host that repeats the calls of the leader's runner. It schedules nothing, and reads no result."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from mmjax.distributed.connection import Connection, WireError, introduce
from mmjax.distributed.host_group import JOIN_S, HostGroup
from mmjax.distributed.leader import END, FAILED, RELOAD, describe, exit_now, exit_with_main_thread
from mmjax.engine.model_runner import ModelRunner
from mmjax.engine.programs import StepOutput

logger = logging.getLogger(__name__)


class Follower:
    """The connection to the leader. Once the leader is lost the process ends, whatever its threads wait for."""

    def __init__(self, group: HostGroup) -> None:
        leader = json.loads(group.read("leader", 0))
        sock = socket.create_connection((group.address, leader["port"]), JOIN_S)
        introduce(sock, leader["token"], group.rank)
        self._leader = Connection(sock)
        self._calls: queue.SimpleQueue[tuple[str, list[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="leader", daemon=True).start()

    def follow(self, runner: ModelRunner, reload_params: Callable[[], list[Any]]) -> None:
        """Repeat the leader's calls until it ends. An error ends this process, and with it the engine."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _wait_for_leader)
        replay = Replay(runner, reload_params)
        try:
            while True:
                name, args = self._calls.get()
                if name == END:
                    return
                replay(name, args)
        except Exception as error:
            logger.exception("this host ends, and with it the engine")
            self.fail(error)
            exit_now()

    def fail(self, error: BaseException) -> None:
        """This host cannot go on: tell the leader why."""
        exit_with_main_thread()
        with contextlib.suppress(OSError):
            self._leader.send(FAILED, describe(error))

    def _read(self) -> None:
        try:
            while True:
                name, args = self._leader.receive()
                if name == FAILED:
                    raise WireError(str(args[0]))
                self._calls.put((name, args))
                if name == END:
                    return
        except (OSError, WireError) as error:
            logger.error("host 0, which leads, was lost: %s. This host ends too: restart all hosts", error)
            exit_now()


class Replay:
    """Makes the calls that come by name: of the methods of a runner that a `LeadingRunner` sends, and no others."""

    def __init__(self, runner: ModelRunner, reload_params: Callable[[], list[Any]]) -> None:
        self.runner = runner
        self._reload_params = reload_params
        self._prefill = StepOutput()
        self._params: list[Any] | None = None  # while the runner has none
        same = (
            runner.decode,
            runner.encode,
            runner.align,
            runner.write_embeds,
            runner.set_sampling_row,
            runner.set_logit_biases,
            runner.drop_state,
            runner.restore_state,
        )
        self._methods: dict[str, Callable[..., Any]] = {method.__name__: method for method in same} | {
            "prefill": self._run_prefill,
            "prompt_logprobs": lambda targets: runner.prompt_logprobs(self._prefill, targets),
            "take_params": self._take_params,
            "restore_params": self._restore_params,
            RELOAD: self._reload,
        }

    def __call__(self, name: str, args: list[Any]) -> None:
        """Make a call. WireError for a name that is none of them."""
        if name not in self._methods:
            raise WireError(f"the leader asks for {name!r}, which is no method of the runner")
        self._methods[name](*args)

    def _run_prefill(self, *args: Any) -> None:
        self._prefill = self.runner.prefill(*args)

    def _take_params(self, keep: bool) -> None:
        self._params = self.runner.take_params(keep=keep)

    def _reload(self) -> None:
        self._params = self._reload_params()

    def _restore_params(self) -> None:
        assert self._params is not None
        self.runner.restore_params(self._params)
        self._params = None


def _wait_for_leader(*_: Any) -> None:
    """On SIGTERM, which all hosts may get together: the leader still lets its requests finish."""
    logger.info("this host ends when the leader does")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
