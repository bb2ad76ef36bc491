"""Changes of layout between a published tensor and a parameter, in plain NumPy.

A `Transform` is two functions of the *target* shape: which source shapes it needs, so that a checkpoint can be checked
from its headers alone, and how the value is made. Sources are in torch order: linear `[out, in]`, convolution
`[out, in, *kernel]`. Letters: D, C widths, K kv heads, G query heads per kv head, N = K * G, H head dim, F mlp.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]

# A transposed copy in one go misses the cache on every element; square tiles of this edge fit it.
TILE = 256


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout. Both functions raise ValueError for a `shape` that this transform cannot make.

    `sources(shape)`: the shape of each source tensor, in order.
    `build(*arrays, shape=shape)`: the value; any view or copy of the sources with exactly `shape`.
    """

    sources: Callable[[Shape], tuple[Shape, ...]]
    build: Callable[..., np.ndarray]

    def __call__(self, *arrays: np.ndarray, shape: Shape) -> np.ndarray:
        return self.build(*arrays, shape=shape)


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


def _regroup_qkv(fused: np.ndarray, *, shape: Shape) -> np.ndarray:
    q, k, _ = (rows for rows, _ in _qkv_sources(shape))
    return _heads(*np.split(fused, (q, q + k)), shape=shape)


def _split_gate_up_sources(shape: Shape) -> tuple[Shape, ...]:
    (mlp, width), _ = _gate_up_sources(shape)
    return ((2 * mlp, width),)


def _split_gate_up(fused: np.ndarray, *, shape: Shape) -> np.ndarray:
    return _gate_up(*np.split(fused, 2), shape=shape)


def _expert_gate_up_sources(shape: Shape) -> tuple[Shape, ...]:
    experts, width, two, mlp = shape
    return ((experts, width, two * mlp),)


def _transposed_expert_gate_up_sources(shape: Shape) -> tuple[Shape, ...]:
    experts, width, two, mlp = shape
    return ((experts, two * mlp, width),)


def _transposed_expert_gate_up(fused: np.ndarray, *, shape: Shape) -> np.ndarray:
    experts, width, two, mlp = shape
    return fused.reshape(experts, two, mlp, width).transpose(0, 3, 1, 2)


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


# same shape on both sides
identity = Transform(lambda shape: (shape,), _keep)
# all axes reversed: linear [out, in] -> [in, out]; conv1d [out, in, k] -> [k, in, out]
transpose = Transform(lambda shape: (shape[::-1],), _transpose)
# [prod] -> shape
fold = Transform(lambda shape: ((math.prod(shape),),), _fold)
# q [N*H, D], k [K*H, D], v [K*H, D] -> [D, K, G+2, H]
fuse_qkv = Transform(_qkv_sources, _qkv)
# q [N*H], k [K*H], v [K*H] -> [K, G+2, H]
fuse_qkv_bias = Transform(_qkv_bias_sources, _heads_bias)
# q [N*H], v [K*H] -> [K, G+2, H], the key part zero
fuse_qv_bias = Transform(_qv_bias_sources, _qv_bias)
# n tensors [N*H, D] -> [D, N, n, H]
fuse_heads = Transform(_heads_sources, _heads)
# v [N*H] -> [N, 2, H], the key part zero
fuse_v_bias = Transform(_v_bias_sources, _v_bias)
# n tensors [N*H, C] -> [C, n, N, H], and their biases [N*H] -> [n, N, H]
stack_heads = Transform(_stack_heads_sources, _stack_heads)
stack_heads_bias = Transform(_stack_heads_bias_sources, _stack_heads_bias)
# q [N*H], v [N*H] -> [3, N, H], the key part zero
stack_qv_bias = Transform(_stack_qv_bias_sources, _stack_qv_bias)
# [3*N*H, C] (all q, all k, all v) -> [C, 3, N, H]; `fold` is for its bias
split_heads = Transform(_split_heads_sources, _split_heads)
# output projection [D, N*H] -> [*heads, H, D]
merge_heads = Transform(_merge_heads_sources, _merge_heads)
# gate [F, D], up [F, D] -> [D, 2, F]
fuse_gate_up = Transform(_gate_up_sources, _gate_up)
# [(N + 2K) * H, D] (all q, all k, all v) -> [D, K, G+2, H]
regroup_qkv = Transform(_regroup_qkv_sources, _regroup_qkv)
# [2F, D] (gate first) -> [D, 2, F]
split_gate_up = Transform(_split_gate_up_sources, _split_gate_up)
# n equal tensors -> [n, ...]
stack = Transform(_stack_sources, _stack)
# experts' [E, D, 2F] (gate first) -> [E, D, 2, F]
expert_gate_up = Transform(_expert_gate_up_sources, _fold)
# experts' [E, 2F, D] -> [E, D, 2, F]
transposed_expert_gate_up = Transform(_transposed_expert_gate_up_sources, _transposed_expert_gate_up)
# [E, out, in] -> [E, in, out]
transpose_experts = Transform(_transpose_experts_sources, _transpose_experts)
