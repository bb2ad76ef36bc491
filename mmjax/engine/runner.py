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
from mmjax.batch import Batch, Pool, nest
from mmjax.engine import sample as sampler
from mmjax.engine.pack import SAMPLING, Sizes
from mmjax.kernels import heads_first, pool_dtype, pool_head_dim, pool_kv_heads
from mmjax.models.family import Shape
from mmjax.nn.attention import pool_axes
from mmjax.nn.weight import Kept, Quantised

logger = logging.getLogger(__name__)

Array = jax.Array
Program = Callable[..., Any]


class Key(NamedTuple):
    """Which program: what it does, its bucket, the steps of a decode's loop, the name of an encoder."""

    kind: str
    size: int
    steps: int = 0
    name: str = ""


# XLA:CPU takes weights out of int8 as a whole before it multiplies. It then orders its work for speed, which holds all
# layers' copies at once, and moves them out of loops.
FRUGAL = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
}
SCORED = 128  # hidden states per block of prompt scoring: bounds the logits that exist at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that lives on the device between steps; donated to every program that changes it.

    slab: [M, W] media rows. last: i32[R] and done: bool[R], each row's newest token and whether it was a stop.
    seen: i32[R, V] and bias: f32[R, V], see `sample`.
    """

    pool: Pool
    slab: Array
    last: Array
    done: Array
    seen: Array
    bias: Array


def page_shape(shape: Shape, page: int, dtype: Any, platform: str, ways: int) -> tuple[tuple[int, int, int], Any]:
    """(shape, dtype) of the pool's pages, in the order and with the padding that the platform's kernels want."""
    heads = pool_kv_heads(shape.kv_heads // ways, platform) * ways
    inner = (heads, page) if heads_first(platform) else (page, heads)
    return (*inner, pool_head_dim(shape.head_dim, platform)), pool_dtype(dtype, platform)


class Runner:
    """Compiles the programs of every bucket and runs them. One dispatch is one call; results are device arrays."""

    def __init__(
        self,
        graph: nnx.GraphDef[Any],
        params: Mapping[str, Kept],
        shape: Shape,
        sizes: Sizes,
        mesh: Mesh,
        *,
        pages: int,
        slab_rows: int,
        dtype: Any,
        keys: Any,
        platform: str,
    ) -> None:
        self.graph = graph
        self.paths = tuple(params)
        self.leaves = list(params.values())
        self.shape = shape
        self.sizes = sizes
        self.mesh = mesh
        self.dtype = jnp.dtype(dtype)
        self.compiles = 0
        self.compiles_after_warmup = 0
        self.warm = False
        self._programs: dict[Key, Program] = {}
        self._everywhere = NamedSharding(mesh, P())
        page, kept = page_shape(shape, sizes.page, keys, platform, sharding.ways(mesh))
        pool = (shape.layers * pages, *page)
        held = sharding.place(mesh, pool_axes())
        rows, vocab = sizes.rows, 0 if shape.pooling else shape.vocab
        # On the CPU asking after each step whether any row is left costs nothing. On an accelerator it is a wait for
        # it, so there the host knows the loop's length (on an H100 both take the same 2.9 ms a step at batch 1).
        self.ends_early = platform == "cpu"
        small = any(isinstance(leaf, Quantised) for leaf in self.leaves)
        self.options: dict[str, Any] = FRUGAL if small and platform == "cpu" else {}
        self.state = State(
            pool=Pool(self._zeros(pool, kept, held), self._zeros(pool, kept, held)),
            slab=self._zeros((max(slab_rows, 1), max(shape.slab_width, 1)), self.dtype),
            last=self._zeros((rows,), jnp.int32),
            done=self._zeros((rows,), jnp.bool_),
            seen=self._zeros((rows, vocab), jnp.int32),
            bias=self._zeros((rows, vocab), jnp.float32),
        )

    def _zeros(self, shape: tuple[int, ...], dtype: Any, place: NamedSharding | None = None) -> Array:
        return jnp.zeros(shape, dtype, device=place or self._everywhere)

    # -- the programs ------------------------------------------------------------------------------------------------

    def _model(self, leaves: list[Kept]) -> Any:
        return nnx.merge(self.graph, nest(dict(zip(self.paths, leaves, strict=True))))

    def _sample(
        self, model: Any, hidden: Array, f: Mapping[str, Array], state: State, active: Array
    ) -> tuple[State, sampler.Sampled]:
        """Sample one token from hidden [S, D] for the rows that are active bool[S]."""
        logits = jax.lax.with_sharding_constraint(model.logits(hidden), self._everywhere)
        rows = sampler.Rows(**{name: f[name] for name, _ in SAMPLING}, seed=f["seed"], stop=f["stop"])
        sampled = sampler.sample(logits, rows, state.seen, state.bias, top=self.sizes.top)
        row = jnp.where(active, f["row"], self.sizes.rows - 1)
        stopped = jnp.any(f["stop"] == sampled.token[:, None], axis=1)
        return (
            dataclasses.replace(
                state,
                last=state.last.at[row].set(sampled.token),
                done=state.done.at[row].set(stopped),
                seen=sampler.note(state.seen, rows, sampled.token, active),
            ),
            sampled,
        )

    def _prefill(self, leaves: list[Kept], state: State, vector: Array, *, tokens: int) -> Any:
        """Run T tokens of prompts and sample for the rows whose prompt ends here. Also returns hidden [T, D].

        A runner that pools returns f32[S, D] instead of samples, the hidden states where prompts end.
        """
        f = self.sizes.prefill(tokens).unpack(vector)
        page, block = self.sizes.page, self.sizes.block
        model = self._model(leaves)
        owner = jnp.repeat(f["owner"], block, total_repeat_length=tokens)
        at = f["place"].clip(0)
        slot = f["pages"][owner, at // page] * page + at % page
        batch = Batch(
            tokens=f["tokens"],
            positions=f["positions"],
            media=f["media"],
            slot=jnp.where(f["place"] >= 0, slot, -1),
            owner=f["owner"],
            start=f["start"],
            pages=f["pages"],
            length=f["length"],
            cross_pages=f["cross_pages"],
            cross_length=f["cross_length"],
        )
        hidden, pool = model(batch, state.pool, state.slab)
        ends = hidden[f["final"].clip(0)]
        state = dataclasses.replace(state, pool=pool)
        if self.shape.pooling:
            return state, ends.astype(jnp.float32), hidden
        state, sampled = self._sample(model, ends, f, state, f["final"] >= 0)
        return state, sampled, hidden

    def _decode(self, leaves: list[Kept], state: State, vector: Array, *, seqs: int, steps: int) -> Any:
        """Up to `steps` tokens for each of S sequences, fed back on the device; -1 where a row had stopped."""
        sizes = self.sizes
        f = sizes.decode(seqs).unpack(vector)
        model = self._model(leaves)
        own = jnp.arange(seqs, dtype=jnp.int32)
        blank = self._blank(seqs, steps)

        def alive(step: Array, state: State) -> Array:
            return (step < f["steps"]) & ~state.done[f["row"]]

        def more(carry: tuple[Array, State, sampler.Sampled]) -> Array:
            return jnp.any(alive(carry[0], carry[1]))

        def one(carry: tuple[Array, State, sampler.Sampled]) -> tuple[Array, State, sampler.Sampled]:
            step, state, out = carry
            active = alive(step, state)
            place = f["place"] + step
            slot = f["pages"][own, place // sizes.page] * sizes.page + place % sizes.page
            batch = Batch(
                tokens=state.last[f["row"]],
                positions=jnp.broadcast_to(place + f["delta"], (sizes.rope_rows, seqs)),
                media=jnp.full(seqs, -1, jnp.int32),
                slot=jnp.where(active, slot, -1),
                owner=own,
                start=place,
                pages=f["pages"],
                length=jnp.where(active, place + 1, 0),
                cross_pages=f["cross_pages"],
                cross_length=jnp.where(active, f["cross_length"], 0),
            )
            hidden, pool = model(batch, state.pool, state.slab)
            now = dict(f) | {"index": f["index"] + step, "min_left": (f["min_left"] - step).clip(0)}
            state, sampled = self._sample(model, hidden, now, dataclasses.replace(state, pool=pool), active)
            sampled = dataclasses.replace(sampled, token=jnp.where(active, sampled.token, -1))
            out = jax.tree.map(lambda all, new: all.at[step].set(new), out, sampled)
            return step + 1, state, out

        start = (jnp.int32(0), state, blank)
        if self.ends_early:
            _, state, out = jax.lax.while_loop(more, one, start)
        else:
            _, state, out = jax.lax.fori_loop(0, steps, lambda _, carry: one(carry), start)
        return state, out

    def _blank(self, seqs: int, k: int) -> sampler.Sampled:
        top = self.sizes.top
        return sampler.Sampled(
            token=jnp.full((k, seqs), -1, jnp.int32),
            logprob=jnp.zeros((k, seqs), jnp.float32),
            rank=jnp.zeros((k, seqs), jnp.int32),
            top_ids=jnp.zeros((k, seqs, top), jnp.int32),
            top_logprobs=jnp.zeros((k, seqs, top), jnp.float32),
        )

    def _encode(
        self, leaves: list[Kept], state: State, features: Mapping[str, Array], dest: Array, *, name: str
    ) -> State:
        """Encode media and put the rows where the batch will look for them."""
        model = self._model(leaves)
        encoded = model.encode(name, features)
        if self.shape.cross:
            return dataclasses.replace(state, pool=model.cross(encoded, state.pool, dest))
        slab = state.slab.at[dest].set(encoded.astype(state.slab.dtype), mode="drop")
        return dataclasses.replace(state, slab=slab)

    def _put(self, state: State, rows: Array, dest: Array) -> State:
        """Put rows that need no encoder where the batch will look for them."""
        return dataclasses.replace(state, slab=state.slab.at[dest].set(rows.astype(state.slab.dtype), mode="drop"))

    def _score(self, leaves: list[Kept], hidden: Array, targets: Array) -> Any:
        """Report on targets i32[T] under hidden [T, D], a block at a time."""
        model = self._model(leaves)
        block = min(SCORED, hidden.shape[0])

        def one(part: tuple[Array, Array]) -> Any:
            logits = jax.lax.with_sharding_constraint(model.logits(part[0]), self._everywhere)
            return sampler.prompt_logprobs(logits, part[1], self.sizes.top)

        out = jax.lax.map(one, (hidden.reshape(-1, block, hidden.shape[1]), targets.reshape(-1, block)))
        return jax.tree.map(lambda x: x.reshape(hidden.shape[0], *x.shape[2:]), out)

    def _set_row(self, state: State, row: Array, seen: Array, bias: Array) -> State:
        return dataclasses.replace(state, seen=state.seen.at[row].set(seen), bias=state.bias.at[row].set(bias))

    def _set_biases(self, state: State, rows: Array, biases: Array) -> State:
        return dataclasses.replace(state, bias=state.bias.at[rows].set(biases))

    # -- compiling ---------------------------------------------------------------------------------------------------

    def _compile(self, kind: str, size: int, steps: int, name: str) -> Program:
        """Lower and compile one program for one bucket."""
        keep = jax.tree.map(lambda x: x.sharding, self.state)
        free = self._everywhere
        vocab = self.shape.vocab

        def i32(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=free)

        function: Any
        args: tuple[Any, ...]
        out: Any
        if kind == "prefill":
            function = lambda *a: self._prefill(*a, tokens=size)  # noqa: E731
            args = (self.leaves, self.state, i32(self.sizes.prefill(size).size))
            out = (keep, free, free)
        elif kind == "decode":
            function = lambda *a: self._decode(*a, seqs=size, steps=steps)  # noqa: E731
            args = (self.leaves, self.state, i32(self.sizes.decode(size).size))
            out = (keep, free)
        elif kind == "encode":
            encoder = self.shape.encoders[name]
            rows = self.sizes.rows_of(encoder, size)
            features = {
                field: jax.ShapeDtypeStruct((axis, *tail), jnp.dtype(dtype), sharding=free)
                for axis, fields in ((size, encoder.features), (rows, encoder.picks))
                for field, (tail, dtype, _) in fields.items()
            }
            function, out = functools.partial(self._encode, name=name), keep
            args = (self.leaves, self.state, features, i32(size * encoder.keys or rows))
        elif kind == "put":
            function, out = self._put, keep
            rows_given = jax.ShapeDtypeStruct((size, self.shape.slab_width), jnp.float32, sharding=free)
            args = (self.state, rows_given, i32(size))
        elif kind == "score":
            function, out = self._score, free
            hidden = jax.ShapeDtypeStruct((size, self.shape.width), self.dtype, sharding=free)
            args = (self.leaves, hidden, i32(size))
        elif kind == "biases":
            function, out = self._set_biases, keep
            args = (self.state, i32(size), jax.ShapeDtypeStruct((size, vocab), jnp.float32, sharding=free))
        else:
            function, out = self._set_row, keep
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
        return lowered.compile(compiler_options=self.options)

    def program(self, kind: str, size: int, steps: int = 0, name: str = "") -> Program:
        """The compiled program of a bucket, compiled now if it is not yet. steps: of a decode's loop."""
        key = Key(kind, size, steps, name)
        if key not in self._programs:
            self._programs[key] = self._compile(*key)
        return self._programs[key]

    def kinds(self) -> list[Key]:
        """Every program there is, the slowest to compile first."""
        sizes = self.sizes
        loops = {self._steps(1), self._steps(sizes.steps)}
        kinds = [Key("prefill", t) for t in reversed(sizes.tokens)]
        kinds += [Key("encode", u, 0, name) for name in self.shape.encoders for u in reversed(sizes.units[name])]
        kinds += [Key("put", sizes.ready)] if sizes.ready else []
        if self.shape.pooling:
            return kinds
        kinds[len(sizes.tokens) : len(sizes.tokens)] = [
            Key("decode", s, n) for s in reversed(sizes.seqs) for n in sorted(loops)
        ]
        kinds += [Key("biases", s) for s in sizes.seqs]
        return [*kinds, *(Key("score", t) for t in sizes.tokens), Key("row", 0)]

    def _steps(self, most: int) -> int:
        """The length of the decode loop that takes at most so many steps."""
        return 1 if most == 1 and not self.ends_early else self.sizes.steps

    def warm_up(self, progress: Callable[[Iterator[Any], int], Iterator[Any]]) -> float:
        """Compile everything. Returns seconds."""
        start = time.perf_counter()
        kinds = self.kinds()
        with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:  # XLA compiles outside Python's lock
            for _ in progress(pool.map(lambda kind: self.program(*kind), kinds), len(kinds)):
                pass
        self.warm = True
        return time.perf_counter() - start

    # -- running -----------------------------------------------------------------------------------------------------

    def prefill(self, tokens: int, vector: np.ndarray) -> tuple[Any, Array]:
        """Dispatch a prefill: (sampled [S], hidden [T, D]); where it pools, ([S, D], hidden)."""
        self.state, sampled, hidden = self.program("prefill", tokens)(self.leaves, self.state, vector)
        return sampled, hidden

    def decode(self, seqs: int, vector: np.ndarray, most: int) -> sampler.Sampled:
        """Dispatch decode steps, `most` for the longest row: sampled [>= most, S], -1 where a row had stopped."""
        self.state, sampled = self.program("decode", seqs, self._steps(most))(self.leaves, self.state, vector)
        return sampled

    def encode(self, name: str, units: int, features: Mapping[str, np.ndarray], dest: np.ndarray) -> None:
        """Dispatch an encoding of media by the named encoder."""
        self.state = self.program("encode", units, name=name)(self.leaves, self.state, dict(features), dest)

    def put(self, rows: np.ndarray, dest: np.ndarray) -> None:
        """Dispatch the writing of media rows f32[N, W] that need no encoder."""
        self.state = self.program("put", len(rows))(self.state, rows, dest)

    def score(self, hidden: Array, targets: np.ndarray) -> Any:
        """Dispatch a report on prompt tokens: logprob [T], rank [T], top ids [T, top], top logprobs [T, top]."""
        return self.program("score", hidden.shape[0])(self.leaves, hidden, targets)

    def set_row(self, row: int, seen: np.ndarray | None, bias: np.ndarray | None) -> None:
        """Set a row of the sampling tables."""
        vocab = self.shape.vocab
        seen = np.zeros(vocab, np.int32) if seen is None else seen
        bias = np.zeros(vocab, np.float32) if bias is None else bias
        self.state = self.program("row", 0)(self.state, np.int32(row), seen, bias)

    def set_biases(self, rows: np.ndarray, biases: np.ndarray) -> None:
        """Set what is added to the logits of some rows: i32[S] and f32[S, V], S being a bucket."""
        self.state = self.program("biases", len(rows))(self.state, rows, biases)
