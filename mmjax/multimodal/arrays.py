"""Arrays of any library to NumPy, by what they can do and not by their type: torch and jax are never imported."""

from typing import Any

import numpy as np

from mmjax.types import RequestError


def is_array(value: Any) -> bool:
    """A NumPy array or an array of another library (torch, jax, …). PIL images and NumPy scalars are none."""
    return isinstance(value, np.ndarray) or is_tensor(value)


def is_tensor(value: Any) -> bool:
    """An array that is not NumPy's."""
    if isinstance(value, (np.ndarray, np.generic, type)):
        return False
    shaped = hasattr(value, "ndim") and hasattr(value, "shape") and hasattr(value, "dtype")
    return shaped and (hasattr(value, "__array__") or hasattr(value, "__dlpack__"))


def to_numpy(value: Any) -> np.ndarray:
    """The array's values as NumPy, without a copy where possible: callers must not write. bfloat16 becomes float32."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float32) if value.dtype.name == "bfloat16" else value
    if hasattr(value, "detach"):  # torch: gradients and accelerator memory stand in the way of __array__
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
