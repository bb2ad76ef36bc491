"""Mixture of experts: a router, experts in stacked weights, and the weighted sum of the experts of each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Float32, Int

from mmjax.kernels import current_platform
from mmjax.nn.weight import WeightValue, dequantize, index_value, weight, weight_einsum
from mmjax.sharding import round_up, sum_over_shards

MAX_BLOCK_ROWS = {"cpu": 32}

# (rows sorted by expert, gate_up [n, D, 2F], down [n, F, D], rows of each expert, rows per block)
GroupedMlp = Callable[[Float[Array, "A D"], WeightValue, WeightValue, Int[Array, "n"], int], Float[Array, "A D"]]


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Sizes. top_k: experts per token. padded_num_experts: num_experts with padding, to divide over devices.

    norm_topk_prob: whether the weights of the chosen experts are scaled to sum to 1. dense_layers: layers without
    experts.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    norm_topk_prob: bool
    padded_num_experts: int
    dense_layers: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, text: dict[str, Any], *, norm_topk_prob: bool | None = None) -> MoeConfig | None:
        """From the text part of config.json; None for a model without experts. `norm_topk_prob` overrides the file."""
        experts = text.get("num_experts")
        if not experts:
            return None
        step, dense_only = text.get("decoder_sparse_step", 1), text.get("mlp_only_layers") or []
        dense = [i for i in range(text["num_hidden_layers"]) if i in dense_only or (i + 1) % step]
        if norm_topk_prob is None:
            norm_topk_prob = bool(text.get("norm_topk_prob", False))
        top_k, mlp = text["num_experts_per_tok"], text["moe_intermediate_size"]
        return cls(experts, top_k, mlp, norm_topk_prob, experts, tuple(dense))

    def for_tp(self, tp_size: int) -> MoeConfig:
        """The same experts, padded to divide over `tp_size` devices. No token is routed to the padding."""
        return dataclasses.replace(self, padded_num_experts=round_up(self.num_experts, tp_size))


class Experts(nnx.Module):
    """A router and gated feed-forwards. Each device has whole experts, and the outputs of the devices are summed."""

    def __init__(self, width: int, c: MoeConfig) -> None:
        self.router = weight(width, c.num_experts, axes=("embed", "router"))
        # Gate and up side by side, as jax.lax.ragged_dot wants them: with an axis of two between, a decode loop of
        # Qwen3-VL-30B on eight v5e chips copied 4.5 GiB of them into another layout.
        self.gate_up = weight(
            c.padded_num_experts, width, 2 * c.intermediate_size, axes=("experts", "embed", "expert_mlp")
        )
        self.down = weight(c.padded_num_experts, c.intermediate_size, width, axes=("experts", "expert_mlp", "embed"))
        self.c = c

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The weighted sum of the outputs of each token's experts."""
        with jax.named_scope("router"):
            probs = jax.nn.softmax((x @ self.router[...]).astype(jnp.float32), axis=-1)
            weights, expert_ids = jax.lax.top_k(probs, self.c.top_k)
            if self.c.norm_topk_prob:
                weights = weights / weights.sum(axis=-1, keepdims=True)
        block = block_rows(expert_ids.size, self.c.num_experts)
        grouped_mlp = ragged_dot_mlp if current_platform() == "tpu" else blockwise_mlp

        def shard_experts(
            shard: Int[ArrayLike, ""],
            x: Float[Array, "T D"],
            weights: Float32[Array, "T k"],
            expert_ids: Int[Array, "T k"],
            *params: WeightValue,
        ) -> Float[Array, "T D"]:
            local_ids = expert_ids - shard * params[0].shape[0]
            return routed_experts(x, weights, local_ids, *params, block=block, grouped_mlp=grouped_mlp)

        replicated = (("position", "embed"), ("position", "router"), ("position", "router"))
        split = (("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed"))
        return sum_over_shards(shard_experts, (*replicated, *split))(
            x, weights, expert_ids.astype(jnp.int32), self.gate_up.stored, self.down.stored
        )


