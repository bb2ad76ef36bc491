"""Wrong shapes and dtypes fail while a program is traced: annotations are checked in tests (see conftest.py)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from mmjax.kernels import segment_attention, write_kv_cache

from mmjax.nn.activations import gelu
from mmjax.nn.norm import rms_norm
from mmjax.nn.rope import apply_rope


def f32(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def i32(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


WRONG: dict[str, Callable[[], Any]] = {
    "an axis that differs between arguments": lambda: rms_norm(f32(3, 8), f32(7), 1e-6),
    "an axis that follows from another": lambda: apply_rope(f32(5, 2, 16), f32(5, 16)),
    "a rank": lambda: segment_attention(f32(6, 2, 8), f32(6, 2, 8), f32(6, 2, 8), i32(6, 1), scale=1.0),
    "a dtype": lambda: write_kv_cache(f32(2, 4, 1, 8), f32(2, 4, 1, 8), f32(3, 1, 8), f32(3, 1, 8), f32(3)),
    "no array": lambda: gelu(1.0),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_refused(what: str) -> None:
    with pytest.raises(TypeCheckError):
        jax.eval_shape(WRONG[what])
