"""Feed-forwards of which every token uses a few: a router, experts as one stacked weight, and their weighted sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.nn.weight import WeightValue, dequantize, index_value, weight, weight_einsum
from mmjax.sharding import round_up, sum_over_shards

LARGEST_BLOCK = {"cpu": 32}

# (rows [A, D] sorted by expert, gate_up [n, D, 2, F], down [n, F, D], rows of each expert i32[n], rows per block)
Grouped = Callable[[jax.Array, WeightValue, WeightValue, jax.Array, int], jax.Array]


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Sizes. top: experts that a token uses. stored: experts with the padding that divides them over devices.

    renormalise: whether the shares of the chosen experts are made to sum to 1. dense: layers without experts.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    norm_topk_prob: bool
    padded_num_experts: int
    dense_layers: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, text: dict[str, Any], *, norm_topk_prob: bool | None = None) -> MoeConfig | None:
        """From the text part of config.json; None for a model without experts. `renormalise` overrides the file."""
        experts = (
            text.get("num_experts") or text.get("num_local_experts") or 0
        )  # the latter is what transformers 5 writes
        if not experts:
            return None
        step, never = text.get("decoder_sparse_step", 1), text.get("mlp_only_layers") or []
        dense = [i for i in range(text["num_hidden_layers"]) if i in never or (i + 1) % step]
        if norm_topk_prob is None:
            norm_topk_prob = bool(text.get("norm_topk_prob", False))
        top, mlp = text["num_experts_per_tok"], text["moe_intermediate_size"]
        return cls(experts, top, mlp, norm_topk_prob, experts, tuple(dense))

    def for_tp(self, tp_size: int) -> MoeConfig:
        """The same experts, padded to divide over `ways` devices. Nobody is ever sent to the padding."""
        return dataclasses.replace(self, padded_num_experts=round_up(self.num_experts, tp_size))


class Experts(nnx.Module):
    """A router and gated feed-forwards. Each device holds whole experts, works for those, and the sums are added."""

    def __init__(self, width: int, c: MoeConfig) -> None:
        self.router = weight(width, c.num_experts, axes=("embed", "router"))
        self.gate_up = weight(
            c.padded_num_experts, width, 2, c.intermediate_size, axes=("experts", "embed", "pair", "expert_mlp")
        )
        self.down = weight(c.padded_num_experts, c.intermediate_size, width, axes=("experts", "expert_mlp", "embed"))
        self.c = c

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, D] to [T, D]."""
        chance = jax.nn.softmax((x @ self.router[...]).astype(jnp.float32), axis=-1)
        share, chosen = jax.lax.top_k(chance, self.c.top_k)
        if self.c.norm_topk_prob:
            share = share / share.sum(axis=-1, keepdims=True)
        block = block_rows(chosen.size, self.c.num_experts)
        grouped = grouped_by_ragged_dot if jax.default_backend() == "tpu" else grouped_by_blocks

        def run(
            shard: jax.Array, x: jax.Array, share: jax.Array, chosen: jax.Array, *weights: WeightValue
        ) -> jax.Array:
            mine = chosen - shard * weights[0].shape[0]
            return routed_experts(x, share, mine, *weights, block=block, grouped=grouped)

        whole = (("position", "embed"), ("position", "router"), ("position", "router"))
        split = (("experts", "embed", "pair", "expert_mlp"), ("experts", "expert_mlp", "embed"))
        return sum_over_shards(run, (*whole, *split))(
            x, share, chosen.astype(jnp.int32), self.gate_up.stored, self.down.stored
        )


