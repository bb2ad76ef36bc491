"""The files beside the weights of a converted checkpoint, and how to recognize one. Does not import Orbax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmjax.converters.safetensors import CheckpointError

MANIFEST = "mmjax.json"
FORMAT = 3  # goes up when the paths or shapes of parameters change
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "chat_template.json",
    "chat_template.jinja",
)
TEMPLATES = "*_chat_templates/*.jinja"  # the chat templates with names


def is_orbax(directory: Path | str) -> bool:
    """Whether `directory` holds an Orbax checkpoint of a tree of arrays."""
    return (Path(directory) / "_METADATA").is_file()


def read_manifest(directory: Path | str) -> dict[str, Any] | None:
    """The content of `mmjax.json`; None in a checkpoint written by others. Raises CheckpointError."""
    file = Path(directory) / MANIFEST
    if not file.exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version, _ = manifest["format"], manifest["tensors"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from error
    if version != FORMAT:
        raise CheckpointError(
            f"{file} has format {version}; this version reads format {FORMAT}: convert the checkpoint again"
        )
    return manifest
