"""Ranges of float32, to the last bit as torch makes them on a CPU."""

import math

import numpy as np

F32 = np.float32


def arange32(start: float, stop: float, step: float) -> np.ndarray:
    """float32 start, start + step, ... below stop, to the last bit as torch.arange makes them on a CPU.

    Where a patch begins on the boundary of two parts, the last bit decides, and the model was trained with torch's.
    Torch's vector loop takes two vectors of eight at a time and rounds the first of each eight to float32 before it
    adds the offsets of the others in float64; the remainder is computed in float64 alone.
    """
    at = np.arange(math.ceil((stop - start) / step))
    exact = (start + step * at).astype(F32)
    vectors = ((start + step * (at // 8 * 8)).astype(F32) + step * (at % 8)).astype(F32)
    return np.where(at < len(at) // 16 * 16, vectors, exact)
