"""Text-only language models: Llama, Mistral, Phi-3, Qwen2, Qwen3, and Qwen3 with experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmjax.models import decoder_vlm
from mmjax.nn.decoder import DecoderConfig

WITH_BIAS = ("Qwen2ForCausalLM",)  # of q, k and v; config.json does not say so
WITH_QK_NORM = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")  # over each head of q and k


class Config(decoder_vlm.Config):
    """See `decoder_vlm.Config`."""

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json. Raises ValueError for what these decoders do not support."""
        is_unsupported = {
            "attention_bias": config.get("attention_bias", False),
            "mlp_bias": config.get("mlp_bias", False),
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "partial_rotary_factor": config.get("partial_rotary_factor", 1.0) != 1.0,
        }
        for name, unsupported in is_unsupported.items():
            if unsupported:
                raise ValueError(f"config.json: {name} {config[name]!r} is not supported")
        architectures = config["architectures"]
        text = DecoderConfig.from_hf(
            config,
            bias=any(name in WITH_BIAS for name in architectures),
            tie_embeddings=tied,
            qk_norm=any(name in WITH_QK_NORM for name in architectures),
        )
        window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
        # If no sequence is longer than the window, every token attends to all tokens before it.
        return cls(dataclasses.replace(text, max_positions=min(text.max_positions, window or text.max_positions)))

    def for_tp(self, tp_size: int) -> Config:
        """The same sizes, padded to divide over `tp_size` devices."""
        return Config(self.text.for_tp(tp_size))


class Model(decoder_vlm.Model):
    """See `mmjax.models.base.Model`. It has no encoder."""
