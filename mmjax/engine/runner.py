"""The device: its state, its programs, and nothing that decides. The only file of the engine with jit and donation."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax import sharding
from mmjax.batch import Batch, KVCache, nest
from mmjax.engine import sample as sampler
from mmjax.engine.pack import SAMPLING_FIELDS, BucketConfig
from mmjax.kernels import kv_cache_dtype, kv_cache_head_dim, kv_cache_heads, kv_heads_first
from mmjax.models.family import ModelSpec
from mmjax.nn.attention import kv_cache_axes
from mmjax.nn.weight import QuantizedArray, WeightValue

logger = logging.getLogger(__name__)

Array = jax.Array
Program = Callable[..., Any]


class ProgramKey(NamedTuple):
    """Which program: what it does, its bucket, the steps of a decode's loop, the name of an encoder."""

    program: str
    size: int
    steps: int = 0
    encoder: str = ""


# XLA:CPU takes weights out of int8 as a whole before it multiplies. It then orders its work for speed, which holds all
# layers' copies at once, and moves them out of loops.
LOW_MEMORY_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
}
LOGPROB_BLOCK = 128  # hidden states per block of prompt scoring: bounds the logits that exist at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """All that lives on the device between steps; donated to every program that changes it.

    slab: [M, W] media rows. last: i32[R] and done: bool[R], each row's newest token and whether it was a stop.
    seen: i32[R, V] and bias: f32[R, V], see `sample`.
    """

    kv_cache: KVCache
    mm_embeds: Array
    last_token: Array
    stopped: Array
    token_counts: Array
    logit_bias: Array


def kv_block_shape(
    spec: ModelSpec, block_size: int, dtype: Any, platform: str, tp_size: int
) -> tuple[tuple[int, int, int], Any]:
    """(shape, dtype) of the pool's pages, in the order and with the padding that the platform's kernels want."""
    heads = kv_cache_heads(spec.num_kv_heads // tp_size, platform) * tp_size
    inner = (heads, block_size) if kv_heads_first(platform) else (block_size, heads)
    return (*inner, kv_cache_head_dim(spec.head_dim, platform)), kv_cache_dtype(dtype, platform)


class ModelRunner:
    """Compiles the programs of every bucket and runs them. One dispatch is one call; results are device arrays."""

    def __init__(
        self,
        graph: nnx.GraphDef[Any],
        params: Mapping[str, WeightValue],
        spec: ModelSpec,
        buckets: BucketConfig,
        mesh: Mesh,
        *,
        num_blocks: int,
        num_mm_rows: int,
        compute_dtype: Any,
        kv_dtype: Any,
        platform: str,
    ) -> None:
        self.graph = graph
        self.paths = tuple(params)
        self.params = list(params.values())
        self.spec = spec
        self.buckets = buckets
        self.mesh = mesh
        self.dtype = jnp.dtype(compute_dtype)
        self.compiles = 0
        self.compiles_after_warmup = 0
        self.warm = False
        self._programs: dict[ProgramKey, Program] = {}
        self._replicated = NamedSharding(mesh, P())
        page, kept = kv_block_shape(spec, buckets.block_size, kv_dtype, platform, sharding.tp_size(mesh))
        pool = (spec.num_layers * num_blocks, *page)
        held = sharding.named_sharding(mesh, kv_cache_axes())
        rows, vocab = buckets.num_rows, 0 if spec.pooling else spec.vocab_size
        # On the CPU asking after each step whether any row is left costs nothing. On an accelerator it is a wait for
        # it, so there the host knows the loop's length (on an H100 both take the same 2.9 ms a step at batch 1).
        self.stops_early = platform == "cpu"
        small = any(isinstance(leaf, QuantizedArray) for leaf in self.params)
        self.compiler_options: dict[str, Any] = LOW_MEMORY_OPTIONS if small and platform == "cpu" else {}
        self.state = DeviceState(
            kv_cache=KVCache(self._zeros(pool, kept, held), self._zeros(pool, kept, held)),
            mm_embeds=self._zeros((max(num_mm_rows, 1), max(spec.mm_embed_dim, 1)), self.dtype),
            last_token=self._zeros((rows,), jnp.int32),
            stopped=self._zeros((rows,), jnp.bool_),
            token_counts=self._zeros((rows, vocab), jnp.int32),
            logit_bias=self._zeros((rows, vocab), jnp.float32),
        )

    def _zeros(self, shape: tuple[int, ...], dtype: Any, place: NamedSharding | None = None) -> Array:
        return jnp.zeros(shape, dtype, device=place or self._replicated)

    # -- the programs ------------------------------------------------------------------------------------------------

    def _model(self, leaves: list[WeightValue]) -> Any:
        return nnx.merge(self.graph, nest(dict(zip(self.paths, leaves, strict=True))))

    def _sample(
        self, model: Any, hidden: Array, f: Mapping[str, Array], state: DeviceState, active: Array
    ) -> tuple[DeviceState, sampler.SamplerOutput]:
        """Sample one token from hidden [S, D] for the rows that are active bool[S]."""
        logits = jax.lax.with_sharding_constraint(model.logits(hidden), self._replicated)
        rows = sampler.SamplingMetadata(
            **{name: f[name] for name, _ in SAMPLING_FIELDS}, seed=f["seed"], stop_ids=f["stop_ids"]
        )
        sampled = sampler.sample(
            logits, rows, state.token_counts, state.logit_bias, num_logprobs=self.buckets.max_logprobs
        )
        row = jnp.where(active, f["row"], self.buckets.num_rows - 1)
        stopped = jnp.any(f["stop_ids"] == sampled.token_ids[:, None], axis=1)
        return (
            dataclasses.replace(
                state,
                last_token=state.last_token.at[row].set(sampled.token_ids),
                stopped=state.stopped.at[row].set(stopped),
                token_counts=sampler.count_tokens(state.token_counts, rows, sampled.token_ids, active),
            ),
            sampled,
        )

    def _prefill(self, leaves: list[WeightValue], state: DeviceState, vector: Array, *, tokens: int) -> Any:
        """Run T tokens of prompts and sample for the rows whose prompt ends here. Also returns hidden [T, D].

        A runner that pools returns f32[S, D] instead of samples, the hidden states where prompts end.
        """
        f = self.buckets.prefill_layout(tokens).unpack(vector)
        page, block = self.buckets.block_size, self.buckets.q_block_size
        model = self._model(leaves)
        owner = jnp.repeat(f["seq_index"], block, total_repeat_length=tokens)
        at = f["positions"].clip(0)
        slot = f["block_table"][owner, at // page] * page + at % page
        batch = Batch(
            token_ids=f["token_ids"],
            rope_positions=f["rope_positions"],
            mm_index=f["mm_index"],
            slot_mapping=jnp.where(f["positions"] >= 0, slot, -1),
            seq_index=f["seq_index"],
            q_start=f["q_start"],
            block_table=f["block_table"],
            context_lens=f["context_lens"],
            cross_block_table=f["cross_block_table"],
            cross_context_lens=f["cross_context_lens"],
        )
        hidden, pool = model(batch, state.kv_cache, state.mm_embeds)
        ends = hidden[f["last_token_index"].clip(0)]
        state = dataclasses.replace(state, kv_cache=pool)
        if self.spec.pooling:
            return state, ends.astype(jnp.float32), hidden
        state, sampled = self._sample(model, ends, f, state, f["last_token_index"] >= 0)
        return state, sampled, hidden

    def _decode(self, leaves: list[WeightValue], state: DeviceState, vector: Array, *, seqs: int, steps: int) -> Any:
        """Up to `steps` tokens for each of S sequences, fed back on the device; -1 where a row had stopped."""
        sizes = self.buckets
        f = sizes.decode_layout(seqs).unpack(vector)
        model = self._model(leaves)
        own = jnp.arange(seqs, dtype=jnp.int32)
        blank = self._blank(seqs, steps)

        def alive(step: Array, state: DeviceState) -> Array:
            return (step < f["num_steps"]) & ~state.stopped[f["row"]]

        def more(carry: tuple[Array, DeviceState, sampler.SamplerOutput]) -> Array:
            return jnp.any(alive(carry[0], carry[1]))

        def one(
            carry: tuple[Array, DeviceState, sampler.SamplerOutput],
        ) -> tuple[Array, DeviceState, sampler.SamplerOutput]:
            step, state, out = carry
            active = alive(step, state)
            place = f["positions"] + step
            slot = f["block_table"][own, place // sizes.block_size] * sizes.block_size + place % sizes.block_size
            batch = Batch(
                token_ids=state.last_token[f["row"]],
                rope_positions=jnp.broadcast_to(place + f["rope_delta"], (sizes.rope_axes, seqs)),
                mm_index=jnp.full(seqs, -1, jnp.int32),
                slot_mapping=jnp.where(active, slot, -1),
                seq_index=own,
                q_start=place,
                block_table=f["block_table"],
                context_lens=jnp.where(active, place + 1, 0),
                cross_block_table=f["cross_block_table"],
                cross_context_lens=jnp.where(active, f["cross_context_lens"], 0),
            )
            hidden, pool = model(batch, state.kv_cache, state.mm_embeds)
            now = dict(f) | {
                "output_len": f["output_len"] + step,
                "min_tokens_left": (f["min_tokens_left"] - step).clip(0),
            }
            state, sampled = self._sample(model, hidden, now, dataclasses.replace(state, kv_cache=pool), active)
            sampled = dataclasses.replace(sampled, token_ids=jnp.where(active, sampled.token_ids, -1))
            out = jax.tree.map(lambda all, new: all.at[step].set(new), out, sampled)
            return step + 1, state, out

        start = (jnp.int32(0), state, blank)
        if self.stops_early:
            _, state, out = jax.lax.while_loop(more, one, start)
        else:
            _, state, out = jax.lax.fori_loop(0, steps, lambda _, carry: one(carry), start)
        return state, out

    def _blank(self, seqs: int, k: int) -> sampler.SamplerOutput:
        top = self.buckets.max_logprobs
        return sampler.SamplerOutput(
            token_ids=jnp.full((k, seqs), -1, jnp.int32),
            logprobs=jnp.zeros((k, seqs), jnp.float32),
            ranks=jnp.zeros((k, seqs), jnp.int32),
            top_ids=jnp.zeros((k, seqs, top), jnp.int32),
            top_logprobs=jnp.zeros((k, seqs, top), jnp.float32),
        )

    def _encode(
        self, leaves: list[WeightValue], state: DeviceState, features: Mapping[str, Array], dest: Array, *, name: str
    ) -> DeviceState:
        """Encode media and put the rows where the batch will look for them."""
        model = self._model(leaves)
        encoded = model.encode(name, features)
        if self.spec.is_encoder_decoder:
            return dataclasses.replace(state, kv_cache=model.write_cross_kv(encoded, state.kv_cache, dest))
        slab = state.mm_embeds.at[dest].set(encoded.astype(state.mm_embeds.dtype), mode="drop")
        return dataclasses.replace(state, mm_embeds=slab)

    def _write_embeds(self, state: DeviceState, rows: Array, dest: Array) -> DeviceState:
        """Put rows that need no encoder where the batch will look for them."""
        return dataclasses.replace(
            state, mm_embeds=state.mm_embeds.at[dest].set(rows.astype(state.mm_embeds.dtype), mode="drop")
        )

    def _prompt_logprobs(self, leaves: list[WeightValue], hidden: Array, targets: Array) -> Any:
        """Report on targets i32[T] under hidden [T, D], a block at a time."""
        model = self._model(leaves)
        block = min(LOGPROB_BLOCK, hidden.shape[0])

        def one(part: tuple[Array, Array]) -> Any:
            logits = jax.lax.with_sharding_constraint(model.logits(part[0]), self._replicated)
            return sampler.prompt_logprobs(logits, part[1], self.buckets.max_logprobs)

        out = jax.lax.map(one, (hidden.reshape(-1, block, hidden.shape[1]), targets.reshape(-1, block)))
        return jax.tree.map(lambda x: x.reshape(hidden.shape[0], *x.shape[2:]), out)

    def _set_sampling_row(self, state: DeviceState, row: Array, seen: Array, bias: Array) -> DeviceState:
        return dataclasses.replace(
            state, token_counts=state.token_counts.at[row].set(seen), logit_bias=state.logit_bias.at[row].set(bias)
        )

    def _set_logit_biases(self, state: DeviceState, rows: Array, biases: Array) -> DeviceState:
        return dataclasses.replace(state, logit_bias=state.logit_bias.at[rows].set(biases))

    # -- compiling ---------------------------------------------------------------------------------------------------

    def _compile(self, kind: str, size: int, steps: int, name: str) -> Program:
        """Lower and compile one program for one bucket."""
        keep = jax.tree.map(lambda x: x.sharding, self.state)
        free = self._replicated
        vocab = self.spec.vocab_size

        def i32(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=free)

        function: Any
        args: tuple[Any, ...]
        out: Any
        if kind == "prefill":
            function = lambda *a: self._prefill(*a, tokens=size)  # noqa: E731
            args = (self.params, self.state, i32(self.buckets.prefill_layout(size).size))
            out = (keep, free, free)
        elif kind == "decode":
            function = lambda *a: self._decode(*a, seqs=size, steps=steps)  # noqa: E731
            args = (self.params, self.state, i32(self.buckets.decode_layout(size).size))
            out = (keep, free)
        elif kind == "encode":
            encoder = self.spec.encoders[name]
            rows = self.buckets.num_embeds(encoder, size)
            features = {
                field: jax.ShapeDtypeStruct((axis, *tail), jnp.dtype(dtype), sharding=free)
                for axis, fields in ((size, encoder.features), (rows, encoder.gather_fields))
                for field, (tail, dtype, _) in fields.items()
            }
            function, out = functools.partial(self._encode, name=name), keep
            args = (self.params, self.state, features, i32(size * encoder.keys_per_input or rows))
        elif kind == "put":
            function, out = self._write_embeds, keep
            rows_given = jax.ShapeDtypeStruct((size, self.spec.mm_embed_dim), jnp.float32, sharding=free)
            args = (self.state, rows_given, i32(size))
        elif kind == "score":
            function, out = self._prompt_logprobs, free
            hidden = jax.ShapeDtypeStruct((size, self.spec.hidden_size), self.dtype, sharding=free)
            args = (self.params, hidden, i32(size))
        elif kind == "biases":
            function, out = self._set_logit_biases, keep
            args = (self.state, i32(size), jax.ShapeDtypeStruct((size, vocab), jnp.float32, sharding=free))
        else:
            function, out = self._set_sampling_row, keep
            row = jax.ShapeDtypeStruct((vocab,), jnp.float32, sharding=free)
            args = (self.state, i32(), i32(vocab), row)
        donated = {"score": (), "row": (0,), "put": (0,), "biases": (0,)}.get(kind, (1,))
        # float32 is asked for by those who compare: no TF32 for them.
        precision = "highest" if self.dtype == jnp.float32 else "default"
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(precision):
            lowered = jax.jit(function, donate_argnums=donated, out_shardings=out).lower(*args)
        self.compiles += 1
        if self.warm:
            self.compiles_after_warmup += 1
            logger.warning("compiling %s of size %d after warm-up", kind, size)
        return lowered.compile(compiler_options=self.compiler_options)

    def program(self, kind: str, size: int, steps: int = 0, name: str = "") -> Program:
        """The compiled program of a bucket, compiled now if it is not yet. steps: of a decode's loop."""
        key = ProgramKey(kind, size, steps, name)
        if key not in self._programs:
            self._programs[key] = self._compile(*key)
        return self._programs[key]

    def program_keys(self) -> list[ProgramKey]:
        """Every program there is, the slowest to compile first."""
        sizes = self.buckets
        loops = {self._steps(1), self._steps(sizes.num_decode_steps)}
        kinds = [ProgramKey("prefill", t) for t in reversed(sizes.token_buckets)]
        kinds += [
            ProgramKey("encode", u, 0, name)
            for name in self.spec.encoders
            for u in reversed(sizes.encoder_buckets[name])
        ]
        kinds += [ProgramKey("put", sizes.embed_rows)] if sizes.embed_rows else []
        if self.spec.pooling:
            return kinds
        kinds[len(sizes.token_buckets) : len(sizes.token_buckets)] = [
            ProgramKey("decode", s, n) for s in reversed(sizes.seq_buckets) for n in sorted(loops)
        ]
        kinds += [ProgramKey("biases", s) for s in sizes.seq_buckets]
        return [*kinds, *(ProgramKey("score", t) for t in sizes.token_buckets), ProgramKey("row", 0)]

    def _steps(self, most: int) -> int:
        """The length of the decode loop that takes at most so many steps."""
        return 1 if most == 1 and not self.stops_early else self.buckets.num_decode_steps

    def warm_up(self, progress: Callable[[Iterator[Any], int], Iterator[Any]]) -> float:
        """Compile everything. Returns seconds."""
        start = time.perf_counter()
        kinds = self.program_keys()
        with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:  # XLA compiles outside Python's lock
            for _ in progress(pool.map(lambda kind: self.program(*kind), kinds), len(kinds)):
                pass
        self.warm = True
        return time.perf_counter() - start

    # -- running -----------------------------------------------------------------------------------------------------

    def prefill(self, tokens: int, vector: np.ndarray) -> tuple[Any, Array]:
        """Dispatch a prefill: (sampled [S], hidden [T, D]); where it pools, ([S, D], hidden)."""
        self.state, sampled, hidden = self.program("prefill", tokens)(self.params, self.state, vector)
        return sampled, hidden

    def decode(self, seqs: int, vector: np.ndarray, most: int) -> sampler.SamplerOutput:
        """Dispatch decode steps, `most` for the longest row: sampled [>= most, S], -1 where a row had stopped."""
        self.state, sampled = self.program("decode", seqs, self._steps(most))(self.params, self.state, vector)
        return sampled

    def encode(self, name: str, units: int, features: Mapping[str, np.ndarray], dest: np.ndarray) -> None:
        """Dispatch an encoding of media by the named encoder."""
        self.state = self.program("encode", units, name=name)(self.params, self.state, dict(features), dest)

    def write_embeds(self, rows: np.ndarray, dest: np.ndarray) -> None:
        """Dispatch the writing of media rows f32[N, W] that need no encoder."""
        self.state = self.program("put", len(rows))(self.state, rows, dest)

    def prompt_logprobs(self, hidden: Array, targets: np.ndarray) -> Any:
        """Dispatch a report on prompt tokens: logprob [T], rank [T], top ids [T, top], top logprobs [T, top]."""
        return self.program("score", hidden.shape[0])(self.params, hidden, targets)

    def set_sampling_row(self, row: int, seen: np.ndarray | None, bias: np.ndarray | None) -> None:
        """Set a row of the sampling tables."""
        vocab = self.spec.vocab_size
        seen = np.zeros(vocab, np.int32) if seen is None else seen
        bias = np.zeros(vocab, np.float32) if bias is None else bias
        self.state = self.program("row", 0)(self.state, np.int32(row), seen, bias)

    def set_logit_biases(self, rows: np.ndarray, biases: np.ndarray) -> None:
        """Set what is added to the logits of some rows: i32[S] and f32[S, V], S being a bucket."""
        self.state = self.program("biases", len(rows))(self.state, rows, biases)
