"""Whisper: an audio encoder whose keys and values live in the pool's pages beside the decoder's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.batch import Batch, KVCache
from mmjax.nn.attention import attend, cross_attend, write_kv
from mmjax.nn.audio.whisper import EPS, WhisperEncoder, WhisperEncoderConfig
from mmjax.nn.encoder import ACTIVATIONS
from mmjax.nn.layers import traced_once
from mmjax.nn.norm import layer_norm
from mmjax.nn.weight import weight
from mmjax.processors.whisper import window_fields
from mmjax.sharding import round_up
from mmjax.spec import EncoderSpec, ModelSpec


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; `heads` and `mlp` of the decoder, `audio` of the encoder. `rows` counts rows of the padded embedding."""

    audio: WhisperEncoderConfig
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    padded_vocab_size: int
    max_positions: int
    act: str

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json. The head is always the embedding."""
        width = config["d_model"]
        return cls(
            audio=WhisperEncoderConfig.from_hf(config),
            hidden_size=width,
            num_layers=config["decoder_layers"],
            num_heads=config["decoder_attention_heads"],
            head_dim=width // config["decoder_attention_heads"],
            intermediate_size=config["decoder_ffn_dim"],
            vocab_size=config["vocab_size"],
            padded_vocab_size=config["vocab_size"],
            max_positions=config["max_target_positions"],
            act=config["activation_function"],
        )

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine."""
        steps = self.audio.window_steps
        encoder = EncoderSpec(window_fields(self.audio.num_mel_bins, 2 * steps), ("audio",), keys_per_input=steps)
        return ModelSpec(
            num_layers=self.num_layers,
            num_kv_heads=self.num_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_positions=self.max_positions,
            encoders={"audio": encoder},
            is_encoder_decoder=True,
        )

    def for_tp(self, tp_size: int) -> Config:
        """The same sizes, padded to divide over `ways` devices."""
        return dataclasses.replace(
            self,
            audio=self.audio.for_tp(tp_size),
            num_heads=round_up(self.num_heads, tp_size),
            intermediate_size=round_up(self.intermediate_size, tp_size),
            padded_vocab_size=round_up(self.padded_vocab_size, tp_size),
        )

    def for_max_len(self, max_model_len: int) -> Config:
        """The same: positions are learned."""
        return self


class Block(nnx.Module):
    """Self attention, cross attention and feed-forward, each behind a layer norm."""

    def __init__(self, c: Config) -> None:
        d, n, h, f = c.hidden_size, c.num_heads, c.head_dim, c.intermediate_size
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

    def __call__(
        self, x: jax.Array, kv_cache: KVCache, batch: Batch, first_block: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """x [T, D] to [T, D] and the pool with this layer's keys written."""
        scale = self.c.head_dim**-0.5
        y = layer_norm(x, self.attn_norm[...], self.attn_norm_bias[...], EPS)
        qkv = self.qkv.einsum("td,dkgh->tkgh", y) + self.qkv_bias[...]
        y, kv_cache = attend(qkv[:, :, :1], qkv[:, :, 1], qkv[:, :, 2], kv_cache, batch, first_block, scale=scale)
        x = x + self.o.einsum("tkgh,kghd->td", y) + self.o_bias[...]
        y = layer_norm(x, self.cross_norm[...], self.cross_norm_bias[...], EPS)
        q = self.cross_q.einsum("td,dkgh->tkgh", y) + self.cross_q_bias[...]
        y = cross_attend(q, kv_cache, batch, first_block, scale=scale)
        x = x + self.cross_o.einsum("tkgh,kghd->td", y) + self.cross_o_bias[...]
        y = layer_norm(x, self.mlp_norm[...], self.mlp_norm_bias[...], EPS)
        y = ACTIVATIONS[self.c.act](self.fc1.einsum("td,df->tf", y) + self.fc1_bias[...])
        return x + self.fc2.einsum("tf,fd->td", y) + self.fc2_bias[...], kv_cache

    def write_cross_kv(
        self, encoded: jax.Array, kv_cache: KVCache, slot_mapping: jax.Array, first_block: jax.Array
    ) -> KVCache:
        """Write the keys and values of encoded [U * frames, D] at this layer's slots."""
        kv = self.cross_kv.einsum("td,dkph->tkph", encoded) + self.cross_kv_bias[...]
        return write_kv(kv[:, :, 0], kv[:, :, 1], kv_cache, slot_mapping, first_block)


class Text(nnx.Module):
    """The decoder."""

    def __init__(self, c: Config) -> None:
        self.embed = weight(c.padded_vocab_size, c.hidden_size, axes=("vocab", "embed"))
        self.positions = weight(c.max_positions, c.hidden_size, axes=("position", "embed"))
        self.layers = nnx.List([Block(c) for _ in range(c.num_layers)])
        self.norm = weight(c.hidden_size, axes=("embed",))
        self.norm_bias = weight(c.hidden_size, axes=("embed",))


class Model(nnx.Module):
    """See `mmjax.models.base.CrossModel`."""

    def __init__(self, c: Config) -> None:
        self.text = Text(c)
        self.audio = WhisperEncoder(c.audio)
        self.c = c

    def __call__(self, batch: Batch, kv_cache: KVCache, mm_embeds: jax.Array) -> tuple[jax.Array, KVCache]:
        text = self.text
        x = text.embed.lookup(batch.token_ids).astype(mm_embeds.dtype)
        x = x + jnp.take(text.positions[...], batch.rope_positions[0], axis=0, mode="clip")
        stride = kv_cache.k.shape[0] // self.c.num_layers
        for i, block in enumerate(traced_once(text.layers, Block.__call__)):
            x, kv_cache = block(x, kv_cache, batch, jnp.int32(i * stride))
        return layer_norm(x, text.norm[...], text.norm_bias[...], EPS), kv_cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        out = self.text.embed.einsum("sd,vd->sv", hidden, preferred_element_type=jnp.float32)
        return out[:, : self.c.vocab_size]

    def encode(self, name: str, features: Mapping[str, jax.Array]) -> jax.Array:
        return self.audio.encode_windows(features["mel"])

    def write_cross_kv(self, encoded: jax.Array, kv_cache: KVCache, slot_mapping: jax.Array) -> KVCache:
        stride = kv_cache.k.shape[0] // self.c.num_layers
        for i, cross in enumerate(traced_once(self.text.layers, Block.write_cross_kv)):
            kv_cache = cross(encoded, kv_cache, slot_mapping, jnp.int32(i * stride))
        return kv_cache
