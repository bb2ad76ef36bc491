"""The decoder of Llama, Qwen2 and Qwen3 over a paged KV cache: the language model of all families but Whisper."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from mmjax.batch import Batch, KVCache
from mmjax.nn import decode_step
from mmjax.nn.activations import ACTIVATIONS
from mmjax.nn.attention import attend
from mmjax.nn.layers import jit_layers
from mmjax.nn.moe import Experts, MoeConfig
from mmjax.nn.norm import rms_norm
from mmjax.nn.rope import Rope, apply_partial_rope, apply_rope
from mmjax.nn.weight import Weight, weight
from mmjax.sharding import round_up


def split_heads(kv_heads: int, q_per_kv: int, tp_size: int) -> tuple[int, int]:
    """(kv_heads, q_per_kv) that divide over `tp_size` devices.

    Key/value heads are repeated if that divides evenly, each copy with a part of its query heads. Otherwise heads of
    zeros are added, whose output is zero.
    """
    if kv_heads % tp_size == 0:
        return kv_heads, q_per_kv
    copies, rest = divmod(tp_size, kv_heads)
    if rest == 0 and q_per_kv % copies == 0:
        return tp_size, q_per_kv // copies
    return round_up(kv_heads, tp_size), q_per_kv


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; `text_config` reads them from config.json.

    q_per_kv: query heads per key/value head. padded_vocab_size: rows of the embedding, padding included. act: a key of
    ACTIVATIONS. bias: of q, k and v. qk_norm: whether each head's queries and keys are normalized before rotary
    positions. moe: the experts of the layers that have them in place of a feed-forward. windows: for each layer, how
    many keys a token attends to, its own included, or None for all; () if all layers attend to all.
    """

    hidden_size: int
    num_layers: int
    num_kv_heads: int
    q_per_kv: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    padded_vocab_size: int
    eps: float
    rope: Rope
    bias: bool
    tie_embeddings: bool
    max_positions: int
    act: str = "silu"
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    moe: MoeConfig | None = None
    windows: tuple[int | None, ...] = ()

    def for_tp(self, tp_size: int) -> DecoderConfig:
        """The same decoder with every sharded size a multiple of `tp_size`."""
        kv_heads, group = split_heads(self.num_kv_heads, self.q_per_kv, tp_size)
        moe = self.moe and self.moe.for_tp(tp_size)
        return dataclasses.replace(
            self,
            num_kv_heads=kv_heads,
            q_per_kv=group,
            intermediate_size=round_up(self.intermediate_size, tp_size),
            padded_vocab_size=round_up(self.padded_vocab_size, tp_size),
            moe=moe,
        )

    def for_max_len(self, max_model_len: int) -> DecoderConfig:
        """The same decoder for sequences of at most `max_model_len` tokens."""
        windows = tuple(None if window is None or window >= max_model_len else window for window in self.windows)
        return dataclasses.replace(
            self, rope=self.rope.for_max_len(max_model_len), windows=windows if any(windows) else ()
        )

    def window(self, layer: int) -> int | None:
        """How many keys a token attends to in a layer; None: all."""
        return self.windows[layer] if self.windows else None

    @property
    def partial_rope(self) -> bool:
        """Whether only the first numbers of a head are rotated."""
        return 2 * len(self.rope.inv_freq) < self.head_dim

    @property
    def scale(self) -> float:
        """The factor that attention scores are multiplied by, with that of rotated queries and keys in it."""
        return self.head_dim**-0.5 * (1.0 if self.partial_rope else self.rope.attention_factor**2)


