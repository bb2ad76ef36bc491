"""What cannot be loaded, known by the files and the config of a checkpoint, and what to do instead."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ADAPTER = "adapter_config.json"
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")  # the last is MLX's
MODELOPT = "hf_quant_config.json"
MERGE = "Merge it into its base model with peft's `merge_and_unload()`, save that, and load the result"
GGUF = (
    "mmjax does not read GGUF: load the safetensors checkpoint that it was made from; quantization='int8' halves its "
    "memory"
)


def format_hint(directory: Path) -> str | None:
    """What a directory without a model in it holds instead, as the end of a sentence about it; None if unknown."""
    if (directory / ADAPTER).is_file():
        try:
            options = json.loads((directory / ADAPTER).read_text(encoding="utf-8"))
        except ValueError:
            options = {}
        options = options if isinstance(options, dict) else {}
        kind, base = options.get("peft_type") or "LoRA", options.get("base_model_name_or_path")
        of_base = f" of {base}" if base else ""
        return f": it is a {kind} adapter ({ADAPTER}){of_base}, which mmjax does not load. {MERGE}"
    if any(directory.glob("*.gguf")) or "gguf" in str(directory).lower():
        return f", but GGUF files; {GGUF}"
    return None


def quantization_method(config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> tuple[str, str] | None:
    """(the key that names it, the method by which a checkpoint's weights are quantized); None if they are not."""
    for part in (config, config.get("text_config") or {}, config.get("thinker_config") or {}):
        for key in QUANTIZATION_KEYS:
            if part.get(key):
                return key, _method_name(part[key])
    options = files.get(MODELOPT, {}).get("quantization")
    return (MODELOPT, _method_name({"quant_method": "modelopt"} | options)) if isinstance(options, dict) else None


def _method_name(options: Any) -> str:
    """The name of a method, with the algorithm or the bits where they are told."""
    if not isinstance(options, Mapping):
        return str(options)
    bits = f"{options['bits']} bits" if options.get("bits") else None
    words = (options.get("quant_method") or options.get("mode"), options.get("quant_algo") or bits)
    return ", ".join(str(word) for word in words if word) or "an unnamed method"


def refuse_quantized(config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """ValueError for a checkpoint with quantized weights."""
    found = quantization_method(config, files)
    if found is None:
        return
    key, method = found
    mend = f" (hf_overrides={{{key!r}: None}} if they are not)" if key != MODELOPT else ""
    raise ValueError(
        f"the weights are quantized: {method} ({key}), which is not supported{mend}. Load the checkpoint in bfloat16 "
        "or float16 that they were made from; quantization='int8' quantizes it when it is loaded."
    )


def lora_tensor(names: Iterable[str]) -> str | None:
    """The first tensor of an adapter that was saved inside its base model; None if there is none."""
    parts = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "base_layer"}
    return next((name for name in names if not parts.isdisjoint(name.split("."))), None)
