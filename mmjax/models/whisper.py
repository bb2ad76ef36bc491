"""Whisper: an audio encoder whose keys and values live in the pool's pages beside the decoder's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.batch import Batch, Pool
from mmjax.models.family import Encoder, Shape
from mmjax.nn.attention import attend, cross_attend, store
from mmjax.nn.audio import EPS, AudioConfig, AudioTower
from mmjax.nn.layers import shared
from mmjax.nn.norm import layer_norm
from mmjax.nn.tower import ACTIVATIONS
from mmjax.nn.weight import weight
from mmjax.sharding import up


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; `heads` and `mlp` of the decoder, `audio` of the encoder. `rows` counts rows of the padded embedding."""

    audio: AudioConfig
    width: int
    depth: int
    heads: int
    head_dim: int
    mlp: int
    vocab: int
    rows: int
    max_len: int
    act: str

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json. The head is always the embedding."""
        width = config["d_model"]
        return cls(
            audio=AudioConfig.from_hf(config),
            width=width,
            depth=config["decoder_layers"],
            heads=config["decoder_attention_heads"],
            head_dim=width // config["decoder_attention_heads"],
            mlp=config["decoder_ffn_dim"],
            vocab=config["vocab_size"],
            rows=config["vocab_size"],
            max_len=config["max_target_positions"],
            act=config["activation_function"],
        )

    @property
    def shape(self) -> Shape:
        """Sizes for the engine."""
        bins, steps = self.audio.bins, self.audio.steps
        encoder = Encoder(features={"mel": ((bins, 2 * steps), "float32", 0)}, kinds=("audio",), keys=steps)
        return Shape(
            layers=self.depth,
            kv_heads=self.heads,
            head_dim=self.head_dim,
            vocab=self.vocab,
            width=self.width,
            max_len=self.max_len,
            encoders={"audio": encoder},
            cross=True,
        )

    def split(self, ways: int) -> Config:
        """The same sizes, padded to divide over `ways` devices."""
        return dataclasses.replace(
            self,
            audio=self.audio.split(ways),
            heads=up(self.heads, ways),
            mlp=up(self.mlp, ways),
            rows=up(self.rows, ways),
        )


class Block(nnx.Module):
    """Self attention, cross attention and feed-forward, each behind a layer norm."""

    def __init__(self, c: Config) -> None:
        d, n, h, f = c.width, c.heads, c.head_dim, c.mlp
        out, back = ("kv_heads", "group", "head_dim", "embed"), ("embed",)
        self.attn_norm = weight(d, axes=back)
        self.attn_norm_bias = weight(d, axes=back)
        self.cross_norm = weight(d, axes=back)
        self.cross_norm_bias = weight(d, axes=back)
        self.mlp_norm = weight(d, axes=back)
        self.mlp_norm_bias = weight(d, axes=back)
        self.qkv = weight(d, n, 3, h, axes=("embed", "kv_heads", "group_kv", "head_dim"))
        self.qkv_bias = weight(n, 3, h, axes=("kv_heads", "group_kv", "head_dim"))
        self.o = weight(n, 1, h, d, axes=out)
        self.o_bias = weight(d, axes=back)
        self.cross_q = weight(d, n, 1, h, axes=("embed", "kv_heads", "group", "head_dim"))
        self.cross_q_bias = weight(n, 1, h, axes=("kv_heads", "group", "head_dim"))
        self.cross_kv = weight(d, n, 2, h, axes=("embed", "kv_heads", "pair", "head_dim"))
        self.cross_kv_bias = weight(n, 2, h, axes=("kv_heads", "pair", "head_dim"))
        self.cross_o = weight(n, 1, h, d, axes=out)
        self.cross_o_bias = weight(d, axes=back)
        self.fc1 = weight(d, f, axes=("embed", "mlp"))
        self.fc1_bias = weight(f, axes=("mlp",))
        self.fc2 = weight(f, d, axes=("mlp", "embed"))
        self.fc2_bias = weight(d, axes=back)
        self.c = c

    def __call__(self, x: jax.Array, pool: Pool, batch: Batch, first: jax.Array) -> tuple[jax.Array, Pool]:
        """x [T, D] to [T, D] and the pool with this layer's keys written."""
        scale = self.c.head_dim**-0.5
        y = layer_norm(x, self.attn_norm[...], self.attn_norm_bias[...], EPS)
        qkv = self.qkv.einsum("td,dkgh->tkgh", y) + self.qkv_bias[...]
        y, pool = attend(qkv[:, :, :1], qkv[:, :, 1], qkv[:, :, 2], pool, batch, first, scale=scale)
        x = x + self.o.einsum("tkgh,kghd->td", y) + self.o_bias[...]
        y = layer_norm(x, self.cross_norm[...], self.cross_norm_bias[...], EPS)
        q = self.cross_q.einsum("td,dkgh->tkgh", y) + self.cross_q_bias[...]
        y = cross_attend(q, pool, batch, first, scale=scale)
        x = x + self.cross_o.einsum("tkgh,kghd->td", y) + self.cross_o_bias[...]
        y = layer_norm(x, self.mlp_norm[...], self.mlp_norm_bias[...], EPS)
        y = ACTIVATIONS[self.c.act](self.fc1.einsum("td,df->tf", y) + self.fc1_bias[...])
        return x + self.fc2.einsum("tf,fd->td", y) + self.fc2_bias[...], pool

    def cross(self, encoded: jax.Array, pool: Pool, slot: jax.Array, first: jax.Array) -> Pool:
        """Write the keys and values of encoded [U * frames, D] at this layer's slots."""
        kv = self.cross_kv.einsum("td,dkph->tkph", encoded) + self.cross_kv_bias[...]
        return store(kv[:, :, 0], kv[:, :, 1], pool, slot, first)


