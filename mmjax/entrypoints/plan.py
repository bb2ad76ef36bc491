"""What a model needs on a slice of accelerators: its programs, compiled for that slice on a machine that has none."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from mmjax import sharding
from mmjax.config import EngineArgs
from mmjax.engine.hlo import collectives
from mmjax.engine.measured import Measured, ProgramUsage
from mmjax.engine.memory import EngineMemory
from mmjax.engine.model_runner import ModelRunner
from mmjax.engine.programs import AllocateState, Decode, Encode, Prefill, ProgramKey, PromptLogprobs
from mmjax.entrypoints.load_model import start_jax
from mmjax.entrypoints.replica import Replica
from mmjax.entrypoints.topology import Topology
from mmjax.loader.checkpoint import Checkpoint, find_model
from mmjax.loader.params import EMBEDDING, TEXT, param_specs

CONTEXT = 1024  # tokens of each sequence in the bounds of decoding


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """One program, on one device. collectives: of a decode step, or of the whole program; by kind."""

    name: str
    seconds: float
    temp_bytes: int
    output_bytes: int
    code_bytes: int
    collectives: dict[str, int]
    gathered_bytes: int


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time that a step can take: to read the bytes that it needs, and to compute. Never reached."""

    name: str
    read_ms: float
    compute_ms: float
    tokens_per_s: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """All bytes are of one device. reason: why the model does not fit.

    cache_tokens: of all sequences together, on one replica. max_batch: sequences of max_model_len tokens that the cache
    holds, at most max_num_seqs. padding: bytes that only padding takes: of the weights, and of one token of the cache.
    """

    model: str
    topology: str
    devices: int
    replicas: int
    fits: bool
    reason: str
    memory_bytes: int
    weight_bytes: int
    cache_bytes: int = 0
    state_bytes: int = 0
    temp_bytes: int = 0
    code_bytes: int = 0
    max_model_len: int = 0
    cache_tokens: int = 0
    cache_bytes_per_token: int = 0
    max_batch: int = 0
    longest: int = 0
    padding: dict[str, int] = dataclasses.field(default_factory=dict)
    bounds: list[Bound] = dataclasses.field(default_factory=list)
    programs: list[CompiledProgram] = dataclasses.field(default_factory=list)
    serve: str = ""


@dataclasses.dataclass(frozen=True)
class _Device:
    """What a device would say about its memory."""

    limit: int
    used: int

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.limit, "bytes_in_use": self.used}


def make_plan(model: str, args: EngineArgs, topology: Topology, save: Path | None = None) -> Plan:
    """The plan of a model for a slice. model: the name that the plan gives it; `args.model` is a directory with
    config.json, or a hub id. save: a directory for the executables of every program, which a start with it as
    compilation cache loads. This process no longer uses jax's own cache. ValueError for an unknown model or a missing
    compiler."""
    start_jax(args, save)
    # jax's cache can write programs for absent devices, but not read them; and those that it reads on a CPU cannot be
    # kept: serialized again, they lack their functions
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    directory = find_model(args.model, revision=args.revision, token=args.hf_token, cache_dir=args.download_dir)
    checkpoint = Checkpoint.open(str(directory), token=args.hf_token, overrides=args.hf_overrides)
    return _Planner(model, args, topology, checkpoint).plan(keep=save is not None)


