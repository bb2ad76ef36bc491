"""A leader's runner and its follower's, without devices: which calls arrive, and what the loss of a host does."""

import concurrent.futures
import contextlib
import inspect
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from mmjax.config import EngineArgs, Environment
from mmjax.distributed.connection import Connection, WireError
from mmjax.distributed.follower import Replay
from mmjax.distributed.host_group import HostGroup, _check
from mmjax.distributed.hosts import Hosts
from mmjax.distributed.leader import HostLostError, Leader, LeadingRunner
from mmjax.engine.model_runner import ModelRunner
from mmjax.engine.programs import StepOutput
from mmjax.entrypoints.async_llm import EngineDeadError, _unless_lost

HOST_ONLY = {"wait", "warm_up", "stop_compiling", "program", "program_keys", "param_shapes"} | {
    "measure", "choose_layouts", "sizing_keys"
}  # fmt: skip
"""Methods of the runner that each host calls for itself."""


class Recorder:
    """A runner that notes how it is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, (*args, *kwargs.values())))
            return StepOutput() if name == "prefill" else ["params"] if name == "take_params" else None

        call.__name__ = name
        return call


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Leader, Connection]]:
    """A leader that has one follower, and the follower's connection."""
    monkeypatch.setattr("mmjax.distributed.leader.NOTICE_S", 0.1)
    monkeypatch.setattr("mmjax.distributed.leader.exit_with_main_thread", lambda: None)
    leader = Leader.__new__(Leader)
    leader.lost, leader.started, leader._ended, leader._losing = Future(), True, False, threading.Lock()
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = Connection(socket.create_connection(server.getsockname()))
        ours = Connection(server.accept()[0])
    leader._followers = {1: ours}
    threading.Thread(target=leader._read, args=(1, ours), daemon=True).start()
    yield leader, theirs
    leader._ended = True
    ours.close()
    theirs.close()


def leading(leader: Leader) -> LeadingRunner:
    runner = LeadingRunner.__new__(LeadingRunner)
    runner.leader = leader
    return runner


CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("prefill", (128, np.arange(9, dtype=np.int32))),
    ("prompt_logprobs", (StepOutput(), np.zeros(4, np.int32))),
    ("decode", (4, np.arange(3, dtype=np.int32), 8)),
    ("encode", ("vision", 2, {"pixels": np.ones((2, 3), np.float32)}, np.arange(2, dtype=np.int32))),
    ("align", ("audio", {"mel": np.ones((1, 3), np.float32)}, np.arange(2, dtype=np.int32))),
    ("write_embeds", (np.ones((2, 3), np.float32), np.arange(2, dtype=np.int32))),
    ("set_sampling_row", (1, None, np.ones(5, np.float32))),
    ("set_logit_biases", (np.arange(2, dtype=np.int32), np.ones((2, 5), np.float32))),
    ("drop_state", ()),
    ("take_params", (True,)),
    ("restore_params", (["params"],)),
    ("restore_state", ()),
]


def test_every_call_of_the_runner_is_repeated(joined: tuple[Leader, Connection]) -> None:
    leader, follower = joined
    runner, there = leading(leader), Recorder()
    runner.call = lambda function: None  # type: ignore[method-assign]  # the leader's own part needs a device
    replay = Replay(there, lambda: ["read again"])  # type: ignore[arg-type]
    for name, args in CALLS:
        if name == "take_params":
            runner.take_params(keep=True)
        else:
            getattr(runner, name)(*args)
        replay(*follower.receive())
    assert [name for name, _ in there.calls] == [name for name, _ in CALLS]
    for (name, found), (_, wanted) in zip(there.calls, CALLS, strict=True):
        assert repr(found) == repr(wanted), name
    public = {name for name, _ in inspect.getmembers(ModelRunner) if not name.startswith("_")}
    assert public == {name for name, _ in CALLS} | HOST_ONLY, "a new method of the runner: must followers repeat it?"


def test_weights_that_are_read_again_are_restored() -> None:
    there = Recorder()
    replay = Replay(there, lambda: ["read again"])  # type: ignore[arg-type]
    for name, args in (("take_params", [False]), ("reload_params", []), ("restore_params", [])):
        replay(name, args)
    assert there.calls == [("take_params", (False,)), ("restore_params", (["read again"],))]


def test_no_other_name_is_called() -> None:
    with pytest.raises(WireError, match="no method of the runner"):
        Replay(Recorder(), list)("stop_compiling", [])  # type: ignore[arg-type]


def test_a_lost_follower_ends_every_wait(joined: tuple[Leader, Connection]) -> None:
    leader, follower = joined
    runner, stuck = leading(leader), Future[Any]()  # a call that waits for the follower, for ever
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(runner.wait, [stuck])
        follower.close()
        with pytest.raises(HostLostError, match="host 1 was lost: the connection was closed"):
            waiting.result(10)
    with pytest.raises(HostLostError):
        runner.drop_state()
    with pytest.raises(HostLostError):  # what the device says of it is not what has happened
        runner.call(lambda: (_ for _ in ()).throw(RuntimeError("gloo: connection closed")))


