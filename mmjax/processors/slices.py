"""MiniCPM-V's way with pictures of any size: a view of the whole, and slices of about the tower's size. NumPy and PIL.

A slice has a multiple of the patch as its edges and about `edge` squared pixels, whatever its proportions.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmjax.types import RequestError

Grid = tuple[int, int]
F32 = np.float32


class Slicer(NamedTuple):
    """edge: of a square slice, in pixels. side: patches along an edge of the tower's table of positions."""

    slice_size: int
    patch: int
    position_grid: int

    def grid(self, height: int, width: int, most: int) -> Grid | None:
        """(rows, columns) of slices, of about the picture's proportions; None when the whole alone will do."""
        wanted = min(math.ceil(height * width / self.slice_size**2), most)
        if wanted <= 1:
            return None
        counts = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= most]
        grids = [(n // columns, columns) for n in counts for columns in range(1, n + 1) if n % columns == 0]
        aspect = math.log(width / height)
        return min(grids, key=lambda grid: abs(aspect - math.log(grid[1] / grid[0])))

    def slices(self, image: Image.Image, grid: Grid | None) -> list[np.ndarray]:
        """The whole and, row by row, the slices: uint8 [height, width, 3] each."""
        bicubic, (width, height) = Image.Resampling.BICUBIC, image.size
        fitted = self._fit(height, width, grow=grid is None)
        out = [np.asarray(image.resize(fitted[::-1], bicubic))]
        if grid is not None:
            cell = self.cell(height, width, grid)
            board = np.asarray(image.resize((cell[1] * grid[1], cell[0] * grid[0]), bicubic))
            cells = board.reshape(grid[0], cell[0], grid[1], cell[1], 3).swapaxes(1, 2)
            out.extend(cells.reshape(-1, *cell, 3))
        return out

    def cell(self, height: int, width: int, grid: Grid) -> Grid:
        """(height, width) of each slice of a grid."""
        even = (_nearest(edge, count) / count for edge, count in zip((height, width), grid, strict=True))
        return self._fit(*even, grow=True)

    def _fit(self, height: float, width: float, *, grow: bool) -> Grid:
        """Edges that keep the proportions, about `edge` squared in area; a smaller picture keeps its size but to
        `grow`."""
        if grow or height * width > self.slice_size**2:
            aspect = width / height
            height = int(self.slice_size / math.sqrt(aspect))
            width = int(height * aspect)
        fitted = _nearest(height, self.patch), _nearest(width, self.patch)
        patches, area = math.prod(fitted) // self.patch**2, (self.slice_size // self.patch) ** 2
        if not area // 2 <= patches <= 2 * area:  # what the encoder has room for; within about 1000 : 1 nothing is lost
            raise RequestError(
                f"an image of these proportions would be scaled to {fitted[1]}x{fitted[0]}, which is too thin. "
                "Crop or pad the image.",
                "aspect_ratio",
            )
        return fitted

    def patches(self, view: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3] to its patches row by row: uint8 [n, 3 * patch * patch]."""
        p, (height, width) = self.patch, view.shape[:2]
        cells = view.reshape(height // p, p, width // p, p, 3).transpose(0, 2, 4, 1, 3)
        return cells.reshape(-1, 3 * p * p)

    def patch_coords(self, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each patch: its place in the table of positions int32 [n], and its row and column int32 [n, 2]."""
        rows, columns = view.shape[0] // self.patch, view.shape[1] // self.patch
        position = self._bucket(rows)[:, None] * self.position_grid + self._bucket(columns)
        return position.reshape(-1), np.indices((rows, columns), np.int32).reshape(2, -1).T

    def _bucket(self, count: int) -> np.ndarray:
        """int32 [count]: in which of `side` equal parts of an edge each of `count` patches begins."""
        bounds = _steps(1 / self.position_grid, 1.0, 1 / self.position_grid)
        return np.searchsorted(bounds, _steps(0.0, 1 - 1e-6, 1 / count), side="right").astype(np.int32)


def _nearest(length: float, unit: int) -> int:
    return max(round(length / unit), 1) * unit


def _steps(start: float, stop: float, step: float) -> np.ndarray:
    """float32 start, start + step, ... below stop, to the last bit as torch.arange makes them on a CPU.

    The last bit decides, where a patch begins on the boundary of two parts: there the model was trained with whatever
    torch had made of it. Its vector loop takes two vectors of eight at a time and rounds the first of each eight to
    float32 before it adds the others' share in float64; what is left over it computes in float64 alone.
    """
    at = np.arange(math.ceil((stop - start) / step))
    exact = (start + step * at).astype(F32)
    vectors = ((start + step * (at // 8 * 8)).astype(F32) + step * (at % 8)).astype(F32)
    return np.where(at < len(at) // 16 * 16, vectors, exact)
