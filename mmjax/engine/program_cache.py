"""Traced programs on disk. A start whose programs are known reads them, instead of tracing Python for seconds each."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.export import DisabledSafetyCheck, Exported
from jax.stages import Compiled

from mmjax import kernels
from mmjax.batch import Batch, KVCache
from mmjax.engine.measured import Measured
from mmjax.engine.programs import DeviceState, StepOutput
from mmjax.engine.sampler import SamplerOutput
from mmjax.nn.weight import QuantizedArray

logger = logging.getLogger(__name__)

KEPT_SOURCES = 4  # versions of the code whose programs stay on disk
# jax promises no stability for these; a program is only read by the versions that wrote it.
CUSTOM_CALLS = tuple(
    DisabledSafetyCheck.custom_call(target)
    for target in ("__gpu$xla.gpu.triton", "triton_kernel_call", "__cudnn$fmhaSoftmax", "tpu_custom_call")
)


class ProgramCache:
    """The files of one model's programs, below jax's compilation cache. Files of other code are never read.

    model: what every program of the model depends on. Programs are not pickled: their form is that of jax.export. Only
    `model` is, to be hashed.
    """

    def __init__(self, directory: Path, model: object) -> None:
        _register_trees()
        self._directory = directory / "traced" / source_digest()
        self._model = pickle.dumps(model)

    def read(self, key: object) -> Exported | None:
        """The program of this key, if there is one."""
        try:
            data = bytearray(self._file(key).read_bytes())
        except OSError:
            return None
        try:
            return jax.export.deserialize(data)
        except Exception as error:
            logger.warning("a traced program in %s cannot be read, and is made again: %r", self._directory, error)
            return None

    def write(self, key: object, exported: Exported) -> None:
        """Keep a traced program. If it cannot be written, the log says so once."""
        self._write(key, exported.serialize())

    def _write(self, key: object, data: bytes | bytearray) -> None:
        try:
            if not self._directory.is_dir():
                self._directory.mkdir(parents=True, exist_ok=True)
                _remove_oldest(self._directory.parent)
            with tempfile.NamedTemporaryFile(dir=self._directory, delete=False) as file:
                file.write(data)
            os.replace(file.name, self._file(key))
        except OSError as error:
            _warn_once(f"traced programs cannot be kept: {error}")

    def read_compiled(self, key: object, devices: tuple[jax.Device, ...]) -> Compiled | None:
        """The executable of this key for these devices, if one was kept and the versions of the compiler are the
        same."""
        try:
            data = self._file(("compiled", key, _compiler_versions())).read_bytes()
        except OSError:
            return None
        try:
            payload, in_tree, out_tree = pickle.loads(data)
            return deserialize_and_load(
                payload, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
            )
        except Exception as error:
            logger.warning("a program in %s cannot be loaded, and is compiled again: %r", self._directory, error)
            return None

    def write_compiled(self, key: object, compiled: Compiled) -> None:
        """Keep an executable. Its file is a pickle, so the directory must be one that is trusted, like that of jax's
        own cache."""
        self._write(("compiled", key, _compiler_versions()), pickle.dumps(serialize(compiled)))

    def read_measured(self, key: object) -> Measured | None:
        """What was measured before."""
        try:
            return Measured.from_json(self._file(("measured", key, _compiler_versions())).read_text())
        except OSError:
            return None

    def write_measured(self, key: object, measured: Measured) -> None:
        """Keep what was measured."""
        self._write(("measured", key, _compiler_versions()), measured.as_json().encode())

    def _file(self, key: object) -> Path:
        return self._directory / hashlib.sha256(self._model + repr(key).encode()).hexdigest()


def named_call(exported: Exported) -> Callable[..., Any]:
    """Calls a traced program under the name of its function, by which profiles and dumps tell programs apart."""

    def call(*args: Any) -> Any:
        return exported.call(*args)

    call.__name__ = call.__qualname__ = exported.fun_name
    return call


def export(jitted: Any, args: Iterable[Any], platform: str | None = None) -> Exported | None:
    """A jitted function for arguments of these shapes, as it can be written. None if jax cannot write it. platform: to
    run on, by default that of this process."""
    platforms = platform and [{"gpu": "cuda"}.get(platform, platform)]
    try:
        return jax.export.export(jitted, disabled_checks=CUSTOM_CALLS, platforms=platforms)(*args)
    except ValueError as error:
        _warn_once(f"programs are traced at every start: {error}")
        return None


@functools.cache
def _register_trees() -> None:
    for tree in (Batch, KVCache, DeviceState, StepOutput, SamplerOutput, QuantizedArray):
        jax.export.register_pytree_node_serialization(
            tree,
            serialized_name=f"{tree.__module__}.{tree.__qualname__}",
            serialize_auxdata=lambda static: repr(static).encode(),  # tuples of numbers
            deserialize_auxdata=lambda data: ast.literal_eval(data.decode()),
        )


@functools.cache
def source_digest() -> str:
    """Of this package's code, and the versions of the packages that trace it."""
    digest = hashlib.sha256(" ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax")).encode())
    folders = {Path(__file__).parent.parent, Path(str(kernels.__file__)).parent}
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _compiler_versions() -> tuple[str, ...]:
    """Of the plugins that compile for accelerators, where they are installed."""
    found = []
    for name in ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return tuple(found)


def _remove_oldest(directory: Path) -> None:
    """Leave the programs of the versions of the code that were written to last."""
    folders = sorted((folder for folder in directory.iterdir() if folder.is_dir()), key=lambda f: f.stat().st_mtime)
    for folder in folders[:-KEPT_SOURCES]:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
