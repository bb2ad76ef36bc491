"""Every transform against the definition of the layout, element by element, on coprime sizes."""

import numpy as np
import pytest
from mmjax.converters import transforms as to

D, K, G, H, F = 7, 3, 5, 2, 11


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(int(np.prod(shape))).astype(np.float32).reshape(shape)


def made(transform: to.Transform, *arrays: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    assert transform.sources(shape) == tuple(array.shape for array in arrays)
    value = transform(*arrays, shape=shape)
    assert value.shape == shape and value.dtype == arrays[0].dtype
    return value


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (300, 517), (256, 256), (0, 4)])
def test_flipped(shape: tuple[int, int]) -> None:
    matrix = numbers(*shape)
    np.testing.assert_array_equal(to.transposed(matrix), matrix.T)
    np.testing.assert_array_equal(to.transposed(matrix[::-1, ::-1]), matrix[::-1, ::-1].T)


def test_identity_and_fold() -> None:
    np.testing.assert_array_equal(made(to.identity, numbers(3, 5), shape=(3, 5)), numbers(3, 5))
    np.testing.assert_array_equal(made(to.fold, numbers(30), shape=(5, 1, 6)), numbers(30).reshape(5, 1, 6))


def test_transpose() -> None:
    np.testing.assert_array_equal(made(to.transpose, numbers(3, 5), shape=(5, 3)), numbers(3, 5).T)
    kernel = numbers(4, 5, 3)
    value = made(to.transpose, kernel, shape=(3, 5, 4))
    assert all(value[k, i, o] == kernel[o, i, k] for k in range(3) for i in range(5) for o in range(4))


def test_fuse_qkv() -> None:
    q, k, v = numbers(K * G * H, D), -numbers(K * H, D), 0.5 + numbers(K * H, D)
    value = made(to.fuse_qkv, q, k, v, shape=(D, K, G + 2, H))
    x = numbers(D)
    fused = np.einsum("d,dkgh->kgh", x, value)
    np.testing.assert_allclose(fused[:, :G].reshape(-1), q @ x)
    np.testing.assert_allclose(fused[:, G].reshape(-1), k @ x)
    np.testing.assert_allclose(fused[:, G + 1].reshape(-1), v @ x)


def test_fuse_qkv_bias() -> None:
    q, k, v = numbers(K * G * H), -numbers(K * H), 0.5 + numbers(K * H)
    value = made(to.fuse_qkv_bias, q, k, v, shape=(K, G + 2, H))
    np.testing.assert_array_equal(value[:, :G].reshape(-1), q)
    np.testing.assert_array_equal(value[:, G].reshape(-1), k)
    np.testing.assert_array_equal(value[:, G + 1].reshape(-1), v)


def test_missing_key_biases_are_zero() -> None:
    q, v = numbers(K * G * H), 0.5 + numbers(K * H)
    value = made(to.fuse_qv_bias, q, v, shape=(K, G + 2, H))
    np.testing.assert_array_equal(value, to.fuse_qkv_bias(q, np.zeros_like(v), v, shape=(K, G + 2, H)))
    value = made(to.fuse_v_bias, v, shape=(K, 2, H))
    np.testing.assert_array_equal(value[:, 0], 0)
    np.testing.assert_array_equal(value[:, 1].reshape(-1), v)


@pytest.mark.parametrize("count", [1, 2])
def test_fuse_heads(count: int) -> None:
    arrays = [numbers(K * H, D) + 1000 * j for j in range(count)]
    value = made(to.fuse_heads, *arrays, shape=(D, K, count, H))
    for j, array in enumerate(arrays):
        np.testing.assert_array_equal(value[:, :, j].reshape(D, -1), array.T)


def test_stack_heads() -> None:
    arrays = [numbers(K * H, D) + 1000 * j for j in range(3)]
    biases = [numbers(K * H) + 1000 * j for j in range(3)]
    value = made(to.stack_heads, *arrays, shape=(D, 3, K, H))
    offset = made(to.stack_heads_bias, *biases, shape=(3, K, H))
    for j in range(3):
        np.testing.assert_array_equal(value[:, j].reshape(D, -1), arrays[j].T)
        np.testing.assert_array_equal(offset[j].reshape(-1), biases[j])
    keyless = made(to.stack_qv_bias, biases[0], biases[2], shape=(3, K, H))
    np.testing.assert_array_equal(keyless, offset * np.array([1, 0, 1])[:, None, None])


def test_split_heads() -> None:
    fused, bias = numbers(3 * K * H, D), numbers(3 * K * H)
    parts, biases = np.split(fused, 3), np.split(bias, 3)
    value = made(to.split_heads, fused, shape=(D, 3, K, H))
    np.testing.assert_array_equal(value, made(to.stack_heads, *parts, shape=(D, 3, K, H)))
    value = made(to.split_heads_bias, bias, shape=(3, K, H))
    np.testing.assert_array_equal(value, made(to.stack_heads_bias, *biases, shape=(3, K, H)))


@pytest.mark.parametrize("heads", [(K, G, H), (K, H), (K, 1, H)])
def test_merge_heads(heads: tuple[int, ...]) -> None:
    array = numbers(D, int(np.prod(heads)))
    value = made(to.merge_heads, array, shape=(*heads, D))
    np.testing.assert_array_equal(value.reshape(-1, D), array.T)


def test_fuse_gate_up() -> None:
    gate, up = numbers(F, D), -numbers(F, D)
    value = made(to.fuse_gate_up, gate, up, shape=(D, 2, F))
    np.testing.assert_array_equal(value[:, 0], gate.T)
    np.testing.assert_array_equal(value[:, 1], up.T)


def test_join_gate_up() -> None:
    gate, up = numbers(F, D), -numbers(F, D)
    np.testing.assert_array_equal(made(to.join_gate_up, gate, up, shape=(D, 2 * F)), np.concatenate([gate, up]).T)


def test_patches_equal_a_convolution() -> None:
    for lead in ((3,), (3, 2)):
        kernel, pixels = numbers(D, *lead, 5, 5), numbers(*lead, 5, 5)
        value = made(to.patches(*lead), kernel, shape=(pixels.size, D))
        np.testing.assert_allclose(pixels.reshape(-1) @ value, (kernel * pixels).reshape(D, -1).sum(1))


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (to.fuse_qkv, (7, 3, 4)),
        (to.fuse_qkv_bias, (7,)),
        (to.fuse_v_bias, (3, 3, 2)),
        (to.fuse_gate_up, (7, 3, 11)),
        (to.join_gate_up, (7, 11)),
        (to.stack_heads, (7, 3, 4)),
        (to.patches(3), (3 * 5 * 6, 4)),
        (to.patches(3, 2), (7,)),
    ],
)
def test_impossible_targets(transform: to.Transform, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        transform.sources(shape)
