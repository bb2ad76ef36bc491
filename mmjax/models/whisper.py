"""Whisper: an audio encoder, and a decoder with cross attention to it, whose keys are in the KV cache too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from mmjax.batch import Batch, KVCache
from mmjax.nn.activations import ACTIVATIONS, activation_of
from mmjax.nn.attention import attend, cross_attend, write_kv
from mmjax.nn.audio.whisper import EPS, WhisperEncoder, WhisperEncoderConfig
from mmjax.nn.encoder import Features
from mmjax.nn.layers import jit_layers
from mmjax.nn.norm import layer_norm
from mmjax.nn.weight import weight
from mmjax.processors.whisper import window_fields
from mmjax.sharding import round_up
from mmjax.spec import EncoderSpec, ModelSpec


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the encoder, in `audio`, and of the decoder. padded_vocab_size: rows of the embedding with padding."""

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
        """From config.json. The head is the embedding, whatever `tied` says."""
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
            act=activation_of(config, "activation_function", "gelu"),
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
        """The same sizes, padded to divide over `tp_size` devices."""
        return dataclasses.replace(
            self,
            audio=self.audio.for_tp(tp_size),
            num_heads=round_up(self.num_heads, tp_size),
            intermediate_size=round_up(self.intermediate_size, tp_size),
            padded_vocab_size=round_up(self.padded_vocab_size, tp_size),
        )

    def for_max_len(self, max_model_len: int) -> Config:
        """The same configuration: positions are a stored table."""
        return self


class WhisperDecoderLayer(nnx.Module):
    """Self attention, cross attention and feed-forward, each after a layer norm."""

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
        self, x: Float[Array, "T D"], kv_cache: KVCache, batch: Batch, first_block: Int[Array, ""]
    ) -> tuple[Float[Array, "T D"], KVCache]:
        """The layer's output, and the cache with its keys and values written from block `first_block` on."""
        scale = self.c.head_dim**-0.5
        with jax.named_scope("attn"):
            y = layer_norm(x, self.attn_norm[...], self.attn_norm_bias[...], EPS)
            qkv = self.qkv.einsum("td,dkgh->tkgh", y) + self.qkv_bias[...]
            y, kv_cache = attend(qkv[:, :, :1], qkv[:, :, 1], qkv[:, :, 2], kv_cache, batch, first_block, scale=scale)
            x = x + self.o.einsum("tkgh,kghd->td", y) + self.o_bias[...]
        with jax.named_scope("cross_attn"):
            y = layer_norm(x, self.cross_norm[...], self.cross_norm_bias[...], EPS)
            q = self.cross_q.einsum("td,dkgh->tkgh", y) + self.cross_q_bias[...]
            y = cross_attend(q, kv_cache, batch, first_block, scale=scale)
            x = x + self.cross_o.einsum("tkgh,kghd->td", y) + self.cross_o_bias[...]
        with jax.named_scope("mlp"):
            y = layer_norm(x, self.mlp_norm[...], self.mlp_norm_bias[...], EPS)
            y = ACTIVATIONS[self.c.act](self.fc1.einsum("td,df->tf", y) + self.fc1_bias[...])
            return x + self.fc2.einsum("tf,fd->td", y) + self.fc2_bias[...], kv_cache

    def write_cross_kv(
        self,
        encoded: Float[Array, "U D"],
        kv_cache: KVCache,
        slot_mapping: Int[Array, "U"],
        first_block: Int[Array, ""],
    ) -> KVCache:
        """Write the cross-attention keys and values of the encoder's output at the slots of this layer."""
        kv = self.cross_kv.einsum("td,dkph->tkph", encoded) + self.cross_kv_bias[...]
        return write_kv(kv[:, :, 0], kv[:, :, 1], kv_cache, slot_mapping, first_block)


class WhisperDecoder(nnx.Module):
    """The weights of the decoder."""

    def __init__(self, c: Config) -> None:
        self.embed = weight(c.padded_vocab_size, c.hidden_size, axes=("vocab", "embed"))
        self.positions = weight(c.max_positions, c.hidden_size, axes=("position", "embed"))
        self.layers = nnx.List([WhisperDecoderLayer(c) for _ in range(c.num_layers)])
        self.norm = weight(c.hidden_size, axes=("embed",))
        self.norm_bias = weight(c.hidden_size, axes=("embed",))


class Model(nnx.Module):
    """See `mmjax.models.base.CrossModel`."""

    def __init__(self, c: Config) -> None:
        self.text = WhisperDecoder(c)
        self.audio = WhisperEncoder(c.audio)
        self.c = c

    @jax.named_scope("decoder")
    def __call__(
        self, batch: Batch, kv_cache: KVCache, mm_embeds: Float[Array, "M W"]
    ) -> tuple[Float[Array, "T D"], KVCache]:
        text = self.text
        with jax.named_scope("embed"):
            x = text.embed.lookup(batch.token_ids).astype(mm_embeds.dtype)
            x = x + jnp.take(text.positions[...], batch.rope_positions[0], axis=0, mode="clip")
        num_blocks = kv_cache.k.shape[0] // self.c.num_layers
        for i, layer in enumerate(jit_layers(text.layers, WhisperDecoderLayer.__call__)):
            with jax.named_scope(f"layer_{i}"):
                x, kv_cache = layer(x, kv_cache, batch, jnp.int32(i * num_blocks))
        with jax.named_scope("norm"):
            return layer_norm(x, text.norm[...], text.norm_bias[...], EPS), kv_cache

    @jax.named_scope("logits")
    def logits(self, hidden: Float[Array, "S D"]) -> Float32[Array, "S V"]:
        out = self.text.embed.einsum("sd,vd->sv", hidden, preferred_element_type=jnp.float32)
        return out[:, : self.c.vocab_size]

    def encode(self, name: str, features: Features) -> Float[Array, "E W"]:
        return self.audio.encode_windows(features["mel"])

    @jax.named_scope("decoder")
    def write_cross_kv(self, encoded: Float[Array, "U D"], kv_cache: KVCache, slot_mapping: Int[Array, "U"]) -> KVCache:
        num_blocks = kv_cache.k.shape[0] // self.c.num_layers
        for i, write in enumerate(jit_layers(self.text.layers, WhisperDecoderLayer.write_cross_kv)):
            with jax.named_scope(f"layer_{i}"):
                kv_cache = write(encoded, kv_cache, slot_mapping, jnp.int32(i * num_blocks))
        return kv_cache
