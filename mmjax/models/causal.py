"""Text-only language models: Llama, Mistral, Phi-3, Qwen2, Qwen3, and Qwen3 with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.models import decoder_vlm
from mmjax.nn.text_config import decoder_config

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


class Config(decoder_vlm.Config):
    """See `decoder_vlm.Config`."""

    @classmethod
    def from_hf(cls, config: dict[str, Any], files: Mapping[str, dict[str, Any]], *, tied: bool) -> Config:
        """From config.json. Raises ValueError for what these decoders do not support."""
        [model_type] = {MODEL_TYPES[name] for name in config["architectures"] if name in MODEL_TYPES}
        return cls(decoder_config(config, model_type, tied=tied))

    def for_tp(self, tp_size: int) -> Config:
        """The same sizes, padded to divide over `tp_size` devices."""
        return Config(self.text.for_tp(tp_size))


class Model(decoder_vlm.Model):
    """See `mmjax.models.base.Model`. It has no encoder."""
