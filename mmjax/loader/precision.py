"""The dtypes in which a model's weights are rounded, stored and multiplied."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmjax.config import DTYPES
from mmjax.hf_config import canonical


@dataclasses.dataclass(frozen=True)
class Precision:
    """Names of dtypes. weight_dtype: the weights are rounded to it. compute_dtype: the weights are then stored in it,
    and the model computes in it. matmul_dtype: of matrices and of the KV cache, if it is not compute_dtype."""

    weight_dtype: str
    compute_dtype: str
    matmul_dtype: str | None = None

    @property
    def kv_dtype(self) -> str:
        """The dtype of keys and values in the cache."""
        return self.matmul_dtype or self.compute_dtype

    @classmethod
    def of(cls, requested: str, config: Mapping[str, Any], platform: str) -> Precision:
        """From `EngineArgs.dtype`, config.json and the platform.

        XLA:CPU emulates half precision, which makes a decode step take 10 times as long. It does not emulate bfloat16
        products on processors that have instructions for them.
        """
        from mmjax.kernels import multiplies_bfloat16

        dtype = resolve_dtype(requested, stored_dtype(config), platform)
        if platform != "cpu":
            return cls(dtype, dtype)
        return cls(dtype, "float32", "bfloat16" if dtype == "bfloat16" and multiplies_bfloat16() else None)


def stored_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that config.json names for its weights; float32 where it names none."""
    config = canonical(config)
    for part in (config, config.get("text_config", {}), config.get("thinker_config", {})):
        if part.get("dtype"):
            return str(part["dtype"])
    return "float32"


def resolve_dtype(requested: str, stored: str, platform: str) -> str:
    """The dtype of the weights; see `EngineArgs.dtype`."""
    if requested != "auto":
        return DTYPES[requested]
    stored = DTYPES.get(stored.removeprefix("torch."), "float32")
    if platform == "cpu":
        return stored
    return "bfloat16" if stored == "float32" else stored
