"""Plans the sizes of everything on the device: the KV cache, the mm_embeds buffer, the buckets of the programs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Protocol

import numpy as np

from mmjax.config import BLOCK_SIZES, MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, EngineArgs
from mmjax.engine.buckets import BucketConfig
from mmjax.engine.measured import Measured
from mmjax.kernels import (
    kv_block_size,
    kv_cache_dtype,
    kv_cache_head_dim,
    kv_heads_first,
    kv_in_one_array,
    q_block_size,
)
from mmjax.spec import EncoderSpec, ModelSpec

# Padding up to a bucket is wasted work, which hurts most on a CPU; more buckets take longer to compile, which hurts
# most on a GPU.
MIN_TOKEN_BUCKET = {"cpu": 128, "gpu": 256, "tpu": 256}
TOKEN_BUCKET_FACTOR = {"cpu": 2, "gpu": 2, "tpu": 4}
FINE_ENCODER_BUCKETS = {"cpu": math.inf, "gpu": 8192, "tpu": math.inf}  # above, there is a bucket between two others
MAX_STOP_IDS = 16  # stop tokens per sequence that the device checks
EMBED_ROWS = 256  # embeddings per write, if they need no encoder: one or two writes per image in most families
CPU_CACHE_BYTES = 1 << 30
WORKSPACE_BYTES = 2 << 30  # of an accelerator's memory, for temporary arrays of programs that are not measured
# beside what is measured: smaller programs' code; results that the host has not read; on a GPU CUDA graphs, libraries,
# and kernels that XLA tries while it compiles
RESERVED_BYTES = {"gpu": 1 << 30, "tpu": 1 << 28}


class Device(Protocol):
    """The part of `jax.Device` that planning needs."""

    def memory_stats(self) -> dict[str, int] | None: ...


@dataclasses.dataclass(frozen=True)
class EngineMemory:
    """The sizes of one replica. max_model_len: tokens of the longest sequence. num_blocks: blocks of the KV cache,
    including block 0, which padding uses. num_mm_rows: rows of the mm_embeds buffer."""

    max_model_len: int
    num_blocks: int
    num_mm_rows: int
    buckets: BucketConfig

    @classmethod
    def plan(
        cls,
        args: EngineArgs,
        spec: ModelSpec,
        platform: str,
        *,
        kv_dtype: str,
        tp_size: int,
        device: Device,
        measured: Measured | None = None,
    ) -> EngineMemory:
        """Choose sizes that fit into the memory of `device`, which already holds the weights.

        measured: what the programs need. Raises ValueError if one sequence of max_model_len tokens does not fit.
        """
        planner = _Planner(args, spec, platform)
        budget = planner.cache_bytes(device, measured)
        max_model_len, num_blocks = planner.cache_size(budget, planner.block_bytes(kv_dtype, tp_size))
        num_mm_rows = planner.mm_rows(max_model_len)
        return cls(max_model_len, num_blocks, num_mm_rows, planner.buckets(max_model_len, num_mm_rows))

    @staticmethod
    def block_bytes(args: EngineArgs, spec: ModelSpec, platform: str, *, kv_dtype: str, tp_size: int) -> int:
        """Bytes of one block of the KV cache over all layers, on one device."""
        return _Planner(args, spec, platform).block_bytes(kv_dtype, tp_size)


@dataclasses.dataclass(frozen=True)
class _Planner:
    """Computes the sizes."""

    args: EngineArgs
    spec: ModelSpec
    platform: str

    @property
    def block_size(self) -> int:
        requested = self.args.max_model_len
        longest = requested if isinstance(requested, int) and requested > 0 else self.spec.max_positions
        chosen = self.args.block_size
        size = kv_block_size(chosen or BLOCK_SIZES[self.platform], longest, self.max_num_seqs, self.platform)
        if chosen and size != chosen:
            raise ValueError(
                f"with block_size {chosen}, the block table of {self.max_num_seqs} sequences of {longest} tokens does "
                f"not fit into the scalar memory of a TPU. Set block_size to {size} or leave it unset, or lower "
                "max_model_len or max_num_seqs."
            )
        return size

    @property
    def max_num_seqs(self) -> int:
        return self.args.max_num_seqs or MAX_NUM_SEQS[self.platform]

    @property
    def max_num_batched_tokens(self) -> int:
        return self.args.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS[self.platform]

    def block_bytes(self, kv_dtype: str, tp_size: int) -> int:
        """Bytes of one block over all layers, on one device."""
        shape, dtype = kv_block_shape(self.spec, self.block_size, kv_dtype, self.platform)
        arrays = 1 if kv_in_one_array(self.platform) else 2
        return arrays * self.spec.num_layers * math.prod(shape) // tp_size * dtype.itemsize

    def cache_bytes(self, device: Device, measured: Measured | None) -> int:
        """Bytes that the KV cache may take on one device. Where the programs are not measured, they get a quarter of
        what is free, at most 2 GiB."""
        if self.args.kv_cache_memory_bytes:
            return self.args.kv_cache_memory_bytes
        stats = device.memory_stats() if self.platform != "cpu" else None
        if not stats:
            return CPU_CACHE_BYTES
        free = int(stats["bytes_limit"]) - int(stats["bytes_in_use"])
        if measured is not None:
            needed = measured.state_bytes + measured.temp_bytes + measured.code_bytes + RESERVED_BYTES[self.platform]
            return max(free - needed, 0)
        return max(free - min(WORKSPACE_BYTES, free // 4), free // 4)

    def cache_size(self, budget: int, block_bytes: int) -> tuple[int, int]:
        """(max_model_len, number of blocks). ValueError if a sequence of max_model_len tokens does not fit."""
        cross_blocks = -(-self.spec.cross_len // self.block_size)
        affordable = budget // block_bytes - 1
        requested, positions = self.args.max_model_len, self.spec.max_positions
        if isinstance(requested, int) and requested > positions:
            raise ValueError(
                f"max_model_len {requested} is greater than the {positions} positions that the model supports"
            )
        max_model_len = requested if isinstance(requested, int) and requested > 0 else positions
        fits = (affordable - cross_blocks) * self.block_size
        if max_model_len > fits:
            if requested == -1 and fits > 0:
                max_model_len = fits
            else:
                raise ValueError(
                    f"one sequence of max_model_len {max_model_len} tokens needs "
                    f"{max_model_len * block_bytes / self.block_size / 2**30:.2f} GiB of cache, but only "
                    f"{budget / 2**30:.2f} GiB are available, enough for {max(fits, 0)} tokens. Lower max_model_len "
                    "(or set it to 'auto'), or raise "
                    f"{'kv_cache_memory_bytes' if self.platform == 'cpu' else 'gpu_memory_utilization'}."
                )
        useful = self.max_num_seqs * (-(-max_model_len // self.block_size) + cross_blocks)
        return max_model_len, min(affordable, useful if self.platform == "cpu" else affordable) + 1

    def mm_rows(self, max_model_len: int) -> int:
        """Rows of the mm_embeds buffer: at least as many as the largest item of a prompt needs."""
        min_rows = max((encoder.embeds_per_group for encoder in self.spec.encoders.values()), default=0)
        if not min_rows and not self.spec.mm_embed_dim:
            return 0
        return max(self.max_num_batched_tokens, min_rows, min(max_model_len, self.spec.max_item_embeds))

    def buckets(self, max_model_len: int, num_mm_rows: int) -> BucketConfig:
        """Every static size of the programs."""
        spec, args, block_size = self.spec, self.args, self.block_size
        q_block, seqs = q_block_size(self.platform), self.max_num_seqs
        tokens = -(-self.max_num_batched_tokens // q_block) * q_block
        return BucketConfig(
            token_buckets=bucket_sizes(
                min(MIN_TOKEN_BUCKET[self.platform], tokens), tokens, TOKEN_BUCKET_FACTOR[self.platform]
            ),
            seq_buckets=_seq_buckets(seqs),
            encoder_buckets={
                name: self._encoder_buckets(encoder, num_mm_rows) for name, encoder in spec.encoders.items()
            },
            num_mm_rows=num_mm_rows,
            q_block_size=q_block,
            block_size=block_size,
            max_blocks_per_seq=-(-max_model_len // block_size),
            cross_blocks_per_seq=-(-spec.cross_len // block_size),
            rope_axes=spec.rope_axes,
            num_rows=seqs + 1,
            max_stop_ids=MAX_STOP_IDS,
            num_decode_steps=args.num_decode_steps,
            max_logprobs=spec.vocab_size if args.max_logprobs == -1 else min(args.max_logprobs, spec.vocab_size),
            embed_rows=min(EMBED_ROWS, num_mm_rows) if args.enable_mm_embeds or args.enable_prompt_embeds else 0,
        )

    def _encoder_buckets(self, encoder: EncoderSpec, num_mm_rows: int) -> tuple[int, ...]:
        """Inputs per program of an encoder."""
        group = encoder.group_size
        largest = min(self.max_num_seqs, 8)
        if encoder.embeds_per_group:
            largest = num_mm_rows // encoder.embeds_per_group * group
        largest = max(largest, encoder.max_item_inputs)
        sizes = bucket_sizes(max(group, min(256, largest)) if group > 1 else 1, largest, 2)
        between = {
            (low + high) // 2 // group * group
            for low, high in itertools.pairwise(sizes)
            if low >= FINE_ENCODER_BUCKETS[self.platform]
        }
        return tuple(sorted({*sizes, *between}))


def kv_block_shape(
    spec: ModelSpec, block_size: int, dtype: str, platform: str
) -> tuple[tuple[int, int, int], np.dtype]:
    """(shape, dtype) of a block of the KV cache, with the axis order and padding of the platform's kernels."""
    heads = spec.num_kv_heads
    inner = (heads, block_size) if kv_heads_first(platform) else (block_size, heads)
    return (*inner, kv_cache_head_dim(spec.head_dim, platform)), kv_cache_dtype(dtype, platform)


def _seq_buckets(largest: int) -> tuple[int, ...]:
    """Numbers of sequences per decode step. Above 64 the cache's bytes count more than the weights': on an H200 a step
    of 256 rows takes twice as long as one of 64."""
    return (
        bucket_sizes(1, largest, 4) if largest <= 64 else (*bucket_sizes(1, 64, 4)[:-1], *bucket_sizes(64, largest, 2))
    )


def bucket_sizes(smallest: int, largest: int, factor: int) -> tuple[int, ...]:
    """Ascending sizes from `smallest`, each `factor` times the one before, ending with `largest`."""
    sizes = []
    size = smallest
    while size < largest:
        sizes.append(size)
        size *= factor
    return (*sizes, largest)
