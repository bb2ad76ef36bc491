"""Names of tensors that were saved with a wrapper around the model: torch.compile, DataParallel, FSDP, PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from mmjax.converters.formats import MERGE, lora_tensor
from mmjax.converters.safetensors import CheckpointError
from mmjax.converters.table import Table

T = TypeVar("T")

# modules that stand anywhere in a name
INNER = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
# prefixes of a whole model, of which the one is taken that the table knows most names without
OUTER = ("", "module.", "base_model.", "base_model.model.", "model.", "module.base_model.model.")


def unwrapped(tensors: Mapping[str, T], table: Table) -> dict[str, T]:
    """The tensors by their names without wrappers. CheckpointError for an adapter that is not merged, and where two
    tensors would have one name."""
    if name := lora_tensor(tensors):
        raise CheckpointError(f"tensor {name!r} belongs to a LoRA adapter that is not merged. {MERGE}")
    short = {name: ".".join(part for part in name.split(".") if part not in INNER) for name in tensors}
    known = _known(short.values(), table)
    if known < len(tensors):
        prefixes = [p for p in OUTER if p and any(name.startswith(p) for name in short.values())]
        best = max(("", *prefixes), key=lambda p: known if not p else _known(_without(short.values(), p), table))
        short = dict(zip(short, _without(short.values(), best), strict=True))
    out: dict[str, T] = {}
    for old, new in short.items():
        if new in out:
            raise CheckpointError(f"two tensors are named {new!r} without their wrappers; one is {old!r}")
        out[new] = tensors[old]
    return out


def _without(names: Iterable[str], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in names]


def _known(names: Iterable[str], table: Table) -> int:
    """How many names the table knows."""
    return sum(map(table.knows, names))
