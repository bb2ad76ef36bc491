"""Attention on TPU, in Pallas-Mosaic: decode, prefill and steps that mix both, over the keys that are live.

One program runs through the query blocks and, for each, through chunks of its keys. While one chunk is attended to, the
live cache blocks of the next ones are copied into other buffers, be they of the same query block or of the next ones
that have keys. A cache block is [K, block_size, lanes], keys and values side by side on the lanes: one copy brings
both, for all kv heads, and a head's keys are whole tiles.

New keys are put into the chunk that their query block has in VMEM anyway, and the tiles of TILE_ROWS tokens that they
touch are copied back to the cache. A chunk that reads such tiles is not copied before.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Float32, Int, Num

from .. import online_softmax, tile, tpu
from ..choose import raise_unsupported, value_lane
from ..kv_cache import pack_kv
from ..tile import Ref

TILE_ROWS = 16
"""Tokens of a tile: 16 rows of bfloat16, or twice 8 of float32. Less cannot be written to the cache."""
CHUNK_KEYS, CHUNK_BYTES = 2048, 4 * 2**20
"""The most keys, and bytes, that are copied at a time: 4 MiB take a v5e 5 us, ten times a copy's latency."""
BUFFERS = 3
"""Chunks in VMEM: one that is attended to, one that arrives, and one whose copies are queued behind it."""
STEP_KEYS = 512
"""Keys per product: what follows the last key of a chunk costs at most this much work."""
GROUP_BYTES = 2 * 2**20
"""Queries, outputs and new keys of a grid step."""
UNROLLED_HEADS, UNROLLED_ROWS = 4, 128
"""Heads side by side in the program, and their query rows at most. More makes the program of a prefill larger only."""
VMEM_BYTES = 48 * 2**20
"""Of the 64 MiB that a core of a tpu7x has."""

Scalar = Int[Array, ""]


def run(
    q: Float[Array, "B Q K G H"],
    kv_cache: Num[Array, "num_blocks K block_size lanes"],
    new_kv: tuple[Float[Array, "B Q K H"], Float[Array, "B Q K H"]] | None,
    block_table: Int[Array, "S P"],
    seq_index: Int[Array, "B"],
    q_start: Int[Array, "B"],
    context_lens: Int[Array, "S"],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B Q K G H"], Num[Array, "num_blocks K block_size lanes"]]:
    """See `paged_attention`. block_size must be a multiple of 16. Each kv head has a matrix of queries, whose row is
    query * G + head."""
    B, Q, K, G, H = q.shape
    block_size, lanes = kv_cache.shape[2:]
    if jnp.float16 in (q.dtype, kv_cache.dtype) or block_size % TILE_ROWS:
        why = "the TPU has no float16, and block_size must be a multiple of 16"
        raise_unsupported("paged_attention", "mosaic_tpu", why, q=q, kv_cache=kv_cache)
    rows, width = tpu.round_up_to_tile(Q * G, q.dtype), max(value_lane(H), tpu.LANES)
    query = q.transpose(0, 2, 1, 3, 4).reshape(B, K, Q * G, H)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, rows - Q * G), (0, width - H)))
    inputs = [query] if new_kv is None else [query, new_rows(pack_kv(*new_kv), q_start, kv_cache.dtype)]
    group = _group_size(B, 2 * query.nbytes + sum(x.nbytes for x in inputs[1:]))
    chunk_keys, step_keys = _chunk_size(kv_cache, block_table.shape[1])
    work = plan(seq_index, q_start, context_lens, queries=Q, block_size=block_size, causal=causal, window=window)
    kernel = _Kernel(
        count=B, queries=Q, group=group, heads_per_kv=G, block_size=block_size, table_width=block_table.shape[1],
        chunk_keys=chunk_keys, step_keys=step_keys, value_lane=value_lane(H) if lanes > tpu.LANES else 0,
        causal=causal, scale=scale, window=window, writes=new_kv is not None,
    )  # fmt: skip
    cache_spec, out_spec = pl.BlockSpec(memory_space=pl.ANY), _by_group(query, group)
    shapes = [jax.ShapeDtypeStruct(query.shape, q.dtype), jax.ShapeDtypeStruct(kv_cache.shape, kv_cache.dtype)]
    out, *cache = pl.pallas_call(
        kernel.run,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(work),
            grid=(B // group,),
            in_specs=[*(_by_group(x, group) for x in inputs), cache_spec],
            out_specs=[out_spec, cache_spec] if kernel.writes else [out_spec],
            scratch_shapes=[
                pltpu.VMEM((BUFFERS, K, pl.cdiv(chunk_keys, step_keys) * step_keys, lanes), kv_cache.dtype),
                *tpu.softmax_scratch((K, rows), width),
                pltpu.SemaphoreType.DMA((BUFFERS + 1,)),
                pltpu.SMEM((len(_Queue._fields),), jnp.int32),
            ],
        ),
        out_shape=shapes if kernel.writes else shapes[:1],
        input_output_aliases={1 + len(work) + len(inputs): 1} if kernel.writes else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="paged_attention",
    )(block_table.reshape(-1), *work, *inputs, kv_cache)
    first_value = value_lane(H) % width
    out = out[:, :, : Q * G, first_value : first_value + H]
    return out.reshape(B, K, Q, G, H).transpose(0, 2, 1, 3, 4), cache[0] if cache else kv_cache