def block_rows(rows: int, experts: int) -> int:
    """Rows of one expert per product, a power of two.

    On an accelerator, reading the weights takes most of the time, so the rows of most experts should fit in one block:
    four times the mean. On a CPU, every row of padding takes time: with 64 experts of 512 x 256 and 256 tokens of 8
    experts each, blocks of 16 and 32 rows took 53 and 91 ms, of 128 rows 205 ms.
    """
    platform = current_platform()
    target = -(-rows * (1 if platform == "cpu" else 4) // experts)
    return min(1 << (target - 1).bit_length(), MAX_BLOCK_ROWS.get(platform, 128))


@jax.named_scope("experts")
def routed_experts(
    x: Float[Array, "T D"],
    weights: Float32[Array, "T k"],
    expert_ids: Int[Array, "T k"],
    gate_up: WeightValue,
    down: WeightValue,
    *,
    block: int,
    grouped_mlp: GroupedMlp,
) -> Float[Array, "T D"]:
    """For each token t, the sum over j of weights[t, j] times the output of expert expert_ids[t, j] for x[t].

    gate_up and down are of experts 0..n-1; any other id adds nothing. Rows are sorted by expert, so that each weight is
    read once. The outputs are sorted back, so that a token's sum always has the same order.
    """
    tokens, top_k = expert_ids.shape
    experts = gate_up.shape[0]
    expert_of = jnp.where((expert_ids >= 0) & (expert_ids < experts), expert_ids, experts).reshape(-1)
    order = jnp.argsort(expert_of, stable=True).astype(jnp.int32)
    counts = jnp.zeros(experts, jnp.int32).at[expert_of].add(1, mode="drop")
    out = grouped_mlp(jnp.take(x, order // top_k, axis=0), gate_up, down, counts, block)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    out = jnp.take(out, inverse, axis=0).reshape(tokens, top_k, -1).astype(jnp.float32)
    return jnp.einsum("tkd,tk->td", out, weights).astype(x.dtype)


def blockwise_mlp(
    rows: Float[Array, "A D"], gate_up: WeightValue, down: WeightValue, counts: Int[Array, "n"], block: int
) -> Float[Array, "A D"]:
    """The outputs of each expert e for its counts[e] rows, `block` rows at a time; zero after the last expert's rows.

    On CPUs and GPUs, jax.lax.ragged_dot multiplies every row with every expert: with 128 experts, 128 times the work.
    """
    size, experts = rows.shape[0], gate_up.shape[0]
    ends = jnp.cumsum(counts)
    blocks = (counts + (block - 1)) // block
    block_ends = jnp.cumsum(blocks)
    padded = jnp.pad(rows, ((0, block), (0, 0)))

    def expert_block(i: Int[Array, ""], out: Float[Array, "padded D"]) -> Float[Array, "padded D"]:
        expert = jnp.searchsorted(block_ends, i, side="right").clip(0, experts - 1)
        start = ends[expert] - counts[expert] + (i - block_ends[expert] + blocks[expert]) * block
        start = jnp.where(i < block_ends[-1], start, size)  # surplus blocks are written past the end
        y = jax.lax.dynamic_slice_in_dim(padded, start, block)
        y = _gated(weight_einsum("bd,df->bf", y, index_value(gate_up, expert)))
        y = weight_einsum("bf,fd->bd", y, index_value(down, expert))
        is_own = start + jnp.arange(block, dtype=jnp.int32) < ends[expert]
        # The last rows of a block may be of the next expert, whose block overwrites them.
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(is_own[:, None], y, jnp.zeros_like(y)), start, 0)

    # On an accelerator, a loop whose length is a value waits for the host at each iteration.
    max_blocks = min(size, experts + size // block)
    iterations = block_ends[-1] if current_platform() == "cpu" else max_blocks
    return jax.lax.fori_loop(0, iterations, expert_block, jnp.zeros_like(padded))[:size]


def ragged_dot_mlp(
    rows: Float[Array, "A D"], gate_up: WeightValue, down: WeightValue, counts: Int[Array, "n"], block: int
) -> Float[Array, "A D"]:
    """The same by jax.lax.ragged_dot, which XLA compiles to a grouped product on TPUs; `block` is not used."""
    gate_up, down = dequantize(gate_up), dequantize(down)
    y = jax.lax.ragged_dot(rows, gate_up, counts)
    y = jax.lax.ragged_dot(_gated(y), down, counts)
    real = jnp.arange(rows.shape[0], dtype=jnp.int32) < counts.sum()
    return jnp.where(real[:, None], y, jnp.zeros_like(y))


def _gated(y: Float[Array, "A twice_F"]) -> Float[Array, "A F"]:
    gate, up = jnp.split(y, 2, axis=1)
    return jax.nn.silu(gate) * up
