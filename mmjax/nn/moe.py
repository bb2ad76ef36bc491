"""Mixture of experts: a router, experts as one stacked weight, and the weighted sum of those each token is sent to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Float32, Int

from mmjax.nn.weight import WeightValue, dequantize, index_value, weight, weight_einsum
from mmjax.sharding import round_up, sum_over_shards

MAX_BLOCK_ROWS = {"cpu": 32}

# (rows [A, D] sorted by expert, gate_up [n, D, 2, F], down [n, F, D], rows of each expert i32[n], rows per block)
GroupedMlp = Callable[[Array, WeightValue, WeightValue, Array, int], Array]


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Sizes. top_k: experts per token. padded_num_experts: with the padding that divides them over devices.

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
        """The same experts, padded to divide over `tp_size` devices. No token is ever sent to the padding."""
        return dataclasses.replace(self, padded_num_experts=round_up(self.num_experts, tp_size))


class Experts(nnx.Module):
    """A router and gated feed-forwards. Each device holds whole experts, and the devices' outputs are summed."""

    def __init__(self, width: int, c: MoeConfig) -> None:
        self.router = weight(width, c.num_experts, axes=("embed", "router"))
        self.gate_up = weight(
            c.padded_num_experts, width, 2, c.intermediate_size, axes=("experts", "embed", "pair", "expert_mlp")
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
        grouped_mlp = ragged_dot_mlp if jax.default_backend() == "tpu" else blockwise_mlp

        def run(
            shard: Int[ArrayLike, ""],
            x: Float[Array, "T D"],
            weights: Float32[Array, "T k"],
            expert_ids: Int[Array, "T k"],
            *params: WeightValue,
        ) -> Float[Array, "T D"]:
            local_ids = expert_ids - shard * params[0].shape[0]
            return routed_experts(x, weights, local_ids, *params, block=block, grouped_mlp=grouped_mlp)

        whole = (("position", "embed"), ("position", "router"), ("position", "router"))
        split = (("experts", "embed", "pair", "expert_mlp"), ("experts", "expert_mlp", "embed"))
        return sum_over_shards(run, (*whole, *split))(
            x, weights, expert_ids.astype(jnp.int32), self.gate_up.stored, self.down.stored
        )


def block_rows(rows: int, experts: int) -> int:
    """Rows of one expert that are multiplied at once, a power of two.

    On an accelerator reading weights dominates, so that most experts should fit one block: four times the mean. A CPU
    pays for every row of padding: with 64 experts of 512 x 256 and 256 tokens of 8 experts each, blocks of 16 and 32
    rows took 53 and 91 ms, of 128 rows 205 ms.
    """
    platform = jax.default_backend()
    wanted = -(-rows * (1 if platform == "cpu" else 4) // experts)
    return min(1 << (wanted - 1).bit_length(), MAX_BLOCK_ROWS.get(platform, 128))


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
    """The sum over j of weights[t, j] * expert expert_ids[t, j] of x[t].

    gate_up and down hold experts 0..n-1; any other id adds nothing. Rows are sorted by expert, so that each weight is
    read once, and put back, so that a token's sum always has the same order.
    """
    tokens, top = expert_ids.shape
    experts = gate_up.shape[0]
    expert_of = jnp.where((expert_ids >= 0) & (expert_ids < experts), expert_ids, experts).reshape(-1)
    order = jnp.argsort(expert_of, stable=True).astype(jnp.int32)
    counts = jnp.zeros(experts, jnp.int32).at[expert_of].add(1, mode="drop")
    out = grouped_mlp(jnp.take(x, order // top, axis=0), gate_up, down, counts, block)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    out = jnp.take(out, inverse, axis=0).reshape(tokens, top, -1).astype(jnp.float32)
    return jnp.einsum("tkd,tk->td", out, weights).astype(x.dtype)


def blockwise_mlp(
    rows: Float[Array, "A D"], gate_up: WeightValue, down: WeightValue, counts: Int[Array, "n"], block: int
) -> Float[Array, "A D"]:
    """Each expert on its counts[e] rows, `block` at a time; zero after the last expert's rows.

    jax's own ragged_dot multiplies every row with every expert on CPUs and GPUs: 128 experts, 128 times the work.
    """
    size, experts = rows.shape[0], gate_up.shape[0]
    ends = jnp.cumsum(counts)
    blocks = (counts + (block - 1)) // block
    block_ends = jnp.cumsum(blocks)
    padded = jnp.pad(rows, ((0, block), (0, 0)))

    def one(i: Int[Array, ""], out: Float[Array, "padded D"]) -> Float[Array, "padded D"]:
        expert = jnp.searchsorted(block_ends, i, side="right").clip(0, experts - 1)
        at = ends[expert] - counts[expert] + (i - block_ends[expert] + blocks[expert]) * block
        at = jnp.where(i < block_ends[-1], at, size)  # surplus blocks are written past the end
        y = jax.lax.dynamic_slice_in_dim(padded, at, block)
        y = weight_einsum("bd,dpf->bpf", y, index_value(gate_up, expert))
        y = weight_einsum("bf,fd->bd", jax.nn.silu(y[:, 0]) * y[:, 1], index_value(down, expert))
        own = at + jnp.arange(block, dtype=jnp.int32) < ends[expert]
        # The last rows of a block may be the next expert's, which overwrites them later.
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(own[:, None], y, jnp.zeros_like(y)), at, 0)

    # On an accelerator a loop of unknown length waits for the host at each iteration.
    most = min(size, experts + size // block)
    iterations = block_ends[-1] if jax.default_backend() == "cpu" else most
    return jax.lax.fori_loop(0, iterations, one, jnp.zeros_like(padded))[:size]


def ragged_dot_mlp(
    rows: Float[Array, "A D"], gate_up: WeightValue, down: WeightValue, counts: Int[Array, "n"], block: int
) -> Float[Array, "A D"]:
    """The same by XLA's ragged product, which TPUs have an instruction for."""
    gate_up, down = dequantize(gate_up), dequantize(down)
    experts, width, _, mlp = gate_up.shape
    y = jax.lax.ragged_dot(rows, gate_up.reshape(experts, width, 2 * mlp), counts)
    y = jax.lax.ragged_dot(jax.nn.silu(y[:, :mlp]) * y[:, mlp:], down, counts)
    real = jnp.arange(rows.shape[0], dtype=jnp.int32) < counts.sum()
    return jnp.where(real[:, None], y, jnp.zeros_like(y))