@dataclasses.dataclass(frozen=True)
class _Planner:
    model: str
    args: EngineArgs
    topology: Topology
    checkpoint: Checkpoint

    @functools.cached_property
    def replica(self) -> Replica:
        """The first replica."""
        devices = self.topology.devices()[: self.args.tensor_parallel_size]
        args = dataclasses.replace(self.args, load_format="dummy")
        limits = args.limits(self.checkpoint.processor(None).mm_limits)
        return Replica(args, self.checkpoint, sharding.mesh(devices), limits)

    @property
    def _limit(self) -> int:
        chip = self.topology.chip
        return int(chip.memory_bytes * (self.args.gpu_memory_utilization if chip.platform == "gpu" else 1))

    @functools.cached_property
    def _weights(self) -> dict[str, int]:
        """Bytes of each parameter on a device, by path."""
        return {path: sum(map(_device_bytes, jax.tree.leaves(x))) for path, x in self.replica.abstract_params.items()}

    def plan(self, *, keep: bool) -> Plan:
        """keep: whether to compile every program, and keep the executables."""
        base = Plan(
            model=self.model,
            topology=self.topology.name,
            devices=self.topology.num_devices,
            replicas=self.args.data_parallel_size,
            fits=False,
            reason="",
            memory_bytes=self._limit,
            weight_bytes=sum(self._weights.values()),
        )
        if self._limit and base.weight_bytes > self._limit:
            return dataclasses.replace(base, reason="the weights alone are larger than the memory")
        try:
            measured, runner = self.replica.measure(_Device(self._limit, 0))
            memory = self.replica.memory(self._device, measured)
        except ValueError as error:
            return dataclasses.replace(base, reason=str(error))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return dataclasses.replace(base, reason=str(error).partition("\n")[0])
        programs = list(self._programs(runner))
        if keep:
            self._compile_all(memory, measured)
        return dataclasses.replace(base, fits=True, programs=programs, **self._sizes(memory, measured))

    @property
    def _device(self) -> Any:
        return _Device(self._limit, sum(self._weights.values()))

    def _programs(self, runner: ModelRunner) -> Iterator[CompiledProgram]:
        for key in runner.sizing_keys():
            compiled = runner.program(key)
            usage, exchanged = ProgramUsage.of(compiled.memory_analysis()), collectives(compiled.as_text() or "")
            gathers = [each for each in (*exchanged.once, *exchanged.per_iteration) if each.kind == "all-gather"]
            yield CompiledProgram(
                name=_name(key),
                seconds=round(runner.compile_seconds.get(key, 0.0), 1),
                temp_bytes=usage.temp_bytes,
                output_bytes=usage.output_bytes,
                code_bytes=usage.code_bytes,
                collectives=dict(exchanged.counts()),
                gathered_bytes=max((each.num_bytes for each in gathers), default=0),
            )

    def _compile_all(self, memory: EngineMemory, measured: Measured) -> None:
        """Compile every program of a start with these sizes, and keep them."""
        runner = self.replica.runner(self.replica.abstract_params, self._served(memory), measured)
        runner.keep_compiled = True
        for key in (AllocateState(), *runner.program_keys()):
            runner.program(key)

    def _served(self, memory: EngineMemory) -> EngineMemory:
        """The sizes of a start with the flags of `_serve`."""
        args = dataclasses.replace(
            self.replica.args, kv_cache_memory_bytes=self._cache_bytes(memory), max_model_len=memory.max_model_len
        )
        return dataclasses.replace(self.replica, args=args).memory(self._device)

    def _cache_bytes(self, memory: EngineMemory) -> int:
        return memory.num_blocks * self.replica.block_bytes

    # -- figures -----------------------------------------------------------------------------------------------------

    def _sizes(self, memory: EngineMemory, measured: Measured) -> dict[str, Any]:
        spec, block_size = self.replica.spec, memory.buckets.block_size
        tokens = (memory.num_blocks - 1) * block_size
        per_sequence = -(-memory.max_model_len // block_size) + memory.buckets.cross_blocks_per_seq
        return {
            "cache_bytes": self._cache_bytes(memory),
            "state_bytes": measured.state_bytes,
            "temp_bytes": measured.temp_bytes,
            "code_bytes": measured.code_bytes,
            "max_model_len": memory.max_model_len,
            "cache_tokens": tokens,
            "cache_bytes_per_token": self._token_bytes(memory),
            "max_batch": min((memory.num_blocks - 1) // per_sequence, memory.buckets.seq_buckets[-1]),
            "longest": min(tokens, spec.max_positions),
            "padding": self._padding(memory),
            "bounds": list(self._bounds(memory)) if self.topology.chip.bandwidth else [],
            "serve": self._serve(memory),
        }

    def _token_bytes(self, memory: EngineMemory) -> int:
        return self.replica.block_bytes // memory.buckets.block_size

    def _padding(self, memory: EngineMemory) -> dict[str, int]:
        """Of the weights: axes that do not divide over the mesh, and key heads that devices repeat. Of the cache: the
        same heads, and what the kernels add to heads."""
        replica, spec = self.replica, self.replica.config.spec
        _, real = param_specs(replica.checkpoint.family, replica.config)
        padded = {path: sum(x.size for x in jax.tree.leaves(value)) for path, value in replica.abstract_params.items()}
        share = {path: math.prod(real[path].shape) / padded[path] for path in real if padded[path]}
        itemsize = jax.numpy.dtype(replica.precision.kv_dtype).itemsize
        token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * itemsize // self.args.tensor_parallel_size
        weights = sum(self._weights[path] * (1 - min(part, 1)) for path, part in share.items())
        return {"weight_bytes": int(weights), "cache_bytes_per_token": max(self._token_bytes(memory) - token, 0)}

    def _bounds(self, memory: EngineMemory) -> Iterator[Bound]:
        """By the bytes of the weights that a step reads and of the live cache, and by the products with the weights and
        of attention."""
        tp = self.args.tensor_parallel_size
        for batch in sorted({1, 32, memory.buckets.seq_buckets[-1]}):
            read = sum(self._read_bytes(batch).values()) + batch * CONTEXT * self._token_bytes(memory)
            compute = batch * self._flops(CONTEXT) / tp
            yield self._bound(f"decode, {batch} x {CONTEXT} tokens", read, compute, batch)
        tokens = memory.buckets.token_buckets[-1]
        read = sum(self._read_bytes(tokens).values())
        yield self._bound(f"prefill, {tokens} tokens", read, tokens * self._flops(tokens // 2) / tp, tokens)

    def _bound(self, name: str, read: float, compute: float, tokens: int) -> Bound:
        chip = self.topology.chip
        read_s, compute_s = read / chip.bandwidth, compute / chip.flops
        return Bound(name, read_s * 1e3, compute_s * 1e3, tokens / max(read_s, compute_s))

    def _read_bytes(self, tokens: int) -> dict[str, float]:
        """The weights' bytes that a step of so many tokens reads on a device: of the embedding only rows, unless it is
        the head too; of experts those that tokens are routed to, if all are as likely."""
        has_head = f"{TEXT}head" in self._weights
        read = {path: float(size) for path, size in self._weights.items() if path.startswith(TEXT)}
        if has_head:
            read.pop(EMBEDDING, None)
        for path in read:
            if share := self._expert_share(path):
                read[path] *= 1 - (1 - share) ** tokens
        return read

    def _flops(self, context: int) -> float:
        """Of one token that attends to so many others, on all devices together."""
        total = 0.0
        for path in self._read_bytes(1):
            shapes = [x.shape for x in jax.tree.leaves(self.replica.abstract_params[path])][:1]
            size = math.prod(shapes[0])
            total += 2 * size * (self._expert_share(path) or 1)
            if re.search(r"attn\.o$|layers\.\d+\.o$", path):
                total += 4 * context * size / shapes[0][-1]  # scores, and the sum of values
        return total

    def _expert_share(self, path: str) -> float:
        """The share of a parameter's experts that one token is routed to; 0 for a parameter without experts."""
        if ".experts." not in path or path.endswith("router"):
            return 0.0
        moe = self.replica.config.text.moe  # type: ignore[attr-defined]
        return float(moe.top_k / moe.num_experts)

    def _serve(self, memory: EngineMemory) -> str:
        """The command that starts a server with these sizes: what was given, and what was found."""
        found = {"max_model_len": memory.max_model_len, "kv_cache_memory_bytes": self._cache_bytes(memory)}
        words = ["mmjax serve", shlex.quote(self.model), f"--tensor-parallel-size {self.args.tensor_parallel_size}"]
        for field in dataclasses.fields(EngineArgs):
            value = found.get(field.name, getattr(self.args, field.name))
            default = {} if field.default is dataclasses.MISSING else field.default
            if value != default and field.name not in ("model", "load_format", "tensor_parallel_size"):
                words.append(_flag(field.name, value))
        return " ".join(words)


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {shlex.quote(json.dumps(value) if isinstance(value, dict | list) else str(value))}"


def _device_bytes(shape: Any) -> int:
    return math.prod(shape.sharding.shard_shape(shape.shape)) * int(shape.dtype.itemsize)


def _name(key: ProgramKey) -> str:
    match key:
        case Decode(seqs, steps):
            return f"decode of {seqs} sequences, {steps} steps"
        case Prefill(tokens):
            return f"prefill of {tokens} tokens"
        case Encode(name, size):
            return f"encode: {name}, {size} inputs"
        case PromptLogprobs(tokens):
            return f"log-probabilities of {tokens} tokens"
    return repr(key)
