"""write_kv_cache: the slots that are written, those that are dropped, and that the cache is not copied."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mmjax.kernels import kv_cache, write_kv_cache


@pytest.fixture(params=[False, True], ids=["token-major", "heads-first"])
def heads_first(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both layouts of a cache block, whatever this platform's is."""
    monkeypatch.setattr(kv_cache, "kv_heads_first", lambda: request.param)
    return bool(request.param)


def write(cache: np.ndarray, *arrays: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Keys and values written into `cache` by one program, as in a step."""
    return jax.jit(functools.partial(write_kv_cache))(cache, cache, *arrays)


def test_writes_slots_and_drops_the_rest(heads_first: bool) -> None:
    cache = np.zeros((3, 4, 2, 8), np.float32)
    rows = np.arange(1, 13, dtype=np.float32).reshape(6, 2, 1) * np.ones((6, 2, 8), np.float32)
    slots = np.array([5, -1, 11, 12, 2**31 - 1, -12], np.int32)
    want = cache.reshape(12, 2, 8).copy()
    want[5], want[11] = rows[0], rows[2]
    want = want.reshape(cache.shape)
    if heads_first:
        cache, want = cache.swapaxes(1, 2), want.swapaxes(1, 2)
    k, v = write(cache, rows, -rows, slots)
    np.testing.assert_array_equal(k, want)
    np.testing.assert_array_equal(v, -want)


def test_casts_to_the_dtype_of_the_cache(heads_first: bool) -> None:
    cache = np.zeros((1, 1, 4, 8) if heads_first else (1, 4, 1, 8), np.float32)
    rows = np.ones((1, 1, 8), jnp.bfloat16)
    k, _ = write(cache, rows, rows, np.zeros(1, np.int32))
    assert k.dtype == jnp.float32
    assert np.asarray(k).sum() == 8


def test_integers_keep_the_bits_of_bfloat16(heads_first: bool) -> None:
    cache = np.full((1, 1, 4, 8) if heads_first else (1, 4, 1, 8), 7, np.uint16)
    rows = np.random.default_rng(0).standard_normal((1, 1, 8)).astype(np.float32)
    k, _ = write(cache, rows, rows, np.full(1, 2, np.int32))
    written = np.asarray(k)[0, 0, 2] if heads_first else np.asarray(k)[0, 2, 0]
    found = kv_cache.cache_to_float32(jax.device_put(written))
    np.testing.assert_array_equal(found, rows[0, 0].astype(jnp.bfloat16).astype(np.float32))
    assert np.count_nonzero(np.asarray(k) != 7) == 8


def test_keys_and_values_in_one_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "kv_in_one_array", lambda: True)
    k, v = np.random.default_rng(0).standard_normal((2, 5, 2, 48)).astype(np.float32)
    cache, empty = np.zeros((3, 2, 16, 128), np.float32), jnp.zeros((0, 2, 16, 128))
    slots = [17, -1, 47, 48, 2]
    got, same = write_kv_cache(jnp.asarray(cache), empty, jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots))
    for row, slot in enumerate(slots):
        if 0 <= slot < 48:
            cache[slot // 16, :, slot % 16, :48] = k[row]
            cache[slot // 16, :, slot % 16, 64:112] = v[row]
    np.testing.assert_array_equal(got, cache)
    assert same is empty


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint16])
def test_donated_cache_is_updated_in_place(heads_first: bool, dtype: Any) -> None:
    block = (2, 16) if heads_first else (16, 2)
    cache, rows = jax.ShapeDtypeStruct((512, *block, 64), dtype), jax.ShapeDtypeStruct((4, 2, 64), jnp.float32)
    shapes = [cache, cache, rows, rows]
    program = functools.partial(jax.jit, donate_argnums=(0, 1))(functools.partial(write_kv_cache))
    memory = program.lower(*shapes, jax.ShapeDtypeStruct((4,), jnp.int32)).compile().memory_analysis()
    nbytes = 2 * 512 * 16 * 2 * 64 * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes == nbytes
    assert memory.temp_size_in_bytes < nbytes / 100
