"""The device's state and its compiled programs. No other file of the engine calls jit or donates buffers."""

from __future__ import annotations

import atexit
import concurrent.futures
import dataclasses
import functools
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled, Lowered

from mmjax import kernels, sharding
from mmjax.batch import KVCache
from mmjax.engine import sampler
from mmjax.engine.compiler_options import compiler_options
from mmjax.engine.layouts import chosen_layouts, freed, layouts_of, placement, with_layouts
from mmjax.engine.measured import Layouts, Measured, ProgramUsage
from mmjax.engine.memory import EngineMemory, kv_block_shape
from mmjax.engine.program_cache import ProgramCache, export, named_call
from mmjax.engine.programs import (
    Align,
    AllocateState,
    Decode,
    DeviceState,
    Encode,
    Params,
    Prefill,
    ProgramInputs,
    ProgramKey,
    PromptLogprobs,
    SetLogitBiases,
    SetSamplingRow,
    StepFunctions,
    StepOutput,
    WriteEmbeds,
)
from mmjax.engine.sampling_state import all_plain_greedy
from mmjax.loader.params import ProgressBar
from mmjax.loader.precision import Precision
from mmjax.nn.attention import kv_cache_axes
from mmjax.nn.weight import QuantizedArray, WeightValue
from mmjax.spec import ModelSpec

logger = logging.getLogger(__name__)

Array = jax.Array