def test_scores_of_a_transcript_do_not_wait_for_a_lost_host() -> None:
    for lose, error in ((False, None), (True, EngineDeadError)):
        lost, call = Future[Any](), Future[Any]()
        found = _unless_lost(call, lost)
        if lose:
            lost.set_exception(HostLostError("host 1 was lost"))
        call.set_result("scores")
        with contextlib.nullcontext() if error is None else pytest.raises(error, match="host 1 was lost"):
            assert found.result(5) == "scores"


def test_an_error_of_the_device_stays_what_it_is(joined: tuple[Leader, Connection]) -> None:
    leader, follower = joined
    runner, failed = leading(leader), Future[Any]()
    failed.set_exception(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.wait([failed])
    follower.send("failed", "ValueError: no such file")
    with pytest.raises(HostLostError, match="host 1 was lost: ValueError: no such file"):
        leader.check_soon()


def test_the_leader_starts_when_all_hosts_are_ready(
    joined: tuple[Leader, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that finds its programs in the cache would otherwise wait in its first call for one that compiles them."""
    leader, _ = joined
    hosts, asked = Hosts.__new__(Hosts), []
    hosts._group, hosts._leader, hosts._follower, leader.started = HostGroup(0, 2, "10.0.0.1"), leader, None, False
    monkeypatch.setattr(HostGroup, "gather", lambda _, name, own: asked.append((name, leader.started)))
    hosts.start(Recorder(), list)  # type: ignore[arg-type]
    assert asked == [("ready", False)] and leader.started


@pytest.mark.parametrize(("error", "told"), [(ValueError("no such file"), True), (SystemExit(0), False)])
def test_what_ends_the_loading_ends_the_other_hosts(
    joined: tuple[Leader, Connection], error: BaseException, told: bool
) -> None:
    leader, follower = joined
    hosts = Hosts.__new__(Hosts)
    hosts._leader, hosts._follower = leader, None
    with pytest.raises(type(error)), hosts.loading():
        raise error
    leader.end()
    assert follower.receive() == (("failed", ["ValueError: no such file"]) if told else ("end", []))


# -- which processes are one engine ------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_STEP_NUM_NODES": "4",
}


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, Environment()),
        ({"SLURM_NTASKS": "8"}, Environment()),  # a batch script, outside of srun
        ({**SLURM, "SLURM_NTASKS": "4"}, Environment("Slurm", 4, whole_hosts=True)),
        ({**SLURM, "SLURM_NTASKS": "32"}, Environment("Slurm", 32)),
        ({"TPU_WORKER_HOSTNAMES": "a"}, Environment("GKE", 1)),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, Environment("GKE", 4)),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, Environment("GKE", 4)),
    ],
)
def test_environment(variables: dict[str, str], wanted: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", *SLURM, "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Environment.read() == wanted


def test_processes_that_cannot_share_a_model_run_their_own(caplog: pytest.LogCaptureFixture) -> None:
    assert HostGroup.join(EngineArgs("model"), Environment("Slurm", 4)) is None
    assert "set tensor_parallel_size to the number of their devices" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"nnodes": 2}, "tensor_parallel_size 1 does not divide over 2 hosts"),
        ({"nnodes": 2, "tensor_parallel_size": 2, "data_parallel_size": 2}, "data_parallel_size must be 1, not 2"),
        ({"nnodes": 4, "tensor_parallel_size": 2}, "nnodes is 4, but jax.distributed has 2 processes"),
    ],
)
def test_arguments_that_do_not_go_with_two_hosts(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _check(EngineArgs("model", **arguments), 2)


def test_hosts_that_differ_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    group = HostGroup(1, 3, "10.0.0.1")
    for third, error in (({"seed": "0", "the sizes": "4"}, None), ({"seed": "1", "the sizes": "4"}, "host 2 does not")):
        monkeypatch.setattr(HostGroup, "gather", lambda _, name, own, third=third: [own, own, third])
        with (
            contextlib.nullcontext() if error is None else pytest.raises(ValueError, match=f"{error}.*seed is 1 there")
        ):
            group.check_same({"seed": "0", "the sizes": "4"})


def test_the_fullest_device_of_all_hosts_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 100, "bytes_in_use": 10}

    fuller = {"bytes_limit": 100, "bytes_in_use": 30}
    monkeypatch.setattr(HostGroup, "gather", lambda _, name, own: [own, fuller, None])
    assert HostGroup(0, 3, "10.0.0.1").least_memory(Device()).memory_stats() == fuller


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"nnodes": 0}, "nnodes must be at least 1"),
        ({"node_rank": 1}, "node_rank must be from 0 to 0 with nnodes=1"),
        ({"nnodes": 2, "node_rank": 2}, "node_rank must be from 0 to 1"),
        ({"master_port": 0}, "master_port must be from 1 to 65535"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EngineArgs("model", **arguments)