class DecoderLayer(nnx.Module):
    """Attention, then a gated feed-forward or experts, each after an RMS norm. window: see `attend`."""

    def __init__(self, c: DecoderConfig, *, sparse: bool = False, window: int | None = None) -> None:
        d, k, g, h, f = c.hidden_size, c.num_kv_heads, c.q_per_kv, c.head_dim, c.intermediate_size
        self.attn_norm = weight(d, axes=("embed",))
        self.qkv = weight(d, k, g + 2, h, axes=("embed", "kv_heads", "group_kv", "head_dim"))
        self.qkv_bias = weight(k, g + 2, h, axes=("kv_heads", "group_kv", "head_dim")) if c.bias else None
        self.o = weight(k, g, h, d, axes=("kv_heads", "group", "head_dim", "embed"))
        self.o_bias = weight(d, axes=("embed",)) if c.o_bias else None
        self.q_norm = weight(h, axes=("head_dim",)) if c.qk_norm else None
        self.k_norm = weight(h, axes=("head_dim",)) if c.qk_norm else None
        self.mlp_norm = weight(d, axes=("embed",))
        self.experts = Experts(d, c.moe) if sparse and c.moe else None
        if self.experts is None:
            self.gate_up = weight(d, 2, f, axes=("embed", "pair", "mlp"))
            self.down = weight(f, d, axes=("mlp", "embed"))
            self.gate_up_bias = weight(2, f, axes=("pair", "mlp")) if c.mlp_bias else None
            self.down_bias = weight(d, axes=("embed",)) if c.mlp_bias else None
        self.window = window
        self.c = c

    def __call__(
        self,
        x: Float[Array, "T D"],
        angles: Float32[Array, "T half_R"],
        kv_cache: KVCache,
        batch: Batch,
        first_block: Int[Array, ""],
    ) -> tuple[Float[Array, "T D"], KVCache]:
        """The layer's output, and the cache with its keys and values written from block `first_block` on."""
        with jax.named_scope("attn"):
            y = rms_norm(x, self.attn_norm[...], self.c.eps)
            qkv = self.qkv.einsum("td,dkgh->tkgh", y)
            if self.qkv_bias is not None:
                qkv = qkv + self.qkv_bias[...]
            qk = self._rotated(self._qk_norm(qkv[:, :, :-1]), angles)
            q, k, v = qk[:, :, :-1], qk[:, :, -1], qkv[:, :, -1]
            y, kv_cache = attend(q, k, v, kv_cache, batch, first_block, scale=self.c.scale, window=self.window)
            x = x + _plus(self.o.einsum("tkgh,kghd->td", y), self.o_bias)
        with jax.named_scope("mlp"):
            y = rms_norm(x, self.mlp_norm[...], self.c.eps)
            if self.experts is not None:
                return x + self.experts(y), kv_cache
            y = _plus(self.gate_up.einsum("td,dpf->tpf", y), self.gate_up_bias)
            y = ACTIVATIONS[self.c.act](y[:, 0]) * y[:, 1]
            return x + _plus(self.down.einsum("tf,fd->td", y), self.down_bias), kv_cache

    def _rotated(
        self, qk: Float[Array, "T K heads H"], angles: Float32[Array, "T half_R"]
    ) -> Float[Array, "T K heads H"]:
        """Queries and keys rotated by their positions."""
        if self.c.partial_rope:
            return apply_partial_rope(qk, angles, self.c.rope.attention_factor)
        return apply_rope(qk, angles)

    def _qk_norm(self, qk: Float[Array, "T K heads H"]) -> Float[Array, "T K heads H"]:
        """The queries and the key of each key head, normalized over H if the model does so."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        q = jnp.broadcast_to(self.q_norm[...], (self.c.q_per_kv, self.c.head_dim))
        return rms_norm(qk, jnp.concatenate([q, self.k_norm[...][None]]), self.c.eps)


def _plus(x: Float[Array, "*shape"], bias: Weight | None) -> Float[Array, "*shape"]:
    """x with the bias added if there is one."""
    return x if bias is None else x + bias[...]


class Decoder(nnx.Module):
    """Embedding, layers, final norm and head."""

    def __init__(self, c: DecoderConfig) -> None:
        self.embed = weight(c.padded_vocab_size, c.hidden_size, axes=("vocab", "embed"))
        # A list, not stacked weights: a scan copies the weights of each layer before it uses them, which made a decode
        # step 1.9 to 2.8 times slower on an H100.
        dense = range(c.num_layers) if c.moe is None else c.moe.dense_layers
        self.layers = nnx.List(
            [DecoderLayer(c, sparse=i not in dense, window=c.window(i)) for i in range(c.num_layers)]
        )
        self.norm = weight(c.hidden_size, axes=("embed",))
        self.head = None if c.tie_embeddings else weight(c.padded_vocab_size, c.hidden_size, axes=("vocab", "embed"))
        self.c = c

    @jax.named_scope("decoder")
    def __call__(
        self, batch: Batch, kv_cache: KVCache, mm_embeds: Float[Array, "M W"]
    ) -> tuple[Float[Array, "T D"], KVCache]:
        """Hidden states after the final norm, and the cache with the batch's keys and values written.

        mm_embeds: the media embeddings that `batch.mm_index` refers to, D * (1 + n) numbers each. The first D replace
        the token's embedding; the other n sets of D are added to the outputs of the first n layers (DeepStack).
        """
        with jax.named_scope("embed"):
            x = self.embed.lookup(batch.token_ids).astype(mm_embeds.dtype)
            media, is_media = jnp.take(mm_embeds, batch.mm_index, axis=0, mode="clip"), batch.mm_index[:, None] >= 0
            width = x.shape[-1]
            x = jnp.where(is_media, media[:, :width], x)
        angles = self.c.rope.angles(batch.rope_positions)
        if decode_step.can_run(self.c, x, kv_cache, batch):  # a step's tokens are never media
            return decode_step.run(self.layers, self.c, self.norm[...], x, angles, kv_cache, batch)
        num_blocks = kv_cache.k.shape[0] // self.c.num_layers
        for i, layer in enumerate(jit_layers(self.layers, DecoderLayer.__call__)):
            with jax.named_scope(f"layer_{i}"):
                x, kv_cache = layer(x, angles, kv_cache, batch, jnp.int32(i * num_blocks))
                if media.shape[1] >= (i + 2) * width:
                    x = x + jnp.where(is_media, media[:, (i + 1) * width : (i + 2) * width], jnp.zeros_like(x))
        with jax.named_scope("norm"):
            return rms_norm(x, self.norm[...], self.c.eps), kv_cache

    @jax.named_scope("logits")
    def logits(self, hidden: Float[Array, "S D"]) -> Float32[Array, "S V"]:
        """Logits over the vocabulary, without its padding."""
        head = self.embed if self.head is None else self.head
        return head.logits(hidden, self.c.vocab_size)
