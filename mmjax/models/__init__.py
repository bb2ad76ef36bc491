"""The families. A family is a model file, a processor file, a converter table, a test, and one line here."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

FAMILIES: dict[str, str] = {  # architecture in config.json -> module in models/, processors/ and converters/
    "WhisperForConditionalGeneration": "whisper",
    "Qwen2AudioForConditionalGeneration": "qwen2_audio",
    "UltravoxModel": "ultravox",
    "LlavaForConditionalGeneration": "llava",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "MiniCPMV": "minicpmv",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl",
    "Phi3VForCausalLM": "phi3_v",
    "Qwen2_5OmniModel": "qwen2_5_omni",
    "Qwen2_5OmniForConditionalGeneration": "qwen2_5_omni",
    "Qwen2_5OmniThinkerForConditionalGeneration": "qwen2_5_omni",
    "Qwen3OmniMoeForConditionalGeneration": "qwen3_omni_moe",
    "Qwen3OmniMoeThinkerForConditionalGeneration": "qwen3_omni_moe",
    "LlamaForCausalLM": "causal",
    "MistralForCausalLM": "causal",
    "Phi3ForCausalLM": "causal",
    "Qwen2ForCausalLM": "causal",
    "Qwen3ForCausalLM": "causal",
    "Qwen3MoeForCausalLM": "causal",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """The parts of one family, imported on demand.

    config: class with `from_hf(config.json, files, *, tied)`. model: nnx module of a config. processor: class of
    `mmjax.processors`. table: the rules that rename a checkpoint's tensors.
    """

    name: str
    config: Any
    model: Any
    processor: Any
    table: Any

    @classmethod
    def of(cls, config: dict[str, Any]) -> Family:
        """The family of a config.json. Raises ValueError naming the known architectures."""
        names = config.get("architectures") or ["(none named)"]
        for name in names:
            if name in FAMILIES:
                break
        else:
            known = ", ".join(sorted(FAMILIES))
            raise ValueError(f"architecture {', '.join(map(str, names))} is not supported; mmjax runs: {known}")
        module = FAMILIES[name]
        model = importlib.import_module(f"mmjax.models.{module}")
        return cls(
            name=module,
            config=model.Config,
            model=model.Model,
            processor=importlib.import_module(f"mmjax.processors.{module}").Processor,
            table=importlib.import_module(f"mmjax.converters.{module}").TABLE,
        )
