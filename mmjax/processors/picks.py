"""Rows made of patches: which four, and how much of each. NumPy only."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NEWLINE = -1  # in place of a patch: the row is the model's newline


class EmbedSources(NamedTuple):
    """Row r is the sum over j of source_weight[r, j] times patch source_index[r, j] of its item. Any axes may lead."""

    source_index: np.ndarray  # int32 [..., 4]
    source_weight: np.ndarray  # float32 [..., 4]

    def flat(self) -> "EmbedSources":
        """One leading axis."""
        return EmbedSources(self.source_index.reshape(-1, 4), self.source_weight.reshape(-1, 4))


def concat_sources(parts: Sequence[EmbedSources], axis: int = 0) -> EmbedSources:
    """Parts one after the other."""
    return EmbedSources(*(np.concatenate(arrays, axis=axis) for arrays in zip(*parts, strict=True)))


def single_sources(patches: np.ndarray) -> EmbedSources:
    """Patches as they are: int [...] to picks [..., 4]."""
    source_index = np.repeat(patches.astype(np.int32)[..., None], 4, axis=-1)
    source_weight = np.zeros(source_index.shape, np.float32)
    source_weight[..., 0] = 1
    return EmbedSources(source_index, source_weight)


def newline_sources(*shape: int) -> EmbedSources:
    """The newline, so many times."""
    return single_sources(np.full(shape, NEWLINE))


def resampled_sources(patches: np.ndarray, lines: int, columns: int) -> EmbedSources:
    """A grid of patches int [h, w] scaled bilinearly, by the centres of its cells and without smoothing, to picks
    [lines, columns, 4]."""
    if patches.shape == (lines, columns):
        return single_sources(patches)
    (top, low), (left, right) = _neighbours(patches.shape[0], lines), _neighbours(patches.shape[1], columns)
    rows = [at for at, _ in (top, top, low, low)]
    across = [at for at, _ in (left, right, left, right)]
    source_index = np.stack([patches[np.ix_(y, x)] for y, x in zip(rows, across, strict=True)], axis=-1)
    source_weight = [
        np.outer(y, x) for y, x in ((top[1], left[1]), (top[1], right[1]), (low[1], left[1]), (low[1], right[1]))
    ]
    return EmbedSources(source_index.astype(np.int32), np.stack(source_weight, axis=-1).astype(np.float32))


def _neighbours(have: int, want: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """For each of `want` cells the two of `have` around its centre, each with its source_weight."""
    at = np.maximum((np.arange(want) + 0.5) * (have / want) - 0.5, 0)
    first = at.astype(np.int32)
    beyond = (at - first).astype(np.float32)
    return (first, 1 - beyond), (np.minimum(first + 1, have - 1), beyond)
