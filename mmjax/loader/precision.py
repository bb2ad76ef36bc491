"""Which dtypes a model's weights are rounded to, kept in and multiplied in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmjax.config import DTYPES


@dataclasses.dataclass(frozen=True)
class Precision:
    """Names of dtypes. weight_dtype: what the weights are rounded to. compute_dtype: what they are then kept in, and
    what arithmetic runs in. matmul_dtype: another dtype for the matrices and the KV cache, where there is one."""

    weight_dtype: str
    compute_dtype: str
    matmul_dtype: str | None = None

    @property
    def kv_dtype(self) -> str:
        """The dtype of keys and values in the cache."""
        return self.matmul_dtype or self.compute_dtype

    @classmethod
    def of(cls, asked: str, config: Mapping[str, Any], platform: str) -> Precision:
        """From `EngineArgs.dtype`, config.json and the platform.

        XLA:CPU emulates half precision, which makes a decode step take 10 times as long. The exception is products of
        bfloat16 on processors that have instructions for them.
        """
        from mmjax.kernels import multiplies_bfloat16

        dtype = resolve_dtype(asked, stored_dtype(config), platform)
        if platform != "cpu":
            return cls(dtype, dtype)
        return cls(dtype, "float32", "bfloat16" if dtype == "bfloat16" and multiplies_bfloat16() else None)


def stored_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that config.json names for its weights; float32 where it names none."""
    for part in (config, config.get("text_config", {}), config.get("thinker_config", {})):
        for key in ("dtype", "torch_dtype"):
            if part.get(key):
                return str(part[key])
    return "float32"


def resolve_dtype(asked: str, stored: str, platform: str) -> str:
    """The dtype of the weights. See `EngineArgs.dtype`."""
    if asked != "auto":
        return DTYPES[asked]
    stored = DTYPES.get(stored.removeprefix("torch."), "float32")
    if platform == "cpu":
        return stored
    return "bfloat16" if stored == "float32" else stored
