"""The device's state and its compiled programs. No other file of the engine calls jit or donates buffers."""

from __future__ import annotations

import concurrent.futures
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mmjax import sharding
from mmjax.batch import KVCache
from mmjax.engine import sampler
from mmjax.engine.compiler_options import compiler_options
from mmjax.engine.memory import EngineMemory, kv_block_shape
from mmjax.engine.programs import (
    Decode,
    DeviceState,
    Encode,
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
Compiled = Callable[..., Any]


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
    ) -> None:
        self.paths = tuple(params)
        self.params = list(params.values())
        self.spec = spec
        self.buckets = memory.buckets
        self.mesh = mesh
        self.dtype = jnp.dtype(precision.compute_dtype)
        self.compiles = 0
        self.compiles_after_warmup = 0
        self.warm = False
        self._programs: dict[ProgramKey, Compiled] = {}
        self._replicated = NamedSharding(mesh, P())
        self.functions = StepFunctions(
            graph,
            self.paths,
            spec,
            self.buckets,
            self._replicated,
            # On the CPU, checking after each step costs nothing. On an accelerator the host would wait for the result,
            # so the loop has a fixed length there (on an H100 both take the same 2.9 ms at batch 1).
            stops_early=platform == "cpu",
        )
        self.platform = platform
        # Decode programs of their own for rows that ask for no sampling: without its branches a step has fewer kernels.
        # Where the host waits for each step anyway, they would only be more to compile.
        self.greedy_programs = platform == "gpu"
        self.state = self._initial_state(memory, precision.kv_dtype, platform)

    def _initial_state(self, memory: EngineMemory, kv_dtype: str, platform: str) -> DeviceState:
        spec, buckets = self.spec, self.buckets
        block, dtype = kv_block_shape(spec, buckets.block_size, kv_dtype, platform, sharding.tp_size(self.mesh))
        cache_shape = (spec.num_layers * memory.num_blocks, *block)
        cache_sharding = sharding.named_sharding(self.mesh, kv_cache_axes(platform))
        rows, vocab = buckets.num_rows, 0 if spec.pooling else spec.vocab_size

        def zeros(shape: tuple[int, ...], dtype: DTypeLike, placement: NamedSharding = self._replicated) -> Array:
            return jnp.zeros(shape, dtype, device=placement)

        return DeviceState(
            kv_cache=KVCache(zeros(cache_shape, dtype, cache_sharding), zeros(cache_shape, dtype, cache_sharding)),
            mm_embeds=zeros((max(memory.num_mm_rows, 1), max(spec.mm_embed_dim, 1)), self.dtype),
            last_token=zeros((rows,), jnp.int32),
            stopped=zeros((rows,), jnp.bool_),
            token_counts=zeros((rows, vocab), jnp.int32),
            logit_bias=zeros((rows, vocab), jnp.float32),
        )

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

    def _compile(self, key: ProgramKey) -> Compiled:
        program = key.program(ProgramInputs(self.functions, self.params, self.state, self.dtype))
        # float32 is chosen for exact results, so no TF32
        precision = "highest" if self.dtype == jnp.float32 else "default"
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(precision):
            jitted = jax.jit(program.fn, donate_argnums=program.donate, out_shardings=program.outs)
            lowered = jitted.lower(*program.args)
        options = compiler_options(
            self.platform,
            decode=isinstance(key, Decode),
            int8=any(isinstance(value, QuantizedArray) for value in self.params),
            num_devices=self.mesh.size,
        )
        return lowered.compile(compiler_options=dict(options))

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
        modes = (False, True) if self.greedy_programs else (False,)
        decodes = [
            Decode(seqs, steps, greedy) for seqs in reversed(buckets.seq_buckets) for steps in loops for greedy in modes
        ]
        biases = [SetLogitBiases(rows) for rows in buckets.seq_buckets]
        logprobs = [PromptLogprobs(tokens) for tokens in buckets.token_buckets]
        return [*prefills, *decodes, *encodes, *writes, *biases, *logprobs, SetSamplingRow()]

    def _loop_steps(self, max_steps: int) -> int:
        """The length of the decode loop for at most this many steps."""
        return 1 if max_steps == 1 and not self.functions.stops_early else self.buckets.num_decode_steps

    def warm_up(self, progress: ProgressBar) -> float:
        """Compile all programs. Returns the seconds it took."""
        start = time.perf_counter()
        keys = self.program_keys()
        with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:  # XLA compiles without holding the GIL
            for _ in progress(pool.map(self.program, keys), len(keys)):
                pass
        self.warm = True
        return time.perf_counter() - start

    # -- running -----------------------------------------------------------------------------------------------------

    def prefill(self, tokens: int, vector: np.ndarray) -> StepOutput:
        """Dispatch a prefill of a bucket of T tokens."""
        self.state, output = self.program(Prefill(tokens))(self.params, self.state, vector)
        return output

    def decode(self, seqs: int, vector: np.ndarray, max_steps: int) -> StepOutput:
        """Dispatch at most `max_steps` decode steps: sampled [>= max_steps, S], -1 where a row had stopped."""
        greedy = self.greedy_programs and all_plain_greedy(self.buckets.decode_layout(seqs).views(vector))
        program = self.program(Decode(seqs, self._loop_steps(max_steps), greedy))
        self.state, output = program(self.params, self.state, vector)
        return output

    def encode(self, name: str, num_inputs: int, features: Mapping[str, np.ndarray], dest: np.ndarray) -> None:
        """Dispatch an encoding of media by the named encoder."""
        self.state = self.program(Encode(name, num_inputs))(self.params, self.state, dict(features), dest)

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