class ModelRunner:
    """Compiles the programs of every bucket and runs them. One dispatch is one call; results are device arrays."""

    def __init__(
        self,
        graph: nnx.GraphDef[Any],
        params: Mapping[str, WeightValue],
        spec: ModelSpec,
        memory: EngineMemory,
        mesh: Mesh,
        precision: Precision,
        *,
        platform: str,
        layouts: Layouts = (),
    ) -> None:
        """layouts: of the parameters, if the compiler chose them."""
        self.paths = tuple(params)
        self.params = list(params.values())
        self.spec = spec
        self.buckets = memory.buckets
        self.mesh = mesh
        self.dtype = jnp.dtype(precision.compute_dtype)
        self.compiles = 0
        self.compiles_after_warmup = 0
        self.compile_seconds: dict[ProgramKey, float] = {}
        self.warm = False
        self.keep_compiled = False
        """Whether the cache of programs keeps executables, not only traced programs."""
        self._programs: dict[ProgramKey, Compiled] = {}
        self.ready = memory.buckets
        """`buckets` without those whose programs are still to be compiled; the largest are always there."""
        self._compiling_behind: threading.Thread | None = None
        self._stop_compiling = threading.Event()
        self._replicated = NamedSharding(mesh, P())
        self.functions = StepFunctions(
            graph,
            self.paths,
            spec,
            self.buckets,
            self._replicated,
            # On the CPU, checking after each step costs nothing, and in the CUDA graph of one GPU (compiler_options.py)
            # the device checks. Elsewhere the host would wait for the result, so the loop has a fixed length.
            stops_early=platform == "cpu" or (platform == "gpu" and mesh.size == 1),
        )
        self.platform = platform
        # Up to this many sequences have decode programs of their own if none asks for more than greedy sampling.
        # Without the sampler's branches a step of one takes 0.05 ms less on an H200, but a step of 256 no less. Where
        # the host waits for each step anyway, they would only be more to compile.
        self.max_greedy_seqs = 4 if platform == "gpu" else 0
        abstract_state = self._abstract_state(memory, precision.kv_dtype)
        shapes = with_layouts(jax.tree.map(_shape, self.params), layouts)
        self._inputs = ProgramInputs(self.functions, shapes, abstract_state, self.dtype)
        self.program_cache = self._program_cache()
        self.is_abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(self.params))
        """Whether there are only the shapes of the parameters. Programs are then compiled, but none can run, and the
        mesh may be of a topology that this machine does not have."""
        self.state = abstract_state
        if not self.is_abstract:
            self._make_state = self._compile(AllocateState())  # kept: waking up compiles nothing
            self.state = self._make_state()

    def _program_cache(self) -> ProgramCache | None:
        """Beside jax's own cache, if that is a local directory."""
        directory = jax.config.values["jax_compilation_cache_dir"]
        if not directory or "://" in directory:
            return None
        functions, device = self.functions, self.mesh.devices.flat[0]
        arrays = jax.tree.leaves((self._inputs.params, self._inputs.state))
        return ProgramCache(
            Path(directory),
            (
                functions.graph,
                # as text: pickles of equal values differ if one of them has two references to an equal part
                repr((functions.paths, functions.spec, functions.buckets, functions.stops_early)),
                repr([(x.shape, str(x.dtype), repr(x.sharding)) for x in arrays]),
                repr([type(value).__name__ for value in self._inputs.params]),
                repr((str(self.dtype), self.platform, device.device_kind, self.mesh.size)),
                # of this machine, which may plan for another one
                self.platform == "cpu" and kernels.multiplies_bfloat16(),
            ),
        )

    def _abstract_state(self, memory: EngineMemory, kv_dtype: str) -> DeviceState:
        """The shapes and shardings of the state."""
        spec, platform = self.spec, self.platform
        block, dtype = kv_block_shape(spec, self.buckets.block_size, kv_dtype, platform)

        def cache(blocks: int) -> Any:
            in_cache = sharding.named_sharding(self.mesh, kv_cache_axes(platform))
            return jax.ShapeDtypeStruct((blocks, *block), dtype, sharding=in_cache)

        k_blocks = spec.num_layers * memory.num_blocks
        v_blocks = 0 if kernels.kv_in_one_array(platform) else k_blocks
        rows, vocab = self.buckets.num_rows, 0 if spec.pooling else spec.vocab_size

        def replicated(shape: tuple[int, ...], dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)

        return DeviceState(
            kv_cache=KVCache(cache(k_blocks), cache(v_blocks)),
            mm_embeds=replicated((max(memory.num_mm_rows, 1), max(spec.mm_embed_dim, 1)), self.dtype),
            last_token=replicated((rows,), jnp.int32),
            stopped=replicated((rows,), jnp.bool_),
            token_counts=replicated((rows, vocab), jnp.int32),
            logit_bias=replicated((rows, vocab), jnp.float32),
        )

    @property
    def param_shapes(self) -> Params:
        """The parameters' shapes, dtypes and shardings, in the order of `paths`."""
        return self._inputs.params

    # -- sleeping ----------------------------------------------------------------------------------------------------

    def take_params(self, *, keep: bool) -> list[Any] | None:
        """Free the parameters on the device. Returns copies of them on the host if they are to be kept."""
        copy = _shards_to_host if self.mesh.is_multi_process else jax.device_get
        host = copy(self.params) if keep else None
        _delete(self.params)
        self.params = []
        return host

    def restore_params(self, host: list[Any]) -> None:
        """Put the parameters that `take_params` returned, or the same ones read again, back on the device. The compiled
        programs take them as before."""
        self.params = jax.tree.map(_to_devices, self.param_shapes, host)

    def drop_state(self) -> None:
        """Free the state on the device: the KV cache and all else. No sequence may be running."""
        _delete(self.state)

    def restore_state(self) -> None:
        """Allocate the state anew, as it was at the start."""
        self.state = self._make_state()

    # -- compiling ---------------------------------------------------------------------------------------------------

    def program(self, key: ProgramKey) -> Compiled:
        """The compiled program of this key, compiled now if necessary."""
        if key not in self._programs:
            self.compiles += 1
            if self.warm:
                self.compiles_after_warmup += 1
                logger.warning("compiling %s after warm-up", key)
            self._programs[key] = self._compile(key)
        return self._programs[key]

    def _compile(self, key: ProgramKey, free: Sequence[bool] = ()) -> Compiled:
        """free: see `_lower`."""
        cache = self.program_cache
        name = (key, tuple(free), layouts_of(self._inputs.params))
        if cache and (known := cache.read_compiled(name, tuple(self.mesh.devices.flat))):
            return known
        # float32 is chosen for exact results, so no TF32
        precision = "highest" if self.dtype == jnp.float32 else "default"
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(precision):
            lowered = self._lower(key, free)
        options = compiler_options(
            self.platform,
            decode=isinstance(key, Decode),
            int8=any(isinstance(value, QuantizedArray) for value in self._inputs.params),
            num_devices=self.mesh.size,
        )
        start = time.perf_counter()
        compiled = lowered.compile(compiler_options=dict(options))
        self.compile_seconds[key] = time.perf_counter() - start
        if cache and self.keep_compiled:
            cache.write_compiled(name, compiled)
        return compiled

    def _lower(self, key: ProgramKey, free: Sequence[bool] = ()) -> Lowered:
        """free: for each array of the parameters, whether the compiler chooses its layout."""
        program = key.program(self._inputs)
        jit = functools.partial(jax.jit, donate_argnums=program.donate, out_shardings=program.outs)
        cache = self.program_cache
        traced = cache and cache.read(key)
        if cache and not traced:
            traced = export(jit(program.fn), program.args, self.platform if self.is_abstract else None)
            if traced:
                cache.write(key, traced)
        fn = named_call(traced) if traced else program.fn
        if not any(free):
            return jit(fn).lower(*program.args)
        args, formats = freed(program.args, free)
        return jit(fn, in_shardings=formats).lower(*args)

    def choose_layouts(self) -> None:
        """Let the compiler choose the layouts of the parameters, and compile every program for these. For runners that
        are abstract.

        The decode loop chooses first, because it reads the language model in every step; then each encoder chooses for
        its own. In the default layouts, the loop of a 3B model on a v5e copied 3.7 GiB of weights before it began.
        """
        assert self.is_abstract
        layouts = layouts_of(self._inputs.params)
        for key in self.sizing_keys():
            free = [layout is None for layout in layouts]
            if any(free) and not isinstance(key, PromptLogprobs):
                self._programs[key] = compiled = self._compile(key, free)
                layouts = chosen_layouts(compiled, layouts)
                self._inputs = dataclasses.replace(self._inputs, params=with_layouts(self._inputs.params, layouts))

    def measure(self) -> Measured:
        """What the largest programs need, compiled now if necessary."""
        keys = self.sizing_keys()
        with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
            compiled = list(pool.map(self.program, keys))
        state = [self.state.mm_embeds, self.state.token_counts, self.state.logit_bias]
        usages = [ProgramUsage.of(program.memory_analysis()) for program in compiled]
        return Measured(
            state_bytes=sum(math.prod(x.shape) * x.dtype.itemsize for x in state),
            temp_bytes=max(usage.temp_bytes + usage.output_bytes for usage in usages),
            code_bytes=sum(usage.code_bytes for usage in usages),
            layouts=layouts_of(self._inputs.params),
        )

    def sizing_keys(self) -> list[ProgramKey]:
        """The programs that need most memory, one of each kind; first the one that runs most often."""
        keys = [key for key in self.program_keys() if self._is_largest(key)]
        decodes = [key for key in keys if isinstance(key, Decode) and not key.greedy]
        longest = [max(decodes, key=lambda key: key.steps)] if decodes else []
        return [*longest, *(key for key in keys if isinstance(key, Prefill | Encode | PromptLogprobs))]

    def program_keys(self) -> list[ProgramKey]:
        """The keys of all programs, the slowest to compile first."""
        buckets = self.buckets
        prefills = [Prefill(tokens) for tokens in reversed(buckets.token_buckets)]
        encodes = [
            Encode(name, size) for name in self.spec.encoders for size in reversed(buckets.encoder_buckets[name])
        ]
        writes = [WriteEmbeds(buckets.embed_rows)] if buckets.embed_rows else []
        if self.spec.pooling:
            return [*prefills, *encodes, *writes]
        loops = sorted({self._loop_steps(1), self._loop_steps(buckets.num_decode_steps)})
        decodes = [
            Decode(seqs, steps, greedy)
            for seqs in reversed(buckets.seq_buckets)
            for steps in loops
            for greedy in ((False, True) if seqs <= self.max_greedy_seqs else (False,))
        ]
        biases = [SetLogitBiases(rows) for rows in buckets.seq_buckets]
        logprobs = [PromptLogprobs(tokens) for tokens in buckets.token_buckets]
        aligns = [Align(name) for name in self.spec.encoders] if self.spec.num_alignment_heads else []
        return [*prefills, *decodes, *encodes, *aligns, *writes, *biases, *logprobs, SetSamplingRow()]

    def _loop_steps(self, max_steps: int) -> int:
        """The length of the decode loop for at most this many steps."""
        return 1 if max_steps == 1 and not self.functions.stops_early else self.buckets.num_decode_steps

    def warm_up(self, progress: ProgressBar, *, behind: bool = False) -> float:
        """Compile all programs. Returns the seconds it took.

        behind: only those of the largest buckets, which can serve any request; the others follow on a thread, and are
        used as soon as they are there. Not on a GPU: XLA tries kernels there while it compiles, in memory that the
        requests need. An H200 ran out of it.
        """
        start = time.perf_counter()
        behind = behind and self.platform != "gpu"
        keys = [key for key in self.program_keys() if not behind or self._is_largest(key)]
        with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:  # XLA compiles without holding the GIL
            for _ in progress(pool.map(self.program, keys), len(keys)):
                pass
        self._update_ready()
        if behind:
            self._compiling_behind = threading.Thread(target=self._compile_behind, name="compile", daemon=True)
            self._compiling_behind.start()
            atexit.register(self.stop_compiling, wait=True)  # XLA does not survive the end of the process
        else:
            self.warm = True
        return time.perf_counter() - start

    def _compile_behind(self) -> None:
        """Compile what `warm_up` has left, small programs first."""
        start = time.perf_counter()
        keys = [key for key in reversed(self.program_keys()) if key not in self._programs]

        def compile_one(key: ProgramKey) -> None:
            if not self._stop_compiling.is_set():
                self.program(key)
                self._update_ready()

        try:
            # on the CPU, requests need the other cores
            with concurrent.futures.ThreadPoolExecutor(max_workers=1 if self.platform == "cpu" else 4) as pool:
                list(pool.map(compile_one, keys))
        except Exception:
            logger.exception("a program cannot be compiled; larger ones serve its requests")
        if not self._stop_compiling.is_set():
            self.warm = True
            logger.info("compiled the other %d programs in %.1f s", len(keys), time.perf_counter() - start)
        atexit.unregister(self.stop_compiling)

    def stop_compiling(self, *, wait: bool = False) -> None:
        """Compile no further program behind requests. wait: until the one that is being compiled is done."""
        self._stop_compiling.set()
        if wait and self._compiling_behind is not None:
            self._compiling_behind.join()

    def _is_largest(self, key: ProgramKey) -> bool:
        match _bucket_of(key):
            case ("tokens", size):
                return size == self.buckets.token_buckets[-1]
            case ("seqs", size):
                return size == self.buckets.seq_buckets[-1]
            case ("inputs", name, size):
                return size == self.buckets.encoder_buckets[name][-1]
        return True

    def _update_ready(self) -> None:
        """Offer the buckets all of whose programs are compiled."""
        missing = {_bucket_of(key) for key in self.program_keys() if key not in self._programs}
        self.ready = dataclasses.replace(
            self.buckets,
            token_buckets=tuple(size for size in self.buckets.token_buckets if ("tokens", size) not in missing),
            seq_buckets=tuple(size for size in self.buckets.seq_buckets if ("seqs", size) not in missing),
            encoder_buckets={
                name: tuple(size for size in sizes if ("inputs", name, size) not in missing)
                for name, sizes in self.buckets.encoder_buckets.items()
            },
        )

    # -- running -----------------------------------------------------------------------------------------------------

    def wait(self, calls: Sequence[Future[Any]]) -> None:
        """Return once these calls of the methods below have returned. Raises what they raised."""
        for call in calls:
            call.result()

    def prefill(self, tokens: int, vector: np.ndarray) -> StepOutput:
        """Dispatch a prefill of a bucket of T tokens."""
        self.state, output = self.program(Prefill(tokens))(self.params, self.state, vector)
        return output

    def decode(self, seqs: int, vector: np.ndarray, max_steps: int) -> StepOutput:
        """Dispatch at most `max_steps` decode steps: sampled [>= max_steps, S], -1 where a row had stopped."""
        greedy = seqs <= self.max_greedy_seqs and all_plain_greedy(self.buckets.decode_layout(seqs).views(vector))
        program = self.program(Decode(seqs, self._loop_steps(max_steps), greedy))
        self.state, output = program(self.params, self.state, vector)
        return output

    def encode(self, name: str, num_inputs: int, features: Mapping[str, np.ndarray], dest: np.ndarray) -> None:
        """Dispatch an encoding of media by the named encoder."""
        self.state = self.program(Encode(name, num_inputs))(self.params, self.state, dict(features), dest)

    def align(self, name: str, features: Mapping[str, np.ndarray], token_ids: np.ndarray) -> Array:
        """Dispatch the alignment scores f32[A, T, U] of one transcript; T is the model's length."""
        padded = np.zeros(self.spec.max_positions, np.int32)
        padded[: len(token_ids)] = token_ids
        scores: Array = self.program(Align(name))(self.params, dict(features), padded)
        return scores

    def write_embeds(self, embeds: np.ndarray, dest: np.ndarray) -> None:
        """Dispatch a write of embeddings f32[N, W] that need no encoder."""
        self.state = self.program(WriteEmbeds(len(embeds)))(self.state, embeds, dest)

    def prompt_logprobs(self, prefill: StepOutput, targets: np.ndarray) -> sampler.PromptLogprobs:
        """Dispatch the log-probabilities of targets i32[T], each following the prefill's token at the same index."""
        program = self.program(PromptLogprobs(len(targets)))
        logprobs: sampler.PromptLogprobs = program(self.params, prefill.hidden, targets)
        return logprobs

    def set_sampling_row(self, row: int, counts: np.ndarray | None, bias: np.ndarray | None) -> None:
        """Write a row of the sampling tables."""
        vocab = self.spec.vocab_size
        counts = np.zeros(vocab, np.int32) if counts is None else counts
        bias = np.zeros(vocab, np.float32) if bias is None else bias
        self.state = self.program(SetSamplingRow())(self.state, np.int32(row), counts, bias)

    def set_logit_biases(self, rows: np.ndarray, biases: np.ndarray) -> None:
        """Write the logit biases f32[S, V] of rows i32[S], where S is a bucket."""
        self.state = self.program(SetLogitBiases(len(rows)))(self.state, rows, biases)


