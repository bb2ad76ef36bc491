"""The tile of each product, by what was fastest on an H100: see docs/performance.md."""

from collections.abc import Iterator

from .types import MAX_INT8_ROWS, Tile

PROGRAMS = 120
"""Programs from which on nearly every one of 132 multiprocessors has work; K is split until there are so many."""
MAX_ROWS = 256


def tile_for(rows: int, shape: tuple[int, ...], *, head_dim: int = 0, int8: bool = False) -> Tile | None:
    """How to tile the product of so many bfloat16 rows with a weight [K, N] or [K, 2, F]; None where XLA is as fast or
    no tile divides the weight. head_dim: of attention states, where the row is merged from such."""
    K, N = shape[0], shape[-1]
    if rows > (MAX_INT8_ROWS if int8 else MAX_ROWS):
        return None
    gated = len(shape) == 3
    for tile in _int8(rows, gated, N) if int8 else _gated(rows) if gated else _plain(rows, K, N):
        whole_heads = not head_dim or (head_dim % tile.block_k == 0 and (int8 or K // tile.split_k % head_dim == 0))
        if tile.divides(K, N, equal_parts=not int8) and whole_heads:
            return tile
    return None


def _gated(rows: int) -> Iterator[Tile]:
    """Whole sums over K. For more than 64 rows cuBLAS, which shares what it reads between multiprocessors, is faster by
    more than a kernel for silu and the product takes: 47 and 5 us against 53 (256 rows, 2048 x 2 x 11008)."""
    if rows <= 16:
        yield from (Tile(128, 32, 6), Tile(64, 64, 4), Tile(32, 64, 4), Tile(32, 32, 4))
    elif rows <= 64:
        yield from (Tile(64, 64, 3, block_m=64), Tile(32, 64, 3, block_m=64), Tile(32, 32, 3, block_m=64))


def _int8(rows: int, gated: bool, N: int) -> Iterator[Tile]:
    """The fastest of some 20 on an H200, for the weights of a 3B model. One row takes 41 us a layer: 2048 x 2 x 11008
    19.8, 11008 x 2048 10.9, 2048 x 2560 4.8, 2048 x 2048 5.0; 16 rows take 69."""
    if gated:
        yield from (Tile(64, 256, 3), Tile(64, 128, 4), Tile(64, 64, 4), Tile(32, 64, 4), Tile(32, 32, 4))
        return
    for block_n in (64 if rows <= 4 else 128, 128, 64, 32):
        most = next((count for count in (1, 2, 4) if N // block_n * count > 2 * PROGRAMS), 8)
        for split_k in (most, 4, 2, 1):
            deepest = (256,) if block_n == 64 else ()
            yield from (Tile(block_n, block_k, 512 // block_k + 1, split_k) for block_k in deepest)
            yield from (Tile(block_n, block_k, 4, split_k) for block_k in (128, 64, 32))


def _plain(rows: int, K: int, N: int) -> Iterator[Tile]:
    few, deep = rows <= 16, K > 2 * N
    block_m, block_n, block_k, num_stages, num_warps = (16 if few else 64), 64, 64, 4, 4
    enough = PROGRAMS if rows <= 64 else 2 * PROGRAMS
    if deep and few:
        block_k, num_stages, enough = 32, 6, 2 * PROGRAMS
    elif deep and rows > 64:
        block_m, block_n, num_warps, enough = 128, 128, 8, PROGRAMS
    for width in (block_n, 64, 32):
        programs = -(-rows // block_m) * (N // width)
        most = 8 if deep and few else 4
        first = next((count for count in (1, 2, 4) if programs * count >= enough), most)
        for split_k in (first, 4, 2, 1):
            for depth in (block_k, 64, 32):
                yield Tile(width, depth, num_stages, split_k, num_warps, block_m)
