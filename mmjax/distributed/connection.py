"""A connection between two hosts: named messages of plain values and arrays. Nothing that is received can run code."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import secrets
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

HEARTBEAT_S = 2.0  # between two signs of life
LOST_AFTER_S = 20.0  # without one; a host that loads or compiles holds the GIL for less than a second
HANDSHAKE_S = 10.0
MAX_HEADER_BYTES = 1 << 20
MAX_ARRAY_BYTES = 1 << 34
JOIN_BYTES = 1 << 20  # shorter messages are sent in one piece
LENGTH = struct.Struct("<Q")
NONCE_BYTES = PROOF_BYTES = 32
DTYPES = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", ml_dtypes.bfloat16)
}
ALIVE = "alive"


class WireError(ValueError):
    """Bytes that are no message, or a value that no message can hold."""


def encode(name: str, args: Sequence[Any]) -> list[bytes | memoryview]:
    """A message as buffers: the length of its header, the header in JSON, and the bytes of its arrays one after the
    other. WireError for values other than None, numbers, strings, arrays, and lists and dictionaries of these."""
    arrays: list[np.ndarray] = []

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            array = np.ascontiguousarray(value).reshape(value.shape)
            if array.dtype.name not in DTYPES:
                raise WireError(f"an array of {array.dtype} cannot be sent")
            arrays.append(array)
            return {"array": [array.dtype.name, list(array.shape)]}
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        if isinstance(value, dict):
            return {"dict": {str(key): plain(each) for key, each in value.items()}}
        raise WireError(f"a {type(value).__name__} cannot be sent")

    header = json.dumps([name, plain(list(args))]).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(header)} bytes is too long")
    return [LENGTH.pack(len(header)), header, *(array.reshape(-1).view(np.uint8).data for array in arrays)]


class Connection:
    """A socket over which messages go both ways. Any thread may send; one receives.

    A connection over which nothing comes for LOST_AFTER_S is lost: OSError, as for one that is closed.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(LOST_AFTER_S)
        self._socket = sock
        self._sending = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def send(self, name: str, *args: Any) -> None:
        """Send a message. OSError if the connection is lost."""
        self.send_encoded(encode(name, args))

    def send_encoded(self, buffers: Sequence[bytes | memoryview]) -> None:
        if sum(map(len, buffers)) < JOIN_BYTES:
            buffers = [b"".join(buffers)]
        with self._sending:
            for buffer in buffers:
                self._socket.sendall(buffer)

    def receive(self) -> tuple[str, list[Any]]:
        """The next message: its name and arguments. OSError if the connection is lost, WireError for what is none."""
        while True:
            name, args = self._receive()
            if name != ALIVE:
                return name, args

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that sends or receives
        self._socket.close()

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            try:
                self.send(ALIVE)
            except OSError:
                return  # who receives is told

    def _receive(self) -> tuple[str, list[Any]]:
        (length,) = LENGTH.unpack(read_exactly(self._socket, LENGTH.size))
        if length > MAX_HEADER_BYTES:
            raise WireError(f"a header of {length} bytes is too long")
        try:
            name, args = json.loads(bytes(read_exactly(self._socket, length)))
        except (ValueError, TypeError, RecursionError) as error:
            raise WireError(f"a header is damaged: {error}") from error
        if not isinstance(name, str) or not isinstance(args, list):
            raise WireError("a header holds no message")
        return name, [self._value(arg) for arg in args]

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(each) for each in value]
        if not isinstance(value, dict):
            return value
        match value:
            case {"dict": dict(entries)}:
                return {key: self._value(each) for key, each in entries.items()}
            case {"array": [str(dtype), list(shape)]} if dtype in DTYPES:
                return self._array(DTYPES[dtype], shape)
        raise WireError("a header holds no message")

    def _array(self, dtype: np.dtype, shape: list[Any]) -> np.ndarray:
        if not all(type(size) is int and size >= 0 for size in shape):
            raise WireError(f"an array has no shape {shape}")
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > MAX_ARRAY_BYTES:
            raise WireError(f"an array of {nbytes} bytes is too large")
        return np.frombuffer(read_exactly(self._socket, nbytes), dtype).reshape(shape)


def read_exactly(sock: socket.socket, count: int) -> bytearray:
    """So many bytes. OSError if the connection ends before."""
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = sock.recv_into(view[done:])
        if not got:
            raise ConnectionResetError("the connection was closed")
        done += got
    return data


# -- the handshake: each side proves that it knows the token, which is never sent --------------------------------


def admit(sock: socket.socket, token: str, size: int) -> int:
    """The leader's side. Returns the follower's rank. OSError or WireError for a peer that does not know the token."""
    sock.settimeout(HANDSHAKE_S)
    nonce = secrets.token_bytes(NONCE_BYTES)
    sock.sendall(nonce)
    greeting = bytes(read_exactly(sock, LENGTH.size + NONCE_BYTES + PROOF_BYTES))
    claim, proof = greeting[:-PROOF_BYTES], greeting[-PROOF_BYTES:]
    (rank,) = LENGTH.unpack(claim[: LENGTH.size])
    if not hmac.compare_digest(proof, _proof(token, b"follower", nonce, claim)) or not 0 < rank < size:
        raise WireError("a peer does not know the token")
    sock.sendall(_proof(token, b"leader", nonce, claim))
    return int(rank)


def introduce(sock: socket.socket, token: str, rank: int) -> None:
    """The follower's side. OSError or WireError for a peer that does not know the token."""
    sock.settimeout(HANDSHAKE_S)
    nonce = bytes(read_exactly(sock, NONCE_BYTES))
    claim = LENGTH.pack(rank) + secrets.token_bytes(NONCE_BYTES)
    sock.sendall(claim + _proof(token, b"follower", nonce, claim))
    if not hmac.compare_digest(bytes(read_exactly(sock, PROOF_BYTES)), _proof(token, b"leader", nonce, claim)):
        raise WireError("the leader does not know the token")


def _proof(token: str, side: bytes, nonce: bytes, claim: bytes) -> bytes:
    return hmac.new(token.encode(), side + nonce + claim, hashlib.sha256).digest()
