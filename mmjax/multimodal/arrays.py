"""Converts arrays of any library to NumPy, by their attributes and not their types, so torch is never imported."""

from typing import Any

import numpy as np

from mmjax.types import RequestError


def is_array(value: Any) -> bool:
    """Whether a value is an array of NumPy or another library (torch, jax, …). PIL images and NumPy scalars are not."""
    return isinstance(value, np.ndarray) or is_tensor(value)


def is_tensor(value: Any) -> bool:
    """Whether a value is an array of a library other than NumPy."""
    if isinstance(value, (np.ndarray, np.generic, type)):
        return False
    shaped = hasattr(value, "ndim") and hasattr(value, "shape") and hasattr(value, "dtype")
    return shaped and (hasattr(value, "__array__") or hasattr(value, "__dlpack__"))


def to_numpy(value: Any) -> np.ndarray:
    """The array as NumPy, without a copy where possible: callers must not write to it. bfloat16 becomes float32."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float32) if value.dtype.name == "bfloat16" else value
    if hasattr(value, "detach"):  # torch: __array__ fails for tensors with gradients or on an accelerator
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # unknown to NumPy
            value = value.float()
    try:
        array = np.asarray(value) if hasattr(value, "__array__") else np.from_dlpack(value)
    except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as error:
        raise RequestError(
            f"Cannot read a {type(value).__name__} as an array; pass a NumPy array.", "bad_media"
        ) from error
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
