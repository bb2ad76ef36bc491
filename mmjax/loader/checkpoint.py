"""Opening a checkpoint by directory or hub id: its configuration, its family and its tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmjax.converters.formats import ADAPTER, GGUF, format_hint, refuse_quantized
from mmjax.converters.table import Part, Read, Tensor, readers
from mmjax.hf_config import HfConfig, MissingNameError, Overrides, canonical, override, unread_changes
from mmjax.loader.family import Family
from mmjax.models.base import Config
from mmjax.processors.base import Processor
from mmjax.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)

DEMO = "demo"  # the name of the model that ships with mmjax
DEMO_DIRECTORY = Path(__file__).resolve().parent.parent / "demo" / "model"
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
HEAD = "lm_head.weight"
GENERATION = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model directory. config: config.json with the overrides. files: all *config.json by name. token: for the hub,
    which may have parts of the model. stored_config: config.json as it is stored."""

    directory: Path
    family: Family
    config: HfConfig
    files: Mapping[str, dict[str, Any]]
    token: str | bool | None = None
    stored_config: HfConfig | None = None

    @classmethod
    def open(
        cls,
        model: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        overrides: Overrides | None = None,
    ) -> Checkpoint:
        """Open a local directory or a hub id. overrides: changes of config.json, see `hf_config.override`. Raises
        ValueError for an incomplete checkpoint, and for one in a format that is not supported."""
        directory = find_model(model, revision=revision, token=token)
        files = {path.name: read_json(path) for path in sorted(directory.glob("*config.json"))}
        if "config.json" not in files:
            raise ValueError(
                f"{directory} holds no config.json{format_hint(directory) or '; is it a model directory?'}"
            )
        if GENERATION in files:  # a null there means that the model has no opinion
            files[GENERATION] = {name: value for name, value in files[GENERATION].items() if value is not None}
        stored = canonical(files["config.json"])
        config = override(stored, overrides)
        family = Family.of(config)
        parts = {
            part.config: read_json(find_part(part, config, token) / "config.json")
            for part in family.table.parts
            if part.config not in config and config.get(part.key)
        }
        if parts:
            stored = stored | canonical(parts)
            config = override(stored, overrides)
        refuse_quantized(config, files)
        return cls(directory, family, config, files, token, stored)

    @functools.cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The stored tensors, by published name, or by path of the parameter in a converted directory."""
        if self.converted:
            from mmjax.converters.orbax import open_converted

            return open_converted(self.directory)
        from mmjax.converters.safetensors import open_checkpoint
        from mmjax.converters.wrappers import unwrapped

        stored = unwrapped(open_checkpoint(self.directory), self.family.table)
        if (self.directory / ADAPTER).is_file():
            log.warning("%s has an adapter beside the model (%s), which is not loaded", self.directory, ADAPTER)
        tensors: dict[str, Tensor] = dict(stored)
        for part in self.family.table.parts:
            if self.config.get(part.key) and not any(name.startswith(part.prefix) for name in stored):
                for name, tensor in open_checkpoint(find_part(part, self.config, self.token)).items():
                    if name.startswith(part.source_prefix):
                        tensors[part.prefix + name.removeprefix(part.source_prefix)] = tensor
        return tensors

    @property
    def converted(self) -> bool:
        """Whether `mmjax convert` wrote this directory."""
        return (self.directory / "mmjax.json").is_file()

    def model_config(self, *, dummy: bool = False, headless: bool = False) -> Config:
        """The family's configuration. The head is tied if config.json says so, or if no head is stored.

        dummy: read no tensors. headless: leave out the head, for a model that computes no logits.
        """
        tied = self.config.get("tie_word_embeddings", self.config.get("text_config", {}).get("tie_word_embeddings"))
        if dummy:
            has_head = not tied
        elif self.converted:
            has_head = "text.head" in self.tensors
        else:
            has_head = any(self.family.table.canonical(name) == HEAD for name in self.tensors)
        with self._architecture_told():
            return self.family.config.from_hf(self.config, self.files, tied=bool(tied) or headless or not has_head)

    def processor(self, tokenizer: Tokenizer | None) -> Processor:
        """The family's processor."""
        with self._architecture_told():
            return self.family.processor(self.config, self.files, tokenizer)

    @contextlib.contextmanager
    def _architecture_told(self) -> Iterator[None]:
        """Adds the architecture to the error of a missing name."""
        try:
            yield
        except MissingNameError as error:
            names, model_type = ", ".join(map(str, self.config["architectures"])), self.config.get("model_type")
            raise ValueError(f"{error} (architecture {names}, model_type {model_type!r})") from error

    def unread_overrides(self) -> list[str]:
        """Names that the overrides change and that nobody has read. To be asked when the model is loaded."""
        return [] if self.stored_config is None else unread_changes(self.stored_config, self.config)

    def param_readers(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Read]]:
        """(path, a function that reads it, or a region of it) of every parameter. Raises ConversionError for a
        checkpoint that does not fit."""
        if not self.converted:
            yield from readers(self.tensors, self.family.table, shapes)
            return
        for path, shape in shapes.items():
            if path not in self.tensors or tuple(self.tensors[path].shape) != shape:
                found = tuple(self.tensors[path].shape) if path in self.tensors else "nothing"
                raise ValueError(
                    f"{self.directory}: parameter {path!r} needs shape {shape}, found {found}; convert it again"
                )
            yield path, self.tensors[path].read


def find_model(
    model: str, *, revision: str | None = None, token: str | bool | None = None, cache_dir: str | None = None
) -> Path:
    """The directory of a model: a local path, or a hub id, which is downloaded to `cache_dir`, by default
    huggingface_hub's cache.

    "demo" is the model that ships with mmjax, unless a local directory of that name has a config.json.
    """
    path = Path(model).expanduser()
    if model == DEMO and not (path / "config.json").is_file():
        return DEMO_DIRECTORY
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        raise ValueError(f"{model!r} is a GGUF file; {GGUF}")
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ValueError(f"{model!r} is neither a model directory nor a hub id such as 'Qwen/Qwen2-VL-2B-Instruct'")
    from huggingface_hub import snapshot_download

    try:
        patterns = list(HUB_FILES)
        return Path(
            snapshot_download(model, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=patterns)
        )
    except Exception as error:  # huggingface_hub raises a dozen types of exceptions
        raise ValueError(
            f"{model!r} is no local directory, and fetching it from the hub failed: {type(error).__name__}: {error}"
        ) from error


def find_part(part: Part, config: Mapping[str, Any], token: str | bool | None) -> Path:
    """The directory of the checkpoint that has a part of a model. Raises ValueError if there is none."""
    try:
        return find_model(config[part.key], token=token)
    except ValueError as error:
        raise ValueError(
            f"{part.key} of config.json: {error}. hf_overrides={{{part.key!r}: ...}} names another place."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty for other JSON values. Raises ValueError for a file that is not JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}
