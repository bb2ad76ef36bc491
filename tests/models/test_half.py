"""bfloat16 on a processor with instructions for it: what is stored in it, and that outputs change little."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine_inputs import greedy, output_ids
from mmjax import LLM, kernels
from mmjax.nn.weight import Weight
from models.questions import QUESTIONS
from models.test_int8 import distributions, engine

FAMILIES = ("whisper", "qwen2_5_omni")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As on a processor with bfloat16 instructions, whatever this one is."""
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: True)
    return str(request.param)


def leaves(llm: LLM) -> dict[str, Any]:
    runner = llm.model.engines[0].runner
    return dict(zip(runner.paths, runner.params, strict=True))


def test_matrices_and_keys_in_half_the_memory(family: str, tiny_dir: Callable[[str], Path]) -> None:
    exact = engine(tiny_dir(family))
    half = engine(tiny_dir(family), dtype="bfloat16")
    wanted, found = distributions(exact, family), distributions(half, family)
    error = np.sqrt(np.square(found - wanted).mean())
    assert 0 < error < 0.06 * wanted.std()
    params = leaves(half)
    for path in ("text.embed", "text.layers.0.qkv", "text.layers.0.o", "audio.layers.qkv", "audio.layers.fc1"):
        assert params[path].dtype == jnp.bfloat16, path
    assert all(
        params[path].dtype == jnp.float32 for path in params if "norm" in path or "bias" in path or "conv" in path
    )
    caches = [llm.model.engines[0].runner.state.kv_cache.k for llm in (exact, half)]
    assert [cache.dtype for cache in caches] == [jnp.float32, jnp.uint16]


def test_packing_and_devices_change_nothing(monkeypatch: pytest.MonkeyPatch, tiny_dir: Callable[[str], Path]) -> None:
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: True)
    asked = [make() for make in list(QUESTIONS["whisper"].values())[:2]]
    one, two = (engine(tiny_dir("whisper"), dtype="bfloat16", tensor_parallel_size=tp_size) for tp_size in (1, 2))
    alone = [output_ids(one.generate(prompt, greedy(8), use_tqdm=False))[0] for prompt in asked]
    assert output_ids(one.generate(asked, greedy(8), use_tqdm=False)) == alone
    assert output_ids(two.generate(asked, greedy(8), use_tqdm=False)) == alone


def test_int8_goes_before(monkeypatch: pytest.MonkeyPatch, tiny_dir: Callable[[str], Path]) -> None:
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: True)
    params = leaves(engine(tiny_dir("qwen2_5_omni"), dtype="bfloat16", quantization="int8"))
    assert params["text.layers.0.qkv"].values.dtype == jnp.int8
    assert params["text.embed"].dtype == params["audio.layers.qkv"].dtype == jnp.bfloat16


def test_a_look_up_copies_no_table_even_in_a_loop() -> None:
    ids = jnp.asarray([0, 7, 4999, 5000, -1], jnp.int32)

    def run(values: jax.Array, ids: jax.Array) -> jax.Array:
        table = Weight(values, axes=("vocab", "embed"))
        return jax.lax.fori_loop(0, 3, lambda i, sum: sum + table.lookup(ids + i), jnp.zeros((5, 64), values.dtype))

    values = jnp.arange(5000, dtype=jnp.bfloat16)[:, None] * jnp.ones(64, jnp.bfloat16)
    program = jax.jit(run).lower(values, ids).compile()
    expected = sum(values[np.clip(np.asarray(ids) + i, 0, 4999)] for i in range(3))
    np.testing.assert_array_equal(program(values, ids), expected)
    assert program.memory_analysis().temp_size_in_bytes < values.nbytes / 10
