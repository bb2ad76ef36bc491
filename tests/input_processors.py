"""Input processors of checkpoint directories, for tests that need no model."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from mmjax.inputs.input_processor import InputConfig, InputProcessor
from mmjax.models import FAMILIES
from mmjax.processors.base import Processor
from mmjax.tokenizer.tokenizer import Tokenizer


def read_files(directory: Path) -> dict[str, dict[str, Any]]:
    return {file.name: json.loads(file.read_text()) for file in directory.glob("*config*.json")}


def load_processor(family: str, directory: Path) -> tuple[Processor, Tokenizer]:
    files = read_files(directory)
    tokenizer = Tokenizer(directory)
    name = family if family in FAMILIES.values() else FAMILIES[files["config.json"]["architectures"][0]]
    module = import_module(f"mmjax.processors.{name}")
    return module.Processor(files["config.json"], files, tokenizer), tokenizer


def make_input_processor(family: str, directory: Path, **options: Any) -> InputProcessor:
    processor, tokenizer = load_processor(family, directory)
    config = read_files(directory)["config.json"]
    defaults: dict[str, Any] = {
        "model_id": family,
        "vocab_size": config.get("vocab_size") or config.get("thinker_config", config)["text_config"]["vocab_size"],
        "max_model_len": 448 if family.startswith("whisper") else 4096,
        "encoder_decoder": family.startswith("whisper"),
    }
    return InputProcessor(processor, tokenizer, InputConfig(**{**defaults, **options}))
