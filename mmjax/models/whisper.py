"""Whisper: an audio encoder, and a decoder with cross attention to it, whose keys are in the KV cache too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from mmjax.batch import Batch, KVCache
from mmjax.hf_config import audio_options
from mmjax.mel import LogMel
from mmjax.nn.activations import ACTIVATIONS, activation_of
from mmjax.nn.attention import attend, cross_attend, write_kv
from mmjax.nn.audio.mel import log_mel
from mmjax.nn.audio.whisper import EPS, WhisperEncoder, WhisperEncoderConfig
from mmjax.nn.encoder import Features
from mmjax.nn.layers import jit_layers
from mmjax.nn.norm import layer_norm
from mmjax.nn.weight import weight
from mmjax.processors.whisper import ENGLISH_VOCAB_SIZE, window_fields
from mmjax.sharding import round_up
from mmjax.spec import EncoderSpec, ModelSpec

Heads = tuple[tuple[int, int], ...]
# Of the published models, by (decoder layers, heads, whether English only, mel bins): (layer, head). Their older files
# do not name them. The first release of the large model has the sizes of the second, and other heads.
PUBLISHED_HEADS: dict[tuple[int, int, bool, int], Heads] = {
    (4, 6, True, 80): ((1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4)),
    (4, 6, False, 80): ((2, 2), (3, 0), (3, 2), (3, 3), (3, 4), (3, 5)),
    (6, 8, True, 80): ((3, 3), (4, 7), (5, 1), (5, 5), (5, 7)),
    (6, 8, False, 80): ((3, 1), (4, 2), (4, 3), (4, 7), (5, 1), (5, 2), (5, 4), (5, 6)),
    (12, 12, True, 80): (
        (6, 6), (7, 0), (7, 3), (7, 8), (8, 2), (8, 5), (8, 7), (9, 0), (9, 4), (9, 8), (9, 10), (10, 0), (10, 1),
        (10, 2), (10, 3), (10, 6), (10, 11), (11, 2), (11, 4),
    ),
    (12, 12, False, 80): (
        (5, 3), (5, 9), (8, 0), (8, 4), (8, 7), (8, 8), (9, 0), (9, 7), (9, 9), (10, 5),
    ),
    (24, 16, True, 80): (
        (11, 4), (14, 1), (14, 12), (14, 14), (15, 4), (16, 0), (16, 4), (16, 9), (17, 12), (17, 14), (18, 7),
        (18, 10), (18, 15), (20, 0), (20, 3), (20, 9), (20, 14), (21, 12),
    ),
    (24, 16, False, 80): ((13, 15), (15, 4), (15, 15), (16, 1), (20, 0), (23, 4)),
    (32, 20, False, 80): (
        (10, 12), (13, 17), (16, 11), (16, 12), (16, 13), (17, 15), (17, 16), (18, 4), (18, 11), (18, 19), (19, 11),
        (21, 2), (21, 3), (22, 3), (22, 9), (22, 12), (23, 5), (23, 7), (23, 13), (25, 5), (26, 1), (26, 12), (27, 15),
    ),
    (32, 20, False, 128): (
        (7, 0), (10, 17), (12, 18), (13, 12), (16, 1), (17, 14), (19, 11), (21, 4), (24, 1), (25, 6),
    ),
    (4, 20, False, 128): ((2, 4), (2, 11), (3, 3), (3, 6), (3, 11), (3, 14)),
}  # fmt: skip


def alignment_heads(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Heads:
    """(layer, head) of the cross attention that follows the audio while the text is written: as generation_config.json
    says, or of the published model of this size, or all heads of the upper half of the layers, as Whisper's own code
    takes where it knows none. Raises ValueError for heads that the model does not have."""
    layers, heads = config["decoder_layers"], config["decoder_attention_heads"]
    given = generation.get("alignment_heads")
    if given:
        found = tuple((int(layer), int(head)) for layer, head in given)
        if not all(0 <= layer < layers and 0 <= head < heads for layer, head in found):
            raise ValueError(
                f"generation_config.json: alignment_heads names {given}, but the decoder has {layers} layers of "
                f"{heads} heads"
            )
        return found
    sizes = (layers, heads, config["vocab_size"] == ENGLISH_VOCAB_SIZE, config["num_mel_bins"])
    return PUBLISHED_HEADS.get(sizes) or tuple(
        (layer, head) for layer in range(layers // 2, layers) for head in range(heads)
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the encoder, in `audio`, of its input, in `mel`, and of the decoder. padded_vocab_size: rows of the
    embedding with padding. alignment_heads: see the function of this name."""

    audio: WhisperEncoderConfig
    mel: LogMel
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    padded_vocab_size: int
    max_positions: int
    act: str
    alignment_heads: Heads = ()

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json. The head is the embedding, whatever `tied` says."""
        width = config["d_model"]
        return cls(
            audio=WhisperEncoderConfig.from_hf(config),
            mel=LogMel.of_window(config, audio_options(files)),
            hidden_size=width,
            num_layers=config["decoder_layers"],
            num_heads=config["decoder_attention_heads"],
            head_dim=width // config["decoder_attention_heads"],
            intermediate_size=config["decoder_ffn_dim"],
            vocab_size=config["vocab_size"],
            padded_vocab_size=config["vocab_size"],
            max_positions=config["max_target_positions"],
            act=activation_of(config, "activation_function", "gelu"),
            alignment_heads=alignment_heads(config, files.get("generation_config.json", {})),
        )

    @property
    def spec(self) -> ModelSpec:
        """Sizes for the engine."""
        fields = window_fields(self.mel.samples)
        encoder = EncoderSpec(fields, ("audio",), keys_per_input=self.audio.window_steps)
        return ModelSpec(
            num_layers=self.num_layers,
            num_kv_heads=self.num_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_positions=self.max_positions,
            encoders={"audio": encoder},
            is_encoder_decoder=True,
            num_alignment_heads=len(self.alignment_heads),
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
            return self._mlp(x), kv_cache

    def _mlp(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        y = layer_norm(x, self.mlp_norm[...], self.mlp_norm_bias[...], EPS)
        y = ACTIVATIONS[self.c.act](self.fc1.einsum("td,df->tf", y) + self.fc1_bias[...])
        return x + self.fc2.einsum("tf,fd->td", y) + self.fc2_bias[...]

    def with_scores(
        self, x: Float[Array, "T D"], encoded: Float[Array, "U D"]
    ) -> tuple[Float[Array, "T D"], Float32[Array, "N T U"]]:
        """The layer's output for a whole transcript, and the scores of its cross attention before the softmax. It
        reads and writes no cache."""
        y = layer_norm(x, self.attn_norm[...], self.attn_norm_bias[...], EPS)
        qkv = self.qkv.einsum("td,dkgh->tkgh", y) + self.qkv_bias[...]
        scores = self._scores(qkv[:, :, 0], qkv[:, :, 1])
        scores = jnp.where(jnp.tri(x.shape[0], dtype=jnp.bool_), scores, -jnp.inf)
        y = self._mix(scores, qkv[:, :, 2])
        x = x + self.o.einsum("tkgh,kghd->td", y) + self.o_bias[...]
        y = layer_norm(x, self.cross_norm[...], self.cross_norm_bias[...], EPS)
        q = self.cross_q.einsum("td,dkgh->tkgh", y) + self.cross_q_bias[...]
        kv = self.cross_kv.einsum("td,dkph->tkph", encoded) + self.cross_kv_bias[...]
        scores = self._scores(q[:, :, 0], kv[:, :, 0])
        x = x + self.cross_o.einsum("tkgh,kghd->td", self._mix(scores, kv[:, :, 1])) + self.cross_o_bias[...]
        return self._mlp(x), scores

    def _scores(self, q: Float[Array, "T N H"], k: Float[Array, "U N H"]) -> Float32[Array, "N T U"]:
        return jnp.einsum("tnh,unh->ntu", q, k, preferred_element_type=jnp.float32) * self.c.head_dim**-0.5

    def _mix(self, scores: Float32[Array, "N T U"], v: Float[Array, "U N H"]) -> Float[Array, "T N 1 H"]:
        return jnp.einsum("ntu,unh->tnh", jax.nn.softmax(scores).astype(v.dtype), v)[:, :, None]

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
        x = self._embed(batch.token_ids, batch.rope_positions[0], mm_embeds.dtype)
        num_blocks = kv_cache.k.shape[0] // self.c.num_layers
        for i, layer in enumerate(jit_layers(text.layers, WhisperDecoderLayer.__call__)):
            with jax.named_scope(f"layer_{i}"):
                x, kv_cache = layer(x, kv_cache, batch, jnp.int32(i * num_blocks))
        with jax.named_scope("norm"):
            return layer_norm(x, text.norm[...], text.norm_bias[...], EPS), kv_cache

    @jax.named_scope("embed")
    def _embed(self, token_ids: Int[Array, "T"], positions: Int[Array, "T"], dtype: DTypeLike) -> Float[Array, "T D"]:
        x = self.text.embed.lookup(token_ids).astype(dtype)
        return x + jnp.take(self.text.positions[...], positions, axis=0, mode="clip")

    def alignment_scores(
        self, encoded: Float[Array, "U D"], token_ids: Int[Array, "T"]
    ) -> Float32[Array, "num_heads T U"]:
        """Scores of the alignment heads' cross attention, before the softmax, for each token of a transcript."""
        x = self._embed(token_ids, jnp.arange(token_ids.shape[0]), encoded.dtype)
        of_layer = []
        for i, layer in enumerate(jit_layers(self.text.layers, WhisperDecoderLayer.with_scores)):
            with jax.named_scope(f"layer_{i}"):
                x, scores = layer(x, encoded)
                of_layer.append(scores)
        return jnp.stack([of_layer[layer][head] for layer, head in self.c.alignment_heads])

    @jax.named_scope("logits")
    def logits(self, hidden: Float[Array, "S D"]) -> Float32[Array, "S V"]:
        return self.text.embed.logits(hidden, self.c.vocab_size)

    def encode(self, name: str, features: Features) -> Float[Array, "E W"]:
        return self.audio.encode_windows(log_mel(features["samples"], self.c.mel))

    @jax.named_scope("decoder")
    def write_cross_kv(self, encoded: Float[Array, "U D"], kv_cache: KVCache, slot_mapping: Int[Array, "U"]) -> KVCache:
        num_blocks = kv_cache.k.shape[0] // self.c.num_layers
        for i, write in enumerate(jit_layers(self.text.layers, WhisperDecoderLayer.write_cross_kv)):
            with jax.named_scope(f"layer_{i}"):
                kv_cache = write(encoded, kv_cache, slot_mapping, jnp.int32(i * num_blocks))
        return kv_cache
