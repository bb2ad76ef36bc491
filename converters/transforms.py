"""Changes of layout between a published tensor and a parameter, in plain NumPy.

A `Transform` is two functions of the *target* shape: which source shapes it needs, so that a checkpoint can be checked
from its headers alone, and how the value is made. Sources are in torch order: linear `[out, in]`, convolution
`[out, in, *kernel]`. Letters: D, C widths, K kv heads, G query heads per kv head, N = K * G, H head dim, F mlp.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]
Region = tuple[slice, ...]
"""A part of an array: for each axis a slice with both ends, of step 1."""

# A transposed copy in one go misses the cache on every element; square tiles of this edge fit it.
TILE = 256


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout. Both functions raise ValueError for a `shape` that this transform cannot make.

    `sources(shape)`: the shape of each source tensor, in order.
    `build(*arrays, shape=shape)`: the value; any view or copy of the sources with exactly `shape`.
    `divides`: the axes of the target along which a part of it is made of the same part of every source, by `build`.
    `sections(shape)`: the lengths of the sections of the divided axis of the one source, each of which has its part;
    None for one section.
    """

    sources: Callable[[Shape], tuple[Shape, ...]]
    build: Callable[..., np.ndarray]
    divides: tuple[int, ...] = ()
    sections: Callable[[Shape], tuple[int, ...]] | None = None

    def __call__(self, *arrays: np.ndarray, shape: Shape) -> np.ndarray:
        return self.build(*arrays, shape=shape)

    def source_parts(self, shape: Shape, axis: int, part: slice) -> tuple[tuple[Region, ...], ...] | None:
        """The regions of each source, to be concatenated along the axis that they divide, of which `build` makes this
        part of the target along an axis. None if all of the sources are needed."""
        if axis not in self.divides:
            return None
        whole = self.sources(shape)
        divided = self.sources((*shape[:axis], part.stop - part.start, *shape[axis + 1 :]))
        parts = []
        for source, piece in zip(whole, divided, strict=True):
            (along,) = (i for i, (size, less) in enumerate(zip(source, piece, strict=True)) if size != less)
            sections = (source[along],) if self.sections is None else self.sections(shape)
            starts = itertools.accumulate(sections, initial=0)
            parts.append(
                tuple(
                    (
                        *(slice(0, size) for size in source[:along]),
                        slice(start + size * part.start // shape[axis], start + size * part.stop // shape[axis]),
                        *(slice(0, size) for size in source[along + 1 :]),
                    )
                    for start, size in zip(starts, sections, strict=False)
                )
            )
        return tuple(parts)


def transposed(matrix: np.ndarray) -> np.ndarray:
    """`[A, B] -> [B, A]`, contiguous, copied tile by tile."""
    rows, columns = matrix.shape
    out = np.empty((columns, rows), matrix.dtype)
    for top in range(0, rows, TILE):
        for left in range(0, columns, TILE):
            out[left : left + TILE, top : top + TILE] = matrix[top : top + TILE, left : left + TILE].T
    return out


def _keep(array: np.ndarray, *, shape: Shape) -> np.ndarray:
    return array


def _transpose(array: np.ndarray, *, shape: Shape) -> np.ndarray:
    return transposed(array) if array.ndim == 2 else array.transpose()


def _fold(array: np.ndarray, *, shape: Shape) -> np.ndarray:
    return array.reshape(shape)


def _qkv_sources(shape: Shape) -> tuple[Shape, ...]:
    width, kv, group, head = shape
    return (kv * (group - 2) * head, width), (kv * head, width), (kv * head, width)


def _qkv(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, shape: Shape) -> np.ndarray:
    return _heads(q, k, v, shape=shape)


def _heads_sources(shape: Shape) -> tuple[Shape, ...]:
    width, heads, count, head = shape
    return ((heads * head, width),) * count


def _heads(*arrays: np.ndarray, shape: Shape) -> np.ndarray:
    """Sources `[K * g_j * H, D]` -> `[D, K, sum(g_j), H]`: grouped by kv head."""
    width, kv, _, head = shape
    parts = [array.reshape(kv, -1, head, width) for array in arrays]
    return transposed(np.concatenate(parts, axis=1).reshape(-1, width)).reshape(shape)


def _qkv_bias_sources(shape: Shape) -> tuple[Shape, ...]:
    kv, group, head = shape
    return (kv * (group - 2) * head,), (kv * head,), (kv * head,)


def _heads_bias(*arrays: np.ndarray, shape: Shape) -> np.ndarray:
    """Sources `[K * g_j * H]` -> `[K, sum(g_j), H]`."""
    kv, _, head = shape
    return np.concatenate([array.reshape(kv, -1, head) for array in arrays], axis=1)


def _qv_bias_sources(shape: Shape) -> tuple[Shape, ...]:
    q, _, v = _qkv_bias_sources(shape)
    return q, v


def _qv_bias(q: np.ndarray, v: np.ndarray, *, shape: Shape) -> np.ndarray:
    return _heads_bias(q, np.zeros_like(v), v, shape=shape)


def _v_bias_sources(shape: Shape) -> tuple[Shape, ...]:
    heads, count, head = shape
    if count != 2:
        raise ValueError(f"a fused key and value bias is [heads, 2, head dim], not {shape}")
    return ((heads * head,),)


def _v_bias(v: np.ndarray, *, shape: Shape) -> np.ndarray:
    return _heads_bias(np.zeros_like(v), v, shape=shape)


def _stack_heads_sources(shape: Shape) -> tuple[Shape, ...]:
    width, count, heads, head = shape
    return ((heads * head, width),) * count


def _stack_heads(*arrays: np.ndarray, shape: Shape) -> np.ndarray:
    width, count, *_ = shape
    out = np.empty((width, count, arrays[0].shape[0]), np.result_type(*arrays))
    for i, array in enumerate(arrays):
        out[:, i] = transposed(array)
    return out.reshape(shape)


def _stack_heads_bias_sources(shape: Shape) -> tuple[Shape, ...]:
    count, heads, head = shape
    return ((heads * head,),) * count


def _stack_heads_bias(*arrays: np.ndarray, shape: Shape) -> np.ndarray:
    return np.stack(arrays).reshape(shape)


def _stack_qv_bias_sources(shape: Shape) -> tuple[Shape, ...]:
    q, _, v = _stack_heads_bias_sources(shape)
    return q, v


def _stack_qv_bias(q: np.ndarray, v: np.ndarray, *, shape: Shape) -> np.ndarray:
    return _stack_heads_bias(q, np.zeros_like(v), v, shape=shape)


def _split_heads_sources(shape: Shape) -> tuple[Shape, ...]:
    width, *heads = shape
    return ((math.prod(heads), width),)


def _split_heads(fused: np.ndarray, *, shape: Shape) -> np.ndarray:
    return transposed(fused).reshape(shape)


def _split_heads_bias_sources(shape: Shape) -> tuple[Shape, ...]:
    return ((math.prod(shape),),)


def _head_sections(shape: Shape) -> tuple[int, ...]:
    count, heads, head = shape[-3:]
    return (heads * head,) * count


def _merge_heads_sources(shape: Shape) -> tuple[Shape, ...]:
    *heads, width = shape
    return ((width, math.prod(heads)),)


def _merge_heads(array: np.ndarray, *, shape: Shape) -> np.ndarray:
    return transposed(array).reshape(shape)


def _gate_up_sources(shape: Shape) -> tuple[Shape, ...]:
    width, two, mlp = shape
    if two != 2:
        raise ValueError(f"a fused gate and up projection is [width, 2, mlp], not {shape}")
    return (mlp, width), (mlp, width)


def _gate_up(gate: np.ndarray, up: np.ndarray, *, shape: Shape) -> np.ndarray:
    out = np.empty(shape, np.result_type(gate, up))
    out[:, 0], out[:, 1] = transposed(gate), transposed(up)
    return out


def _regroup_qkv_sources(shape: Shape) -> tuple[Shape, ...]:
    parts = _qkv_sources(shape)
    return ((sum(rows for rows, _ in parts), parts[0][1]),)


def _qkv_rows(shape: Shape) -> tuple[int, ...]:
    return tuple(rows for rows, _ in _qkv_sources(shape))


def _regroup_qkv(fused: np.ndarray, *, shape: Shape) -> np.ndarray:
    q, k, _ = _qkv_rows(shape)
    return _heads(*np.split(fused, (q, q + k)), shape=shape)


def _split_gate_up_sources(shape: Shape) -> tuple[Shape, ...]:
    (mlp, width), _ = _gate_up_sources(shape)
    return ((2 * mlp, width),)


def _gate_up_halves(shape: Shape) -> tuple[int, ...]:
    return tuple(rows for rows, _ in _gate_up_sources(shape))


def _split_gate_up(fused: np.ndarray, *, shape: Shape) -> np.ndarray:
    return _gate_up(*np.split(fused, 2), shape=shape)


def _join_gate_up_sources(shape: Shape) -> tuple[Shape, ...]:
    width, twice_mlp = shape
    if twice_mlp % 2:
        raise ValueError(f"gate and up side by side are [width, 2 * mlp], not {shape}")
    return ((twice_mlp // 2, width),) * 2


def _join_gate_up(gate: np.ndarray, up: np.ndarray, *, shape: Shape) -> np.ndarray:
    return np.concatenate([transposed(gate), transposed(up)], axis=1)


def _transpose_experts_sources(shape: Shape) -> tuple[Shape, ...]:
    experts, rows, columns = shape
    return ((experts, columns, rows),)


def _transpose_experts(array: np.ndarray, *, shape: Shape) -> np.ndarray:
    return array.swapaxes(1, 2)


def flatten(lead: int) -> Transform:
    """`[1, .., 1, *shape]` with `lead` ones -> shape."""
    return Transform(lambda shape: ((1,) * lead + tuple(shape),), _fold)


def _stack_sources(shape: Shape) -> tuple[Shape, ...]:
    count, *rest = shape
    return (tuple(rest),) * count


def _stack(*arrays: np.ndarray, shape: Shape) -> np.ndarray:
    return np.stack(arrays)


def patches(*lead: int) -> Transform:
    """A patch embedding `[C, *lead, p, p]` as a matrix `[prod(lead) * p * p, C]`; p follows from the target."""

    def sources(shape: Shape) -> tuple[Shape, ...]:
        size, width = shape
        side = math.isqrt(size // math.prod(lead))
        if math.prod(lead) * side * side != size:
            raise ValueError(f"{size} is not {' * '.join(map(str, lead))} * p * p")
        return ((width, *lead, side, side),)

    def build(array: np.ndarray, *, shape: Shape) -> np.ndarray:
        return transposed(array.reshape(shape[::-1]))

    return Transform(sources, build)


ANY_AXIS = tuple(range(8))

# same shape on both sides
identity = Transform(lambda shape: (shape,), _keep, ANY_AXIS)
# all axes reversed: linear [out, in] -> [in, out]; conv1d [out, in, k] -> [k, in, out]
transpose = Transform(lambda shape: (shape[::-1],), _transpose, ANY_AXIS)
# [prod] -> shape
fold = Transform(lambda shape: ((math.prod(shape),),), _fold, (0,))
# q [N*H, D], k [K*H, D], v [K*H, D] -> [D, K, G+2, H]
fuse_qkv = Transform(_qkv_sources, _qkv, (1,))
# q [N*H], k [K*H], v [K*H] -> [K, G+2, H]
fuse_qkv_bias = Transform(_qkv_bias_sources, _heads_bias, (0,))
# q [N*H], v [K*H] -> [K, G+2, H], the key part zero
fuse_qv_bias = Transform(_qv_bias_sources, _qv_bias, (0,))
# n tensors [N*H, D] -> [D, N, n, H]
fuse_heads = Transform(_heads_sources, _heads, (1,))
# v [N*H] -> [N, 2, H], the key part zero
fuse_v_bias = Transform(_v_bias_sources, _v_bias, (0,))
# n tensors [N*H, C] -> [C, n, N, H], and their biases [N*H] -> [n, N, H]
stack_heads = Transform(_stack_heads_sources, _stack_heads, (2,))
stack_heads_bias = Transform(_stack_heads_bias_sources, _stack_heads_bias, (1,))
# q [N*H], v [N*H] -> [3, N, H], the key part zero
stack_qv_bias = Transform(_stack_qv_bias_sources, _stack_qv_bias, (1,))
# [3*N*H, C] (all q, all k, all v) -> [C, 3, N, H], and its bias [3*N*H] -> [3, N, H]
split_heads = Transform(_split_heads_sources, _split_heads, (2,), _head_sections)
split_heads_bias = Transform(_split_heads_bias_sources, _fold, (1,), _head_sections)
# output projection [D, N*H] -> [*heads, H, D]
merge_heads = Transform(_merge_heads_sources, _merge_heads, (0,))
# gate [F, D], up [F, D] -> [D, 2, F]
fuse_gate_up = Transform(_gate_up_sources, _gate_up, (2,))
# [(N + 2K) * H, D] (all q, all k, all v) -> [D, K, G+2, H]
regroup_qkv = Transform(_regroup_qkv_sources, _regroup_qkv, (1,), _qkv_rows)
# [2F, D] (gate first) -> [D, 2, F]
split_gate_up = Transform(_split_gate_up_sources, _split_gate_up, (2,), _gate_up_halves)
# n equal tensors -> [n, ...]
stack = Transform(_stack_sources, _stack, ANY_AXIS[1:])
# an expert's gate [F, D], up [F, D] -> [D, 2F]
join_gate_up = Transform(_join_gate_up_sources, _join_gate_up)
# [E, out, in] -> [E, in, out]
transpose_experts = Transform(_transpose_experts_sources, _transpose_experts, (0,))
