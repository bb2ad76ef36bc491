"""The language model that most families share: Llama's, Qwen2's and Qwen3's decoder over a paged pool."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.batch import Batch, Pool
from mmjax.nn.attention import attend
from mmjax.nn.layers import shared
from mmjax.nn.moe import Experts, MoeConfig
from mmjax.nn.norm import rms_norm
from mmjax.nn.rope import Rope, rotate
from mmjax.nn.weight import weight
from mmjax.sharding import up


def split_heads(kv_heads: int, group: int, ways: int) -> tuple[int, int]:
    """(kv_heads, group) that divide over `ways` devices.

    Key/value heads are repeated, each copy serving a part of its queries, when that comes out even; otherwise
    heads of zeros are added, which attend to nothing and write nothing.
    """
    if kv_heads % ways == 0:
        return kv_heads, group
    copies, rest = divmod(ways, kv_heads)
    if rest == 0 and group % copies == 0:
        return ways, group // copies
    return up(kv_heads, ways), group


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder. `vocab` counts real tokens; `rows` counts rows of the (padded) embedding.

    qk_norm: whether each head's queries and keys are normed before they turn. moe: the experts, of the layers that
    have some in place of a feed-forward.
    """

    width: int
    depth: int
    kv_heads: int
    group: int
    head_dim: int
    mlp: int
    vocab: int
    rows: int
    eps: float
    rope: Rope
    bias: bool
    tied: bool
    max_len: int
    qk_norm: bool = False
    moe: MoeConfig | None = None

    @classmethod
    def from_hf(
        cls, text: dict[str, Any], *, bias: bool, tied: bool, qk_norm: bool = False, renormalise: bool | None = None
    ) -> DecoderConfig:
        """From the text part of config.json; `bias` for q, k, v; `tied` when the head is the embedding; `renormalise`
        see `MoeConfig.from_hf`."""
        heads = text["num_attention_heads"]
        kv_heads = text.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        head_dim = text.get("head_dim") or text["hidden_size"] // heads
        scaling = text.get("rope_parameters") or text.get("rope_scaling")
        theta = text.get("rope_theta") or (scaling or {}).get("rope_theta", 10000.0)
        if scaling:
            limits = ("max_position_embeddings", "original_max_position_embeddings")
            scaling = {name: text[name] for name in limits if name in text} | scaling
        return cls(
            width=text["hidden_size"],
            depth=text["num_hidden_layers"],
            kv_heads=kv_heads,
            group=heads // kv_heads,
            head_dim=head_dim,
            mlp=text["intermediate_size"],
            vocab=text["vocab_size"],
            rows=text["vocab_size"],
            eps=text["rms_norm_eps"],
            rope=Rope.from_hf(head_dim, theta, scaling),
            bias=bias,
            tied=tied,
            max_len=text["max_position_embeddings"],
            qk_norm=qk_norm,
            moe=MoeConfig.from_hf(text, renormalise=renormalise),
        )

    def split(self, ways: int) -> DecoderConfig:
        """The same decoder with every sharded size a multiple of `ways`."""
        kv_heads, group = split_heads(self.kv_heads, self.group, ways)
        moe = self.moe and self.moe.split(ways)
        return dataclasses.replace(
            self, kv_heads=kv_heads, group=group, mlp=up(self.mlp, ways), rows=up(self.rows, ways), moe=moe
        )

    def within(self, longest: int) -> DecoderConfig:
        """The same decoder for sequences of at most `longest` tokens."""
        return dataclasses.replace(self, rope=self.rope.within(longest))

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 * self.rope.factor**2


