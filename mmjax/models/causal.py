"""Language models alone: Llama, Mistral, Phi-3, Qwen2, Qwen3, and Qwen3 with experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from mmjax.batch import Batch, Pool
from mmjax.models.family import Shape
from mmjax.nn.decoder import Decoder, DecoderConfig

BIASED = ("Qwen2ForCausalLM",)  # q, k and v; no config says so
NORMED = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")  # q and k of each head


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes."""

    text: DecoderConfig

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json. Raises ValueError for what these decoders do not do."""
        unknown = {
            "attention_bias": config.get("attention_bias", False),
            "mlp_bias": config.get("mlp_bias", False),
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "partial_rotary_factor": config.get("partial_rotary_factor", 1.0) != 1.0,
        }
        for name, wrong in unknown.items():
            if wrong:
                raise ValueError(f"config.json: {name} {config[name]!r} is not supported")
        kinds = config["architectures"]
        text = DecoderConfig.from_hf(
            config, bias=any(k in BIASED for k in kinds), tied=tied, qk_norm=any(k in NORMED for k in kinds)
        )
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        # No token of a sequence as short as the window slides out of sight.
        return cls(dataclasses.replace(text, max_len=min(text.max_len, window or text.max_len)))

    @property
    def shape(self) -> Shape:
        """Sizes for the engine."""
        t = self.text
        return Shape(
            layers=t.depth,
            kv_heads=t.kv_heads,
            head_dim=t.head_dim,
            vocab=t.vocab,
            width=t.width,
            max_len=t.max_len,
        )

    def split(self, ways: int) -> Config:
        """The same sizes, padded to divide over `ways` devices."""
        return Config(self.text.split(ways))

    def within(self, longest: int) -> Config:
        """The same model for sequences of at most `longest` tokens."""
        return Config(self.text.within(longest))


class Model(nnx.Module):
    """See `mmjax.models.family.Model`. There is nothing to encode."""

    def __init__(self, c: Config) -> None:
        self.text = Decoder(c.text)

    def __call__(self, batch: Batch, pool: Pool, slab: jax.Array) -> tuple[jax.Array, Pool]:
        return self.text(batch, pool, slab)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.text.logits(hidden)