def _bucket_of(key: ProgramKey) -> tuple[Any, ...] | None:
    """The bucket that a program is for: of tokens, of sequences, or of the inputs of an encoder. None for any."""
    match key:
        case Prefill(size) | PromptLogprobs(size):
            return "tokens", size
        case Decode(size) | SetLogitBiases(size):
            return "seqs", size
        case Encode(name, size):
            return "inputs", name, size
    return None


def _shape(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


@dataclasses.dataclass(frozen=True)
class _HostShards:
    """A copy of those parts of an array that are on this host's devices. No tree to jax, but a leaf."""

    parts: Sequence[tuple[jax.Device, np.ndarray]]


def _shards_to_host(tree: Any) -> Any:
    return jax.tree.map(
        lambda array: _HostShards([(s.device, np.array(s.data)) for s in array.addressable_shards]), tree
    )


def _to_devices(shape: jax.ShapeDtypeStruct, host: np.ndarray | _HostShards | Array) -> Array:
    """The array that was copied to the host; one that is on the devices stays."""
    if isinstance(host, jax.Array):
        return host
    if isinstance(host, _HostShards):
        parts = [jax.device_put(part, placement(shape, device)) for device, part in host.parts]
        return jax.make_array_from_single_device_arrays(shape.shape, shape.sharding, parts)
    return jax.device_put(host, placement(shape))


def _delete(tree: Any) -> None:
    for array in jax.tree.leaves(tree):
        array.delete()
