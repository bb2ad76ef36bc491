"""Command-line flags for EngineArgs: one per field, and the dotted forms that build nested values.

--limit-mm-per-prompt '{"image": 2}'       a JSON object
--limit-mm-per-prompt.video.count 1        one key of it; the parts are merged, the last one wins
--media-io-kwargs.image.key+ 3             append to a list; `key+=a,b` appends two
--config flags.yaml                        flags from a file; those on the command line win
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import json
import logging
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.config import EngineArgs

log = logging.getLogger(__name__)

HINTS = typing.get_type_hints(EngineArgs)
FIELDS = {field.name: field for field in dataclasses.fields(EngineArgs) if field.name != "model"}
MAPPINGS = frozenset(
    name
    for name in FIELDS
    if any(typing.get_origin(part) is collections.abc.Mapping for part in (HINTS[name], *typing.get_args(HINTS[name])))
)


MEANINGS = {
    "runner": "`generate` answers with text, `pooling` with vectors; `auto` is `generate`",
    "convert": "`embed` is runner `pooling`",
    "tokenizer": "directory of another tokenizer than the model's",
    "tokenizer_mode": "accepted: `auto` or `hf`; tokenizers are always the fast ones",
    "skip_tokenizer_init": "no tokenizer: prompts are token ids, outputs have no text",
    "trust_remote_code": "accepted; mmjax runs its own model code, never a checkpoint's",
    "allowed_local_media_path": "directory from which `file:` URLs may be read; empty refuses them",
    "allowed_media_domains": "hosts from which media may be fetched; unset allows all",
    "tensor_parallel_size": "devices that share one copy of the model",
    "data_parallel_size": "copies of the model, each on its own devices",
    "dtype": "dtype to compute in; `auto` follows the checkpoint and the platform",
    "load_format": "`dummy` makes random weights and reads none",
    "quantization": "`int8` keeps the language model in half the memory",
    "revision": "branch, tag or commit of the model on the hub",
    "tokenizer_revision": "the same for the tokenizer",
    "hf_token": "token for the hub",
    "hf_overrides": "values that replace those of config.json",
    "seed": "seed of requests that bring none",
    "gpu_memory_utilization": "share of the accelerator's memory to use",
    "kv_cache_memory_bytes": "bytes for keys and values; on the CPU 1 GiB unless given",
    "enforce_eager": "compile each shape on first use instead of all at start",
    "chat_template": "file or text of a template that replaces the model's",
    "max_model_len": "most tokens of prompt and answer: `4096`, `4k` (4000), `4K` (4096), `auto`",
    "max_num_seqs": "sequences decoded together; unset: by platform",
    "max_num_batched_tokens": "prompt tokens per step, and the largest media item; unset: by platform",
    "block_size": "tokens per block of the KV cache; unset: by platform",
    "num_decode_steps": "decode steps per dispatch while no sequence needs the host",
    "limit_mm_per_prompt": "most items of a modality in one prompt",
    "media_io_kwargs": "options of the decoders, by modality",
    "mm_processor_kwargs": "options of the model's processor",
    "enable_mm_embeds": "take embeddings in place of media",
    "enable_prompt_embeds": "take embeddings in place of a whole prompt",
    "interleave_mm_strings": "keep media where they stand among the text of a chat message",
    "mm_processor_cache_gb": "GiB of processed media to keep; 0 keeps none",
    "mm_processor_cache_type": "accepted: `lru` or `shm`; everything is in one process, so both are the same",
    "mm_shm_cache_max_object_size_mb": "accepted; no memory is shared between processes",
    "mm_encoder_tp_mode": "accepted: `weights` or `data`; answers are the same",
    "skip_mm_profiling": "accepted; memory is planned without a profiling run",
    "video_pruning_rate": "only unset: no model here prunes its videos",
    "enable_prefix_caching": "share the blocks of equal prefixes; unset: on for decoder-only models",
    "language_model_only": "take no media at all",
    "max_logprobs": "most log-probabilities per token; -1 is the vocabulary",
    "generation_config": "`auto` takes sampling defaults from the model, `vllm` neutral ones",
    "override_generation_config": "sampling defaults that replace the model's",
    "disable_log_stats": "do not log figures",
}


class FlagError(ValueError):
    """Flags that cannot be understood; the message says how to write them."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def default(name: str) -> Any:
    """The default of an engine argument, as it is shown to people."""
    field = FIELDS[name]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per engine argument. Only those given appear in the parsed namespace."""
    group = parser.add_argument_group("engine arguments")
    for name in FIELDS:
        text = f"{MEANINGS[name]} (default: {shown(default(name))})".replace("%", "%%")
        group.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=text, **_reading(name))


def engine_kwargs(parsed: argparse.Namespace) -> dict[str, Any]:
    """The engine arguments among parsed flags."""
    return {name: value for name, value in vars(parsed).items() if name in FIELDS}


def shown(value: Any) -> str:
    """A default, for people."""
    if value is None or value == "":
        return "unset"
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)


def _reading(name: str) -> dict[str, Any]:
    """How argparse reads a flag, from the type of its field."""
    hint = HINTS[name]
    union = isinstance(hint, types.UnionType)
    kinds = {typing.get_origin(part) or part for part in (typing.get_args(hint) if union else (hint,))} - {
        types.NoneType
    }
    if name in MAPPINGS:
        return {"type": json.loads, "metavar": "JSON"}
    if kinds == {bool}:
        return {"action": argparse.BooleanOptionalAction}
    if collections.abc.Sequence in kinds:
        return {"nargs": "+"}
    (kind,) = kinds - {int} if len(kinds) > 1 else kinds  # "4k" or 4096: EngineArgs reads both from a string
    return {"type": kind, "metavar": kind.__name__.upper()}


def fold(argv: Sequence[str], mappings: frozenset[str] = MAPPINGS) -> list[str]:
    """Rewrite flags to what argparse reads: dashes for underscores, and each mapping once, as one JSON object.

    Raises FlagError for a part without a value and for a value that is not a JSON object.
    """
    rest: list[str] = []
    trees: dict[str, dict[str, Any]] = {}
    words = iter(argv)
    for word in words:
        match = re.fullmatch(r"--([A-Za-z][\w-]*)(?:\.([^=\s]+?))?(?:=(.*))?", word, re.DOTALL)
        if match is None:
            rest.append(word)
            continue
        head, path, given = match[1].replace("-", "_"), match[2], match[3]
        if head not in mappings:
            if path is not None:
                raise FlagError(f"{word}: {flag(head)} takes no keys")
            rest.append(flag(head) + ("" if given is None else f"={given}"))
            continue
        value = given if given is not None else next(words, None)
        if value is None or (given is None and value.startswith("--")):
            raise FlagError(f"{word} needs a value")
        tree = trees.setdefault(head, {})
        if path is None:
            _merge(tree, _object(head, value), head)
        else:
            _put(tree, path.replace("-", "_").split("."), value, split=given is not None, name=head)
    return [*rest, *(f"{flag(head)}={json.dumps(tree)}" for head, tree in trees.items())]


def from_file(argv: Sequence[str]) -> list[str]:
    """Put the flags of `--config FILE` (YAML, one key per flag) before those of the command line, which win.

    Raises FlagError for a file that cannot be read as such.
    """
    words, file = list(argv), None
    for i, word in enumerate(words):
        if word == "--config" or word.startswith("--config="):
            given = word.partition("=")[2] or (words[i + 1] if i + 1 < len(words) else "")
            words[i : i + 1 + ("=" not in word)] = []
            file = Path(given)
            break
    if file is None:
        return words
    import yaml

    try:
        entries = yaml.safe_load(file.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FlagError(f"--config {file}: {error}") from error
    if not isinstance(entries, Mapping):
        raise FlagError(f"--config {file}: expected one `flag: value` per line, got {type(entries).__name__}")
    told = {word.partition("=")[0].partition(".")[0].replace("_", "-") for word in words if word.startswith("--")}
    first, last = [], []
    for key, value in entries.items():
        name = flag(str(key).lstrip("-")).replace("--model-tag", "--model")
        if isinstance(value, list):  # takes every word that follows, so it comes last
            last += [] if name in told else [name, *map(str, value)]
        elif isinstance(value, bool):
            first.append(name if value else name.replace("--", "--no-", 1))
        elif value is not None:
            first.append(f"{name}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return [*first, *words, *last]


def _object(head: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        hint = f": {error}"
        if re.fullmatch(r"\w+=[^\s,=]+(,\w+=[^\s,=]+)*", text):  # the form of old releases
            old = [pair.split("=") for pair in text.split(",")]
            whole = ", ".join(f'"{key}": {value}' for key, value in old)
            hint = f"; write '{{{whole}}}' or {' '.join(f'{flag(head)}.{key} {value}' for key, value in old)}"
        raise FlagError(f"{flag(head)} takes a JSON object, got {text!r}{hint}") from error
    if not isinstance(value, dict):
        raise FlagError(f"{flag(head)} takes a JSON object, got {text!r}")
    return value


def _put(tree: dict[str, Any], keys: list[str], text: str, *, split: bool, name: str) -> None:
    """Set one leaf from its text. A last key that ends in `+` appends instead."""
    *path, last = keys
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if last.endswith("+"):
        values = text.split(",") if split else [value]
        here: Any = tree
        for key in (*path, last := last[:-1]):
            here = here.get(key, []) if isinstance(here, dict) else []
        value = [*(here if isinstance(here, list) else [here]), *values]
        _merge(tree, _nest(path, {last: value}), name, quiet=True)
    else:
        _merge(tree, _nest(path, {last: value}), name)


def _nest(path: Sequence[str], leaf: dict[str, Any]) -> dict[str, Any]:
    for key in reversed(path):
        leaf = {key: leaf}
    return leaf


def _merge(tree: dict[str, Any], more: Mapping[str, Any], name: str, *, quiet: bool = False) -> None:
    """Merge in place; where both hold a key and either is not an object, the later wins, with a warning."""
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value, f"{name}.{key}", quiet=quiet)
            continue
        if key in tree and not quiet:
            log.warning("%s.%s is given more than once; the last value is used", flag(name), key)
        tree[key] = value
