"""A model family: its model, its processor and its conversion table, by the architecture in config.json."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from mmjax.converters.table import Table
from mmjax.models import FAMILIES
from mmjax.models.base import Config
from mmjax.processors.base import Processor
from mmjax.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Family:
    """The parts of one family, imported on demand.

    model: makes the module of a configuration, which is a `mmjax.models.base.Model`. processor: makes the processor of
    config.json, the other *config.json files by name, and the tokenizer. table: how a checkpoint's tensors become
    parameters.
    """

    name: str
    config: type[Config]
    model: Callable[[Config], nnx.Module]
    processor: Callable[[dict[str, Any], Mapping[str, dict[str, Any]], Tokenizer | None], Processor]
    table: Table

    @classmethod
    def of(cls, config: dict[str, Any]) -> Family:
        """The family of a config.json. Raises ValueError, with the known architectures, for any other."""
        names = config.get("architectures") or [f"(none named; model_type {config.get('model_type')!r})"]
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
