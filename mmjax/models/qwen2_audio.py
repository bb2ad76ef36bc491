"""Qwen2-Audio: Whisper's encoder, the mean of every two of its steps, one dense layer, Qwen2."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmjax.batch import Batch, Pool
from mmjax.models.family import Encoder, Shape
from mmjax.nn.audio import PIECE, AudioConfig, AudioTower
from mmjax.nn.decoder import Decoder, DecoderConfig
from mmjax.nn.weight import weight

QWEN2 = {  # what Qwen2Config fills in when the published text_config leaves it out
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
}
ENCODER = {  # what Qwen2AudioEncoderConfig fills in
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes."""

    text: DecoderConfig
    audio: AudioConfig

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json."""
        return cls(
            text=DecoderConfig.from_hf(QWEN2 | config["text_config"], bias=True, tied=tied),
            audio=AudioConfig.from_hf(ENCODER | config["audio_config"]),
        )

    @property
    def shape(self) -> Shape:
        """Sizes for the engine."""
        t, a = self.text, self.audio
        encoder = Encoder(
            features=a.pieces,
            kinds=("audio",),
            rows=PIECE // 2,
            numbered=("window",),
            picks={"step": ((), "int32", 0)},
            based={"step": PIECE},
            largest=a.most,
        )
        return Shape(
            layers=t.depth,
            kv_heads=t.kv_heads,
            head_dim=t.head_dim,
            vocab=t.vocab,
            width=t.width,
            max_len=t.max_len,
            slab_width=t.width,
            encoders={"audio": encoder},
            largest_item=a.steps // 2,
        )

    def split(self, ways: int) -> Config:
        """The same sizes, padded to divide over `ways` devices."""
        return dataclasses.replace(self, text=self.text.split(ways), audio=self.audio.split(ways))


class Model(nnx.Module):
    """See `mmjax.models.family.Model`."""

    def __init__(self, c: Config) -> None:
        self.text = Decoder(c.text)
        self.audio = AudioTower(c.audio)
        self.project = weight(c.audio.tower.width, c.text.width, axes=("embed", "embed_out"))
        self.project_bias = weight(c.text.width, axes=("embed_out",))

    def __call__(self, batch: Batch, pool: Pool, slab: jax.Array) -> tuple[jax.Array, Pool]:
        return self.text(batch, pool, slab)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.text.logits(hidden)

    def encode(self, name: str, features: Mapping[str, jax.Array]) -> jax.Array:
        x, step = self.audio.pieces(features), features["step"]
        x = (jnp.take(x, step, axis=0, mode="clip") + jnp.take(x, step + 1, axis=0, mode="clip")) / 2
        return self.audio.normed(x) @ self.project[...] + self.project_bias[...]
