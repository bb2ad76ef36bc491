"""The model families. A family is a model file, a processor file, a conversion table, a test, and its lines here."""

from __future__ import annotations

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
