"""What a checkpoint directory holds, from headers and metadata alone."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmjax.converters.manifest import is_orbax
from mmjax.converters.safetensors import CheckpointError, StoredTensor, open_checkpoint
from mmjax.converters.table import Plan, Rule, Table, Tensor, examine
from mmjax.converters.transforms import Shape


@dataclasses.dataclass(frozen=True)
class Tally:
    """How many tensors, how many values, how many bytes."""

    tensors: int = 0
    values: int = 0
    nbytes: int = 0

    def plus(self, tensor: Tensor) -> Tally:
        values = math.prod(tensor.shape)
        return Tally(self.tensors + 1, self.values + values, self.nbytes + values * tensor.dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class Description:
    """format: "safetensors" or "orbax". dtypes, shards, prefixes: `total` by dtype, by file and by part of the model.

    plan: None unless a model was given to compare with.
    """

    directory: Path
    format: str
    architecture: str | None
    model_type: str | None
    total: Tally
    dtypes: Mapping[str, Tally]
    shards: Mapping[str, Tally]
    prefixes: Mapping[str, Tally]
    plan: Plan | None


def describe(
    directory: Path | str,
    *,
    table: Table | None = None,
    shapes: Mapping[str, Shape] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Description:
    """Count every tensor; with `table` and `shapes`, also say what the model would take, ignore and miss. tensors: of
    the directory, where they are open already.

    A converted checkpoint is compared with `shapes` alone, since its names are the model's own. Raises CheckpointError.
    """
    directory = Path(directory)
    if is_orbax(directory):
        from mmjax.converters.orbax import open_converted  # Orbax takes seconds to import

        tensors = tensors or open_converted(directory)
        table = Table(tuple(Rule(path, path) for path in shapes or {}))
    else:
        tensors = tensors or open_checkpoint(directory)
    dtypes: dict[str, Tally] = collections.defaultdict(Tally)
    shards: dict[str, Tally] = collections.defaultdict(Tally)
    prefixes: dict[str, Tally] = collections.defaultdict(Tally)
    total = Tally()
    for name, tensor in tensors.items():
        total = total.plus(tensor)
        dtypes[str(tensor.dtype)] = dtypes[str(tensor.dtype)].plus(tensor)
        prefixes[_prefix(name)] = prefixes[_prefix(name)].plus(tensor)
        if isinstance(tensor, StoredTensor):
            shards[tensor.file.name] = shards[tensor.file.name].plus(tensor)
    config = _config(directory)
    architectures = config.get("architectures") or [None]
    return Description(
        directory,
        "orbax" if is_orbax(directory) else "safetensors",
        architectures[0],
        config.get("model_type"),
        total,
        dict(dtypes),
        dict(shards),
        dict(prefixes),
        examine(tensors, table, shapes) if table is not None and shapes is not None else None,
    )


def _config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return config


def _prefix(name: str) -> str:
    """The part of the model that a tensor belongs to: its name up to its layer number, or up to its last part."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:number]) or name


def size(nbytes: int) -> str:
    """Bytes with a unit: 1536 -> '1.5 KiB'."""
    scale = max(0, min(4, (nbytes.bit_length() - 1) // 10))
    return f"{nbytes} B" if scale == 0 else f"{nbytes / 1024**scale:.1f} {'KMGT'[scale - 1]}iB"


def render(description: Description) -> str:
    """The description as plain text, one fact a line."""
    lines = [
        f"directory     {description.directory}",
        f"format        {description.format}",
        f"architecture  {description.architecture or 'not told'} ({description.model_type or 'no model type'})",
        f"tensors       {_tally(description.total)}",
    ]
    sections = {"dtypes": description.dtypes, "shards": description.shards, "parts": description.prefixes}
    for title, parts in sections.items():
        if parts:
            width = max(map(len, parts))
            lines += ["", f"{title}:", *(f"  {name:{width}}  {_tally(tally)}" for name, tally in parts.items())]
    if description.plan is not None:
        lines += ["", *render_plan(description.plan)]
    return "\n".join(lines) + "\n"


def render_plan(plan: Plan) -> list[str]:
    """A conversion, one fact a line: how many tensors are taken, which are ignored by name, which do not fit."""
    lines = [
        f"model: {len(plan.pieces)} parameters from {len(plan.claimed)} tensors, {len(plan.ignored)} ignored,"
        f" {len(plan.problems)} problems"
    ]
    lines += [f"  ignored  {name}" for name in plan.ignored]
    return lines + [f"  problem  {problem}" for problem in plan.problems]


def _tally(tally: Tally) -> str:
    return f"{tally.tensors:6,} tensors  {tally.values:15,} values  {size(tally.nbytes):>10}"
