"""The choice of an implementation, the shapes it refuses, and the sizes that follow from it."""

import importlib.util
import logging
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from mmjax.kernels.choose import select

from mmjax import kernels


def test_every_platform_has_an_implementation_of_every_op(caplog: pytest.LogCaptureFixture) -> None:
    select.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            for platform in ("cpu", "gpu", "tpu"):
                chosen = select(platform)
                assert all(chosen[op] in names for op, names in kernels.IMPLEMENTATIONS.items())
    assert len(caplog.records) == 3
    with pytest.raises(KeyError):
        select("abacus")


def test_unknown_implementation() -> None:
    x = jnp.zeros((4, 1, 64))
    with pytest.raises(ValueError, match="segment_attention has no implementation 'magic'"):
        kernels.segment_attention(x, x, x, jnp.zeros(4, jnp.int32), scale=1.0, impl="magic")


@pytest.mark.parametrize("impl", ["triton"])
def test_refusal_names_op_implementation_and_shape(impl: str) -> None:
    q, cache = jnp.zeros((1, 1, 1, 80)), jnp.zeros((2, 16, 1, 80))
    with pytest.raises(NotImplementedError, match=rf"paged_decode: {impl} .*80\]"):
        kernels.paged_decode(
            q, cache, cache, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), scale=1.0, impl=impl
        )


@pytest.mark.parametrize(("dtype", "segment_len"), [(jnp.float32, 4), (jnp.bfloat16, None)])
def test_cudnn_takes_half_precision_in_equal_segments(dtype: jnp.dtype, segment_len: int | None) -> None:
    x, segment_ids = jnp.zeros((8, 1, 64), dtype), jnp.zeros(8, jnp.int32)
    with pytest.raises(NotImplementedError, match="segment_attention: cudnn"):
        kernels.segment_attention(x, x, x, segment_ids, scale=1.0, segment_len=segment_len, impl="cudnn")


def test_segment_len_must_divide() -> None:
    x = jnp.zeros((10, 1, 64))
    with pytest.raises(ValueError, match="10 units are not whole segments of 4"):
        kernels.segment_attention(x, x, x, jnp.zeros(10, jnp.int32), scale=1.0, segment_len=4)


def test_sizes() -> None:
    assert [kernels.kv_cache_head_dim(80, p) for p in ("cpu", "gpu", "tpu")] == [80, 128, 256]
    assert [kernels.kv_cache_head_dim(64, p) for p in ("cpu", "gpu", "tpu")] == [64, 64, 128]
    assert [kernels.kv_cache_head_dim(h, "tpu") for h in (96, 128, 256)] == [256, 256, 512]  # keys and values
    assert all(kernels.q_block_size(p) % 16 == 0 for p in ("cpu", "gpu", "tpu"))
    assert kernels.kv_cache_dtype("bfloat16", "cpu") == jnp.uint16
    assert kernels.kv_cache_dtype(jnp.bfloat16, "gpu") == jnp.bfloat16


def test_imported_as_kernels_it_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers imports a root folder called `kernels` to read its version."""
    monkeypatch.setitem(sys.modules, "jax", None)  # any import of jax would raise
    path = Path(kernels.__file__)
    spec = importlib.util.spec_from_file_location("kernels", path, submodule_search_locations=[str(path.parent)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not {"__version__", "paged_decode"} & vars(module).keys()