class Work(NamedTuple):
    """What each query block attends to: keys first_key .. end - 1 of sequence seq_index.

    first_key: a multiple of block_size. next_block: [0] is the first query block that has keys, [b + 1] the next one
    after b; B where there is none. first_of_seq: the first of the neighboring query blocks of the same sequence.
    """

    seq_index: Int[Array, "B"]
    q_start: Int[Array, "B"]
    first_key: Int[Array, "B"]
    end: Int[Array, "B"]
    next_block: Int[Array, "B+1"]
    first_of_seq: Int[Array, "B"]


def plan(
    seq_index: Int[Array, "B"],
    q_start: Int[Array, "B"],
    context_lens: Int[Array, "S"],
    *,
    queries: int,
    block_size: int,
    causal: bool,
    window: int | None,
) -> Work:
    """The work of a call, in the order in which it is done."""
    count = len(seq_index)
    # Not context_lens[seq_index]: inside shard_map, that fails for arrays from outside.
    lengths = jnp.where(q_start > -queries, jnp.take(context_lens, seq_index, mode="clip"), 0)
    end = jnp.clip(q_start + queries, 0, lengths) if causal else lengths
    first_key = jnp.zeros_like(end)
    if window is not None:
        first_key = lax.div(jnp.maximum(q_start - window + 1, 0), block_size) * block_size
    index = jnp.arange(count, dtype=jnp.int32)
    live = jnp.where(first_key < end, index, count)
    next_block = jnp.pad(lax.cummin(live, reverse=True), (0, 1), constant_values=count)
    starts = jnp.pad(seq_index[1:] != seq_index[:-1], (1, 0), constant_values=True)
    return Work(seq_index, q_start, first_key, end, next_block, lax.cummax(jnp.where(starts, index, 0)))


def new_rows(
    new_kv: Float[Array, "B Q K lanes"], q_start: Int[Array, "B"], dtype: jnp.dtype
) -> Float[Array, "B K *rows lanes"]:
    """The new keys of each query block, as the kernel reads them.

    Of one query: float32, as a single row of other dtypes cannot be addressed. Of more: in `dtype`, from the beginning
    of the tile of the cache that the first one goes to.
    """
    queries = new_kv.shape[1]
    if queries == 1:
        return new_kv[:, 0].astype(jnp.float32)
    row = jnp.arange(queries + TILE_ROWS, dtype=jnp.int32) - lax.rem(jnp.maximum(q_start, 0), TILE_ROWS)[:, None]
    aligned = jnp.take_along_axis(new_kv.astype(dtype), row[:, :, None, None], axis=1, mode="clip")
    return aligned.swapaxes(1, 2)


def _by_group(x: Num[Array, "B *inner"], group: int) -> pl.BlockSpec:
    return pl.BlockSpec((group, *x.shape[1:]), lambda g, *_: (g, *(0 for _ in x.shape[1:])))