class Text(nnx.Module):
    """The decoder."""

    def __init__(self, c: Config) -> None:
        self.embed = weight(c.rows, c.width, axes=("vocab", "embed"))
        self.positions = weight(c.max_len, c.width, axes=("place", "embed"))
        self.layers = nnx.List([Block(c) for _ in range(c.depth)])
        self.norm = weight(c.width, axes=("embed",))
        self.norm_bias = weight(c.width, axes=("embed",))


class Model(nnx.Module):
    """See `mmjax.models.family.CrossModel`."""

    def __init__(self, c: Config) -> None:
        self.text = Text(c)
        self.audio = AudioTower(c.audio)
        self.c = c

    def __call__(self, batch: Batch, pool: Pool, slab: jax.Array) -> tuple[jax.Array, Pool]:
        text = self.text
        x = text.embed.look_up(batch.tokens).astype(slab.dtype)
        x = x + jnp.take(text.positions[...], batch.positions[0], axis=0, mode="clip")
        stride = pool.k.shape[0] // self.c.depth
        for i, block in enumerate(shared(text.layers, Block.__call__)):
            x, pool = block(x, pool, batch, jnp.int32(i * stride))
        return layer_norm(x, text.norm[...], text.norm_bias[...], EPS), pool

    def logits(self, hidden: jax.Array) -> jax.Array:
        out = self.text.embed.einsum("sd,vd->sv", hidden, preferred_element_type=jnp.float32)
        return out[:, : self.c.vocab]

    def encode(self, name: str, features: Mapping[str, jax.Array]) -> jax.Array:
        return self.audio.windows(features["mel"])

    def cross(self, encoded: jax.Array, pool: Pool, slot: jax.Array) -> Pool:
        stride = pool.k.shape[0] // self.c.depth
        for i, cross in enumerate(shared(self.text.layers, Block.cross)):
            pool = cross(encoded, pool, slot, jnp.int32(i * stride))
        return pool
