"""The host that schedules: it sends every call of its runner to the followers, and then makes the call itself."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar, cast

import jax
import numpy as np

from mmjax.distributed.connection import Connection, WireError, admit, encode
from mmjax.distributed.host_group import JOIN_S, HostGroup, resolve
from mmjax.engine.model_runner import ModelRunner
from mmjax.engine.programs import StepOutput
from mmjax.engine.sampler import PromptLogprobs

logger = logging.getLogger(__name__)
Method = TypeVar("Method", bound=Callable[..., Any])
T = TypeVar("T")

END, FAILED, RELOAD = "end", "failed", "reload_params"
READY_POLL_S = 1e-4
NOTICE_S = 5.0  # a device notices the end of another host before or after its connection does
EXIT_S = 5.0


class HostLostError(RuntimeError):
    """A host of the engine has died, or cannot be reached. Nothing can be computed without it."""


class Leader:
    """The connections to all followers.

    lost: gets a HostLostError as its exception as soon as a follower is lost. Before `started`, while no caller could
    be told, the process ends instead.
    """

    def __init__(self, group: HostGroup) -> None:
        self.lost: Future[NoReturn] = Future()
        self.started = False
        self._losing = threading.Lock()
        self._ended = False
        token = secrets.token_hex(32)
        own = resolve(group.address)
        family = socket.AF_INET6 if ":" in own else socket.AF_INET
        with socket.create_server((own, 0), family=family, backlog=group.size) as server:
            group.publish("leader", json.dumps({"port": server.getsockname()[1], "token": token}))
            self._followers = _accept(server, token, group.size)
        for rank, follower in self._followers.items():
            threading.Thread(target=self._read, args=(rank, follower), name=f"host {rank}", daemon=True).start()
        atexit.register(self.end)  # before jax's own handler, which waits for the followers

    def send(self, name: str, *args: Any) -> None:
        """Send a call to all followers. HostLostError if one is lost."""
        self.check()
        message = encode(name, args)
        for rank, follower in self._followers.items():
            try:
                follower.send_encoded(message)
            except OSError as error:
                self._lose(rank, str(error))
        self.check()

    def check(self) -> None:
        """HostLostError if a follower is lost."""
        if self.lost.done():
            self.lost.result()

    def check_soon(self) -> None:
        """`check`, when an error may be the first sign of a lost follower."""
        concurrent.futures.wait((self.lost,), NOTICE_S)
        self.check()

    def end(self) -> None:
        """Let the followers end. Idempotent."""
        if self._ended or self.lost.done():
            return
        self._ended = True
        for follower in self._followers.values():
            try:
                follower.send(END)
            except OSError as error:
                logger.warning("a host cannot be told to end: %s", error)

    def fail(self, error: BaseException) -> None:
        """This host cannot go on: end the others."""
        self._ended = True
        exit_with_main_thread()
        for follower in self._followers.values():
            with contextlib.suppress(OSError):
                follower.send(FAILED, describe(error))

    def _read(self, rank: int, follower: Connection) -> None:
        """Wait for what a follower says, which is only why it ends."""
        try:
            name, args = follower.receive()
            reason = str(args[0]) if name == FAILED and args else f"it sent {name!r}"
        except (OSError, WireError) as error:
            reason = str(error)
        if not self._ended:
            self._lose(rank, reason)

    def _lose(self, rank: int, reason: str) -> None:
        with self._losing:
            if self.lost.done():
                return
            error = HostLostError(f"host {rank} was lost: {reason}")
            logger.error("%s. Nothing can be computed without it: restart all hosts", error)
            if not self.started:
                exit_now()
            exit_with_main_thread()
            self.lost.set_exception(error)
        for follower in self._followers.values():
            follower.close()  # they end too


def _accept(server: socket.socket, token: str, size: int) -> dict[int, Connection]:
    """The connections to all followers by rank. Peers that do not know the token are sent away. TimeoutError."""
    followers: dict[int, Connection] = {}
    end = time.monotonic() + JOIN_S
    while len(followers) < size - 1:
        server.settimeout(max(end - time.monotonic(), 0.001))
        peer, address = server.accept()
        try:
            rank = admit(peer, token, size)
            if rank in followers:
                raise WireError(f"host {rank} is connected already")
            followers[rank] = Connection(peer)
        except (OSError, WireError) as error:
            logger.warning("a connection from %s was refused: %s", address[0], error)
            peer.close()
    return dict(sorted(followers.items()))


def describe(error: BaseException) -> str:
    """An error in a line, to be sent."""
    return f"{type(error).__name__}: {error}"[:2000]


def exit_now() -> NoReturn:
    """End the process although threads of it may wait for a device that waits for a host that is gone."""
    logging.shutdown()
    os._exit(1)


def exit_with_main_thread() -> None:
    """End the process soon after its main thread. Python's own exit would wait for threads that may never return, and
    jax's for hosts that are gone."""

    def run() -> None:
        threading.main_thread().join()
        time.sleep(EXIT_S)
        exit_now()

    threading.Thread(target=run, name="exit", daemon=True).start()


def led(method: Method) -> Method:
    """A method of the runner that the followers are sent before it is called here."""

    @functools.wraps(method)
    def call(self: LeadingRunner, *args: Any, **kwargs: Any) -> Any:
        self.leader.send(method.__name__, *args, *kwargs.values())
        return self.call(lambda: method(self, *args, **kwargs))

    return cast(Method, call)


class LeadingRunner(ModelRunner):
    """The runner of the leader. Its calls raise HostLostError once a follower is lost, and never wait for one."""

    def __init__(self, leader: Leader, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.leader = leader

    prefill = led(ModelRunner.prefill)
    decode = led(ModelRunner.decode)
    encode = led(ModelRunner.encode)
    align = led(ModelRunner.align)
    write_embeds = led(ModelRunner.write_embeds)
    set_sampling_row = led(ModelRunner.set_sampling_row)
    set_logit_biases = led(ModelRunner.set_logit_biases)
    take_params = led(ModelRunner.take_params)
    drop_state = led(ModelRunner.drop_state)
    restore_state = led(ModelRunner.restore_state)

    def prompt_logprobs(self, prefill: StepOutput, targets: np.ndarray) -> PromptLogprobs:
        self.leader.send("prompt_logprobs", targets)  # the followers have the same prefill: their latest one
        return self.call(lambda: super(LeadingRunner, self).prompt_logprobs(prefill, targets))

    def restore_params(self, host: list[Any]) -> None:
        self.leader.send("restore_params")  # each host has its own
        self.call(lambda: super(LeadingRunner, self).restore_params(host))

    def wait(self, calls: Sequence[Future[Any]]) -> None:
        """As the runner's, and until the device has computed what they return. HostLostError as soon as a follower is
        lost, though the calls or the device may wait for it for ever."""
        for call in calls:
            concurrent.futures.wait((call, self.leader.lost), return_when=concurrent.futures.FIRST_COMPLETED)
            self.leader.check()
            for array in jax.tree.leaves(call.result()):
                while not array.is_ready():
                    self.leader.check()
                    time.sleep(READY_POLL_S)
                self.call(array.block_until_ready)  # ready, or failed

    def call(self, function: Callable[[], T]) -> T:
        """Call a function of the device. An error because of a lost follower is a HostLostError."""
        try:
            return function()
        except HostLostError:
            raise
        except Exception as error:
            try:
                self.leader.check_soon()
            except HostLostError as lost:
                raise lost from error
            raise
