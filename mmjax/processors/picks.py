"""Rows made of patches: which four, and how much of each. NumPy only."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NEWLINE = -1  # in place of a patch: the row is the model's newline


class Picks(NamedTuple):
    """Row r is the sum over j of share[r, j] times patch source[r, j] of its item. Any axes may lead."""

    source: np.ndarray  # int32 [..., 4]
    share: np.ndarray  # float32 [..., 4]

    def flat(self) -> "Picks":
        """One leading axis."""
        return Picks(self.source.reshape(-1, 4), self.share.reshape(-1, 4))


def joined(parts: Sequence[Picks], axis: int = 0) -> Picks:
    """Parts one after the other."""
    return Picks(*(np.concatenate(arrays, axis=axis) for arrays in zip(*parts, strict=True)))


def whole(patches: np.ndarray) -> Picks:
    """Patches as they are: int [...] to picks [..., 4]."""
    source = np.repeat(patches.astype(np.int32)[..., None], 4, axis=-1)
    share = np.zeros(source.shape, np.float32)
    share[..., 0] = 1
    return Picks(source, share)


def newlines(*shape: int) -> Picks:
    """The newline, so many times."""
    return whole(np.full(shape, NEWLINE))


def resampled(patches: np.ndarray, lines: int, columns: int) -> Picks:
    """A grid of patches int [h, w] scaled bilinearly, by the centres of its cells and without smoothing, to picks
    [lines, columns, 4]."""
    if patches.shape == (lines, columns):
        return whole(patches)
    (top, low), (left, right) = _neighbours(patches.shape[0], lines), _neighbours(patches.shape[1], columns)
    rows = [at for at, _ in (top, top, low, low)]
    across = [at for at, _ in (left, right, left, right)]
    source = np.stack([patches[np.ix_(y, x)] for y, x in zip(rows, across, strict=True)], axis=-1)
    share = [np.outer(y, x) for y, x in ((top[1], left[1]), (top[1], right[1]), (low[1], left[1]), (low[1], right[1]))]
    return Picks(source.astype(np.int32), np.stack(share, axis=-1).astype(np.float32))


def _neighbours(have: int, want: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """For each of `want` cells the two of `have` around its centre, each with its share."""
    at = np.maximum((np.arange(want) + 0.5) * (have / want) - 0.5, 0)
    first = at.astype(np.int32)
    beyond = (at - first).astype(np.float32)
    return (first, 1 - beyond), (np.minimum(first + 1, have - 1), beyond)