def block_rows(rows: int, experts: int) -> int:
    """Rows of one expert that are multiplied at once, a power of two.

    On an accelerator, where reading weights is what costs, most experts should be done in one go: four times the mean.
    A CPU pays for every row of padding: with 64 experts of 512 x 256 and 256 tokens of 8 experts each, blocks of 16 and
    32 rows took 53 and 91 ms, of 128 rows 205 ms.
    """
    platform = jax.default_backend()
    fair = -(-rows * (1 if platform == "cpu" else 4) // experts)
    return min(1 << (fair - 1).bit_length(), LARGEST_BLOCK.get(platform, 128))


def routed_experts(
    x: jax.Array,
    weights: jax.Array,
    expert_ids: jax.Array,
    gate_up: WeightValue,
    down: WeightValue,
    *,
    block: int,
    grouped: Grouped,
) -> jax.Array:
    """sum over j of share[t, j] * expert chosen[t, j] of x[t]: [T, D] of x [T, D], share f32[T, k], chosen i32[T, k].

    The experts at hand are 0..n-1 of the stacked weights; whoever is sent elsewhere gets nothing here. Rows are sorted
    by expert, so that each weight is read once, and put back, so that a token's sum has always the same order.
    """
    tokens, top = expert_ids.shape
    experts = gate_up.shape[0]
    where = jnp.where((expert_ids >= 0) & (expert_ids < experts), expert_ids, experts).reshape(-1)
    order = jnp.argsort(where, stable=True).astype(jnp.int32)
    counts = jnp.zeros(experts, jnp.int32).at[where].add(1, mode="drop")
    out = grouped(jnp.take(x, order // top, axis=0), gate_up, down, counts, block)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    out = jnp.take(out, back, axis=0).reshape(tokens, top, -1).astype(jnp.float32)
    return jnp.einsum("tkd,tk->td", out, weights).astype(x.dtype)


def grouped_by_blocks(
    rows: jax.Array, gate_up: WeightValue, down: WeightValue, counts: jax.Array, block: int
) -> jax.Array:
    """Every expert's rows, `block` at a time; [A, D], zero past the last expert's rows.

    jax's own ragged_dot multiplies every row with every expert on CPUs and GPUs: 128 experts, 128 times the work.
    """
    size, experts = rows.shape[0], gate_up.shape[0]
    ends = jnp.cumsum(counts)
    blocks = (counts + (block - 1)) // block
    last = jnp.cumsum(blocks)
    padded = jnp.pad(rows, ((0, block), (0, 0)))

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(last, i, side="right").clip(0, experts - 1)
        at = ends[expert] - counts[expert] + (i - last[expert] + blocks[expert]) * block
        at = jnp.where(i < last[-1], at, size)  # what is too much goes past the end
        y = jax.lax.dynamic_slice_in_dim(padded, at, block)
        y = weight_einsum("bd,dpf->bpf", y, index_value(gate_up, expert))
        y = weight_einsum("bf,fd->bd", jax.nn.silu(y[:, 0]) * y[:, 1], index_value(down, expert))
        own = at + jnp.arange(block, dtype=jnp.int32) < ends[expert]
        # A block's last rows may be the next expert's, who comes later and writes them.
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(own[:, None], y, jnp.zeros_like(y)), at, 0)

    # An accelerator would have to ask the host at each turn whether there is another one.
    most = min(size, experts + size // block)
    turns = last[-1] if jax.default_backend() == "cpu" else most
    return jax.lax.fori_loop(0, turns, one, jnp.zeros_like(padded))[:size]


def grouped_by_ragged_dot(
    rows: jax.Array, gate_up: WeightValue, down: WeightValue, counts: jax.Array, block: int
) -> jax.Array:
    """The same through XLA's ragged product, which is an instruction on TPUs."""
    gate_up, down = dequantize(gate_up), dequantize(down)
    experts, width, _, mlp = gate_up.shape
    y = jax.lax.ragged_dot(rows, gate_up.reshape(experts, width, 2 * mlp), counts)
    y = jax.lax.ragged_dot(jax.nn.silu(y[:, :mlp]) * y[:, mlp:], down, counts)
    real = jnp.arange(rows.shape[0], dtype=jnp.int32) < counts.sum()
    return jnp.where(real[:, None], y, jnp.zeros_like(y))
