"""Wrong shapes and dtypes fail while a program is traced: annotations are checked in tests (see conftest.py)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from mmjax.kernels import segment_attention, write_kv_cache

from mmjax.nn.norm import rms_norm
from mmjax.nn.rope import apply_rope

I32 = jnp.int32
WRONG: dict[str, tuple[Callable[..., object], tuple[tuple[tuple[int, ...], object], ...]]] = {
    "an axis that differs between arguments": (rms_norm, (((3, 8), jnp.float32), ((7,), jnp.float32))),
    "a rank": (
        lambda q, ids: segment_attention(q, q, q, ids, scale=1.0),
        (((6, 2, 8), jnp.float32), ((6, 1), I32)),
    ),
    "a dtype": (
        write_kv_cache,
        (((2, 4, 1, 8), jnp.float32),) * 2 + (((3, 1, 8), jnp.float32),) * 2 + (((3,), jnp.float32),),
    ),
    "an axis that follows from another": (apply_rope, (((5, 2, 16), jnp.float32), ((5, 16), jnp.float32))),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_array_is_refused(what: str) -> None:
    function, arrays = WRONG[what]
    with pytest.raises(TypeCheckError):
        jax.eval_shape(lambda *args: function(*args, *([1e-6] if function is rms_norm else [])), *map(_shape, arrays))


def _shape(array: tuple[tuple[int, ...], object]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array[0], jnp.dtype(array[1]))  # type: ignore[arg-type]
