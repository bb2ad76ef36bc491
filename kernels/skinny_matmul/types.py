"""What a product of few rows takes and gives, and how it is tiled."""

from typing import NamedTuple

from jaxtyping import Array, Float, Float32

MAX_INT8_ROWS = 16


class ResidualParts(NamedTuple):
    """One row of the residual stream as R parts that sum to it, to be RMS-normalized with norm_weight."""

    parts: Float[Array, "R D"]
    norm_weight: Float[Array, "D"]


class Product(NamedTuple):
    """The outcome of `skinny_matmul`.

    out: of a gated weight [M, F]; else f32[P, M, N] to be summed over P, or the residual parts that it was asked to
    write. Of `ResidualParts` also residual [1 + reserve, D], their sum in its first row and the others unwritten; and,
    unless gated, sum_squares f32[P, 1], to be summed over P: the squares of the residual, by the root of whose mean
    `out` is still to be divided.
    """

    out: Float[Array, "..."]
    residual: Float[Array, "rows D"] | None = None
    sum_squares: Float32[Array, "P one"] | None = None


class Tile(NamedTuple):
    """A program takes block_m rows, block_n columns and one of split_k equal parts of K, block_k of it at a time, with
    num_stages blocks of the weight on their way."""

    block_n: int
    block_k: int
    num_stages: int
    split_k: int = 1
    num_warps: int = 4
    block_m: int = 16

    def divides(self, K: int, N: int, *, equal_parts: bool) -> bool:
        """Whether it fits a weight of K x N. equal_parts: of K; else they may differ by a block."""
        parts = K % (self.split_k * self.block_k) == 0 if equal_parts else self.split_k <= K // self.block_k
        return N % self.block_n == 0 and K % self.block_k == 0 and parts
