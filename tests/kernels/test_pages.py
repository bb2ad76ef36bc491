"""write_pages: what lands where, what is dropped, and that the pool is not copied."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from mmjax.kernels import write_pages


def test_writes_slots_and_drops_the_rest() -> None:
    pool = np.zeros((3, 4, 2, 8), np.float32)
    rows = np.arange(1, 7, dtype=np.float32)[:, None, None] * np.ones((6, 2, 8), np.float32)
    slot = jnp.asarray([5, -1, 11, 12, 2**31 - 1, -12], jnp.int32)
    k, v = write_pages(jnp.asarray(pool), jnp.asarray(pool), jnp.asarray(rows), jnp.asarray(-rows), slot)
    want = pool.reshape(12, 2, 8)
    want[5], want[11] = 1, 3
    np.testing.assert_array_equal(np.asarray(k).reshape(12, 2, 8), want)
    np.testing.assert_array_equal(np.asarray(v).reshape(12, 2, 8), -want)


def test_casts_to_the_dtype_of_the_pool() -> None:
    pool = jnp.zeros((1, 4, 1, 8), jnp.float32)
    rows = jnp.ones((1, 1, 8), jnp.bfloat16)
    k, _ = write_pages(pool, pool, rows, rows, jnp.zeros(1, jnp.int32))
    assert k.dtype == jnp.float32
    assert float(k.sum()) == 8


def test_donated_pool_is_updated_in_place() -> None:
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((512, 16, 2, 64),) * 2 + ((4, 2, 64),) * 2]
    write = functools.partial(jax.jit, donate_argnums=(0, 1))(write_pages)
    memory = write.lower(*shapes, jax.ShapeDtypeStruct((4,), jnp.int32)).compile().memory_analysis()
    pools = 2 * 512 * 16 * 2 * 64 * 4
    assert memory.alias_size_in_bytes == pools
    assert memory.temp_size_in_bytes < pools / 100