class Block(nnx.Module):
    """Attention and gated feed-forward or experts, each behind an RMS norm."""

    def __init__(self, c: DecoderConfig, *, sparse: bool = False) -> None:
        d, k, g, h, f = c.width, c.kv_heads, c.group, c.head_dim, c.mlp
        self.attn_norm = weight(d, axes=("embed",))
        self.qkv = weight(d, k, g + 2, h, axes=("embed", "kv_heads", "group_kv", "head_dim"))
        self.qkv_bias = weight(k, g + 2, h, axes=("kv_heads", "group_kv", "head_dim")) if c.bias else None
        self.o = weight(k, g, h, d, axes=("kv_heads", "group", "head_dim", "embed"))
        self.q_norm = weight(h, axes=("head_dim",)) if c.qk_norm else None
        self.k_norm = weight(h, axes=("head_dim",)) if c.qk_norm else None
        self.mlp_norm = weight(d, axes=("embed",))
        self.experts = Experts(d, c.moe) if sparse and c.moe else None
        if self.experts is None:
            self.gate_up = weight(d, 2, f, axes=("embed", "pair", "mlp"))
            self.down = weight(f, d, axes=("mlp", "embed"))
        self.c = c

    def __call__(
        self, x: jax.Array, angles: jax.Array, pool: Pool, batch: Batch, first: jax.Array
    ) -> tuple[jax.Array, Pool]:
        """x [T, D] and f32[T, H/2] angles to [T, D] and the pool with this layer's keys written."""
        y = rms_norm(x, self.attn_norm[...], self.c.eps)
        qkv = self.qkv.einsum("td,dkgh->tkgh", y)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        turned = rotate(self._normed(qkv[:, :, :-1]), angles)
        y, pool = attend(turned[:, :, :-1], turned[:, :, -1], qkv[:, :, -1], pool, batch, first, scale=self.c.scale)
        x = x + self.o.einsum("tkgh,kghd->td", y)
        y = rms_norm(x, self.mlp_norm[...], self.c.eps)
        if self.experts is not None:
            return x + self.experts(y), pool
        y = self.gate_up.einsum("td,dpf->tpf", y)
        return x + self.down.einsum("tf,fd->td", jax.nn.silu(y[:, 0]) * y[:, 1]), pool

    def _normed(self, qk: jax.Array) -> jax.Array:
        """[T, K, G + 1, H] queries and key of each key head, normed over H if this model does so."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        q = jnp.broadcast_to(self.q_norm[...], (self.c.group, self.c.head_dim))
        return rms_norm(qk, jnp.concatenate([q, self.k_norm[...][None]]), self.c.eps)


class Decoder(nnx.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, c: DecoderConfig) -> None:
        self.embed = weight(c.rows, c.width, axes=("vocab", "embed"))
        # Listed, not stacked: a scan over stacked weights copies each layer's weights out before use, which made a
        # decode step 1.9 to 2.8 times slower on an H100.
        dense = range(c.depth) if c.moe is None else c.moe.dense
        self.layers = nnx.List([Block(c, sparse=i not in dense) for i in range(c.depth)])
        self.norm = weight(c.width, axes=("embed",))
        self.head = None if c.tied else weight(c.rows, c.width, axes=("vocab", "embed"))
        self.c = c

    def __call__(self, batch: Batch, pool: Pool, slab: jax.Array) -> tuple[jax.Array, Pool]:
        """Final hidden states [T, D] of a batch; `slab` [M, D * (1 + n)] holds the media rows its tokens may name.

        The first D numbers of a row stand in for the token's embedding; the n sets beside are added after the first n
        blocks.
        """
        x = self.embed.look_up(batch.tokens).astype(slab.dtype)
        media, here = jnp.take(slab, batch.media, axis=0, mode="clip"), batch.media[:, None] >= 0
        width = x.shape[-1]
        x = jnp.where(here, media[:, :width], x)
        angles = self.c.rope.angles(batch.positions)
        stride = pool.k.shape[0] // self.c.depth
        for i, block in enumerate(shared(self.layers, Block.__call__)):
            x, pool = block(x, angles, pool, batch, jnp.int32(i * stride))
            if media.shape[1] >= (i + 2) * width:
                x = x + jnp.where(here, media[:, (i + 1) * width : (i + 2) * width], jnp.zeros_like(x))
        return rms_norm(x, self.norm[...], self.c.eps), pool

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[S, D] to f32[S, V] over the real vocabulary."""
        head = self.embed if self.head is None else self.head
        out = head.einsum("sd,vd->sv", hidden, preferred_element_type=jnp.float32)
        return out[:, : self.c.vocab]