def _group_size(count: int, nbytes: int) -> int:
    """Query blocks of a grid step, which divide `count`; all together have nbytes."""
    most = max(1, GROUP_BYTES * count // nbytes)
    return next(n for n in range(min(most, count), 0, -1) if count % n == 0)


def _chunk_size(kv_cache: Num[Array, "_ K block_size lanes"], table_width: int) -> tuple[int, int]:
    """Keys per chunk, in whole blocks, and per step, a multiple of LANES."""
    _, K, block_size, lanes = kv_cache.shape
    most = min(CHUNK_KEYS, CHUNK_BYTES // (K * lanes * kv_cache.dtype.itemsize))
    chunk_keys = min(max(1, most // block_size), table_width) * block_size
    return chunk_keys, min(STEP_KEYS, pl.cdiv(chunk_keys, tpu.LANES) * tpu.LANES)


def copy(src: Ref, dst: Ref, semaphore: Ref) -> Any:
    """A copy of one cache block, or of one tile back into the cache."""
    return pltpu.make_async_copy(src, dst, semaphore)


class _Refs(NamedTuple):
    """The arrays of a program. buffer: BUFFERS chunks. semaphores: of each, and of the writes. queue: a `_Queue`."""

    block_table: Ref
    work: Work
    query: Ref
    new_rows: Ref
    cache: Ref
    out: Ref
    buffer: Ref
    row_max: Ref
    row_sum: Ref
    acc: Ref
    semaphores: Ref
    queue: Ref


class _Queue(NamedTuple):
    """Positions in the array of this name. done, started: how many chunks were attended to, and how many are being
    copied or were. b, first: the chunk that is copied next, which begins at key `first` of query block b."""

    done: int = 0
    started: int = 1
    b: int = 2
    first: int = 3


QUEUE = _Queue()


class _Chunk(NamedTuple):
    """Keys first .. end - 1 of query block b, in buffer `slot`."""

    b: Scalar
    first: Scalar
    end: Scalar
    slot: Scalar


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The program, for static sizes. count: query blocks; group: of a grid step. value_lane: where values begin; 0 if
    the products are over keys and values. writes: whether there are new keys."""

    count: int
    queries: int
    group: int
    heads_per_kv: int
    block_size: int
    table_width: int
    chunk_keys: int
    step_keys: int
    value_lane: int
    causal: bool
    scale: float
    window: int | None
    writes: bool

    def run(self, block_table: Ref, *refs: Ref) -> None:
        """The query blocks of a grid step."""
        count = len(Work._fields)
        work, query, *rest = Work(*refs[:count]), *refs[count:]
        new = rest.pop(0) if self.writes else None
        cache, out, *rest = rest
        if self.writes:
            cache, *rest = rest  # the same memory; the interpreter keeps what is written in the output only
        r = _Refs(block_table, work, query, new, cache, out, *rest)

        @pl.when(pl.program_id(0) == 0)
        def start_queue() -> None:
            r.queue[QUEUE.done] = 0
            r.queue[QUEUE.started] = 0
            self._point_to(r, work.next_block[0])

        first_block = pl.program_id(0) * self.group
        lax.fori_loop(0, self.group, lambda j, _: self._attend_block(r, j, first_block + j), None)

    def _point_to(self, r: _Refs, b: Scalar) -> None:
        """The first chunk of query block b is copied next."""
        r.queue[QUEUE.b] = b
        r.queue[QUEUE.first] = r.work.first_key[jnp.minimum(b, self.count - 1)]

    def _chunk(self, r: _Refs, b: Scalar, first: Scalar, slot: Scalar) -> _Chunk:
        return _Chunk(b, first, jnp.minimum(first + self.chunk_keys, r.work.end[b]), slot)

    def _attend_block(self, r: _Refs, j: Scalar, b: Scalar) -> None:
        """All chunks of query block b, the j-th of the grid step, and its output: zero if it attends to nothing."""
        tpu.init(r.row_max, r.row_sum, r.acc)
        first, end = r.work.first_key[b], r.work.end[b]
        count = lax.div(jnp.maximum(end - first, 0) + (self.chunk_keys - 1), self.chunk_keys)
        lax.fori_loop(0, count, lambda c, _: self._attend_chunk(r, j, b, c), None)
        r.out[j] = tpu.finalize(r.row_sum, r.acc).astype(r.out.dtype)

    def _attend_chunk(self, r: _Refs, j: Scalar, b: Scalar, c: Scalar) -> None:
        slot = lax.rem(r.queue[QUEUE.done], BUFFERS)
        now = self._chunk(r, b, r.work.first_key[b] + c * self.chunk_keys, slot)
        self._start_chunks(r, b)
        self._wait(r, now)
        if not self.writes:
            self._multiply(r, j, now)
        else:
            self._put_new_rows(r, j, now)
            # the next query block waits for these keys: better before the products than after them
            held_up = (now.end == r.work.end[b]) & (r.queue[QUEUE.started] < r.queue[QUEUE.done] + BUFFERS)

            @pl.when(held_up)
            def start_after_writes() -> None:
                self._tiles(r, now, lambda each: each.wait())
                self._start_chunks(r, b + 1)

            self._multiply(r, j, now)
            pl.when(~held_up)(lambda: self._tiles(r, now, lambda each: each.wait()))
        r.queue[QUEUE.done] += 1

    # -- copies ------------------------------------------------------------------------------------------------------

    def _num_blocks(self, chunk: _Chunk) -> Scalar:
        return lax.div(chunk.end - chunk.first + (self.block_size - 1), self.block_size)

    def _block_id(self, r: _Refs, b: Scalar, key: Scalar) -> Scalar:
        return r.block_table[r.work.seq_index[b] * self.table_width + lax.div(key, self.block_size)]

    def _start_chunks(self, r: _Refs, unfinished: Scalar) -> None:
        """Start the copies of chunks while there are buffers, up to one that reads keys which query block `unfinished`
        or one after it has to write."""

        def can_start() -> Bool[Array, ""]:
            b, work = r.queue[QUEUE.b], r.work
            exists = (b < self.count) & (r.queue[QUEUE.started] < r.queue[QUEUE.done] + BUFFERS)
            if not self.writes:
                return exists
            b = jnp.minimum(b, self.count - 1)
            writer = jnp.maximum(unfinished, work.first_of_seq[b])
            end = jnp.minimum(r.queue[QUEUE.first] + self.chunk_keys, work.end[b])
            return exists & ((writer >= b) | (end <= work.q_start[jnp.minimum(writer, self.count - 1)]))

        def start(_: Bool[Array, ""]) -> Bool[Array, ""]:
            b = r.queue[QUEUE.b]
            chunk = self._chunk(r, b, r.queue[QUEUE.first], lax.rem(r.queue[QUEUE.started], BUFFERS))
            self._start(r, chunk)
            r.queue[QUEUE.started] += 1
            r.queue[QUEUE.first] = chunk.end
            pl.when(chunk.end == r.work.end[b])(lambda: self._point_to(r, r.work.next_block[b + 1]))
            return can_start()

        lax.while_loop(lambda go: go, start, can_start())

    def _start(self, r: _Refs, chunk: _Chunk) -> None:
        """Start the copies of the chunk's blocks."""

        def block(i: Scalar, _: None) -> None:
            block_id = self._block_id(r, chunk.b, chunk.first + i * self.block_size)
            keys = pl.ds(pl.multiple_of(i * self.block_size, self.block_size), self.block_size)
            copy(r.cache.at[block_id], r.buffer.at[chunk.slot, :, keys], r.semaphores.at[chunk.slot]).start()

        lax.fori_loop(0, self._num_blocks(chunk), block, None)

    def _wait(self, r: _Refs, chunk: _Chunk) -> None:
        """Wait for them. A semaphore counts bytes: one wait for each power of two of the blocks."""
        count = self._num_blocks(chunk)
        for power in range((self.chunk_keys // self.block_size).bit_length()):
            keys = r.buffer.at[chunk.slot, :, pl.ds(0, self.block_size << power)]
            pl.when((count & 1 << power) != 0)(copy(keys, keys, r.semaphores.at[chunk.slot]).wait)

    def _new_tiles(self, r: _Refs, chunk: _Chunk) -> tuple[Scalar, Scalar]:
        """The tiles [first, last) of the sequence in which the chunk has new keys."""
        first = lax.div(jnp.maximum(r.work.q_start[chunk.b], chunk.first), TILE_ROWS)
        return first, lax.div(chunk.end + (TILE_ROWS - 1), TILE_ROWS)

    def _tiles(self, r: _Refs, chunk: _Chunk, apply: Callable[[Any], None]) -> None:
        """Start, or wait for, the copies of the chunk's new keys into the cache."""

        def one(t: Scalar, _: None) -> None:
            key = t * TILE_ROWS
            dst = r.cache.at[self._block_id(r, chunk.b, key), :, _tile(lax.rem(key, self.block_size))]
            apply(copy(r.buffer.at[chunk.slot, :, _tile(key - chunk.first)], dst, r.semaphores.at[BUFFERS]))

        lax.fori_loop(*self._new_tiles(r, chunk), one, None)

    def _put_new_rows(self, r: _Refs, j: Scalar, chunk: _Chunk) -> None:
        """Put the new keys into the chunk, and start their copies."""
        heads, lanes = r.buffer.shape[1], r.buffer.shape[3]
        start = r.work.q_start[chunk.b]

        def one(t: Scalar, _: None) -> None:
            key = t * TILE_ROWS + lax.broadcasted_iota(jnp.int32, (TILE_ROWS, lanes), 0)
            is_new = (key >= start) & (key < chunk.end)
            rows = _tile(t * TILE_ROWS - chunk.first)

            def head(h: Scalar, _: None) -> None:
                if self.queries == 1:
                    new = jnp.broadcast_to(r.new_rows[j, pl.ds(h, 1), :], (TILE_ROWS, lanes))
                else:
                    new = r.new_rows[j, h, _tile((t - lax.div(start, TILE_ROWS)) * TILE_ROWS), :].astype(jnp.float32)
                old = r.buffer[chunk.slot, h, rows, :].astype(jnp.float32)
                r.buffer[chunk.slot, h, rows, :] = jnp.where(is_new, new, old).astype(r.buffer.dtype)

            lax.fori_loop(0, heads, head, None)

        lax.fori_loop(*self._new_tiles(r, chunk), one, None)
        self._tiles(r, chunk, lambda each: each.start())

    # -- products ----------------------------------------------------------------------------------------------------

    def _multiply(self, r: _Refs, j: Scalar, chunk: _Chunk) -> None:
        """Attend to the keys of a chunk, step by step. Steps all of whose keys all queries see need no mask."""
        start = r.work.q_start[chunk.b]

        def step(t: Scalar, _: None) -> None:
            first = chunk.first + t * self.step_keys
            all_seen = first + self.step_keys <= chunk.end
            if self.causal:
                all_seen &= first + self.step_keys <= start + 1
            if self.window is not None:
                all_seen &= first > start + (self.queries - 1) - self.window
            pl.when(all_seen)(lambda: self._step(r, j, chunk, t, masked=False))
            pl.when(~all_seen)(lambda: self._step(r, j, chunk, t, masked=True))

        lax.fori_loop(0, lax.div(chunk.end - chunk.first + (self.step_keys - 1), self.step_keys), step, None)

    def _step(self, r: _Refs, j: Scalar, chunk: _Chunk, t: Scalar, *, masked: bool) -> None:
        keys = pl.ds(pl.multiple_of(t * self.step_keys, self.step_keys), self.step_keys)
        first = chunk.first + t * self.step_keys
        heads, rows, width = r.query.shape[1:]

        def head(h: Scalar) -> None:
            key = r.buffer[chunk.slot, h, keys, pl.ds(0, width)]
            value = r.buffer[chunk.slot, h, keys, pl.ds(self.value_lane, width)]
            scores = tile.qk_dot(r.query[j, h], key) * self.scale
            if masked:
                scores = self._mask(scores, first, chunk.end, r.work.q_start[chunk.b])
                in_chunk = first + lax.broadcasted_iota(jnp.int32, value.shape, 0) < chunk.end
                value = jnp.where(in_chunk, value.astype(jnp.float32), 0.0).astype(value.dtype)  # may hold anything
            tpu.update((h,), r.row_max, r.row_sum, r.acc, scores, value)

        most = max(1, min(UNROLLED_HEADS, UNROLLED_ROWS // rows))
        unrolled = next(n for n in range(most, 0, -1) if heads % n == 0)

        def some_heads(i: Scalar, _: None) -> None:
            for n in range(unrolled):
                head(i * unrolled + n)

        lax.fori_loop(0, heads // unrolled, some_heads, None)

    def _mask(
        self, scores: Float32[Array, "rows keys"], first: Scalar, end: Scalar, start: Scalar
    ) -> Float32[Array, "rows keys"]:
        """Scores of the keys that a query does not see become MASKED."""
        key = first + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        visible = key < end
        if self.causal:
            row = lax.broadcasted_iota(jnp.int32, (scores.shape[0], 1), 0)
            position = start + lax.div(row, self.heads_per_kv)
            visible = key < jnp.minimum(position + 1, end)
            if self.window is not None:
                visible &= key > position - self.window
        return jnp.where(visible, scores, online_softmax.MASKED)


def _tile(row: Scalar) -> Any:
    return pl.ds(pl.multiple_of(row, TILE_ROWS), TILE_ROWS)
