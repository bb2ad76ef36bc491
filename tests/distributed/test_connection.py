"""What goes over the wire between hosts, hostile bytes included, and how a lost peer is noticed."""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mmjax.distributed import connection
from mmjax.distributed.connection import LENGTH, Connection, WireError, admit, encode, introduce

Pair = tuple[Connection, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A connection, and the socket at its other end."""
    ours, theirs = socket.socketpair()
    wrapped = Connection(ours)
    yield wrapped, theirs
    wrapped.close()
    theirs.close()


def message(*header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return LENGTH.pack(len(text)) + text + data


@pytest.fixture(autouse=True)
def unix_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of sockets are no TCP sockets, which have the option that a connection sets."""
    monkeypatch.setattr(socket.socket, "setsockopt", lambda *_: None)


def test_a_message_arrives_as_it_was_sent(pair: Pair) -> None:
    here, theirs = pair
    arrays = {
        "pixels": np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, ::2],  # not contiguous
        "half": np.ones((3, 0), ml_dtypes.bfloat16),
        "scalar": np.array(True),
    }
    args = ["vision", np.int32(7), None, True, 0.5, [1, [np.arange(3)]], arrays, {"array": 3}, "ü"]
    there = Connection(theirs)
    there.send("encode", *args)
    name, found = here.receive()
    assert name == "encode" and found[:5] == ["vision", 7, None, True, 0.5] and found[7:] == [{"array": 3}, "ü"]
    np.testing.assert_array_equal(found[5][1][0], np.arange(3))
    for key, array in arrays.items():
        assert found[6][key].dtype == array.dtype and found[6][key].shape == array.shape
        np.testing.assert_array_equal(found[6][key], array)
    there.close()
    with pytest.raises(OSError, match="closed"):
        here.receive()


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, np.array([object()]), np.datetime64("2026-01-01")])
def test_what_is_no_plain_value_cannot_be_sent(value: Any) -> None:
    with pytest.raises(WireError, match="cannot be sent"):
        encode("prefill", [value])


@pytest.mark.parametrize(
    "data",
    [
        LENGTH.pack(1 << 40),
        LENGTH.pack(4) + b"\x80\x05N.",  # a pickle
        LENGTH.pack(2) + b"[]",
        message("prefill"),
        message(1, []),
        message("prefill", {}),
        message("prefill", [{"array": ["object", [1]]}]),
        message("prefill", [{"array": ["int32", [-1]]}]),
        message("prefill", [{"array": ["int32", [True]]}]),
        message("prefill", [{"array": ["int32", [1 << 40]]}]),
        message("prefill", [{"eval": "1"}]),
        LENGTH.pack(200_000) + b"[" * 200_000,
    ],
)
def test_bytes_that_are_no_message(pair: Pair, data: bytes) -> None:
    here, theirs = pair
    threading.Thread(target=lambda: theirs.sendall(data), daemon=True).start()
    with pytest.raises(WireError):
        here.receive()


def test_a_silent_peer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LOST_AFTER_S", 0.3)
    monkeypatch.setattr(connection, "HEARTBEAT_S", 0.02)
    ours, theirs = socket.socketpair()
    here, there = Connection(ours), Connection(theirs)
    threading.Timer(0.6, there.send, ("done",)).start()
    assert here.receive() == ("done", []), "signs of life keep a connection that has nothing else to say"
    there._closed.set()  # no more of them, and the socket stays open
    with pytest.raises(TimeoutError):
        here.receive()
    here.close()
    there.close()


@pytest.mark.parametrize(
    ("token", "rank", "admitted"), [("t", 1, True), ("other", 1, False), ("t", 0, False), ("t", 3, False)]
)
def test_only_who_knows_the_token_is_admitted(token: str, rank: int, admitted: bool) -> None:
    ours, theirs = socket.socketpair()
    outcomes: list[Any] = []

    def follow() -> None:
        try:
            introduce(theirs, token, rank)
            outcomes.append(rank)
        except (OSError, WireError) as error:
            outcomes.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    if admitted:
        assert admit(ours, "t", 3) == rank
    else:
        with pytest.raises(WireError, match="does not know the token"):
            admit(ours, "t", 3)
    ours.close()
    thread.join(10)
    theirs.close()
    assert (outcomes == [rank]) == admitted


def test_a_leader_that_does_not_know_the_token_is_not_followed() -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(bytes(32) + bytes(32))  # a nonce, and something in place of the proof
    with pytest.raises(WireError, match="the leader does not know the token"):
        introduce(theirs, "t", 1)
    ours.close()
    theirs.close()
