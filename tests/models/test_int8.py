"""int8 weights: close to bfloat16, in half its memory, on one device and two, from a checkpoint or random."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine_inputs import greedy
from mmjax import LLM
from mmjax.engine.programs import Decode, Prefill
from mmjax.nn.weight import QuantizedArray, contracted_axes, dequantize, index_value, quantize, weight_einsum
from mmjax.types import ValidationError
from models.questions import QUESTIONS
from models.tables import answer_table, prompt_table

FAMILIES = ("whisper", "qwen3_vl_moe")
OPTIONS: dict[str, Any] = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 128,
    "num_decode_steps": 4,
    "max_logprobs": -1,
    "enforce_eager": True,
}


def engine(directory: Path, **options: Any) -> LLM:
    whole = {} if "WhisperFor" in (directory / "config.json").read_text() else {"max_model_len": 256}
    return LLM(str(directory), **OPTIONS, **whole, **options)


def distributions(llm: LLM, family: str) -> np.ndarray:
    """f64[n, V] log-probabilities of a few prompts and of the first tokens after them."""
    asked = [make() for make in list(QUESTIONS[family].values())[:2]]
    outputs = llm.generate(asked, greedy(1, logprobs=-1, prompt_logprobs=-1), use_tqdm=False)
    return np.concatenate([table(output) for output in outputs for table in (prompt_table, answer_table)])


def matrices(llm: LLM) -> dict[str, Any]:
    """The matrices of the language model, by path."""
    runner = llm.model.engines[0].runner
    leaves = dict(zip(runner.paths, runner.params, strict=True))
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, QuantizedArray)}


@pytest.mark.parametrize("family", FAMILIES)
def test_close_to_bfloat16_in_half_the_memory(family: str, tiny_dir: Callable[[str], Path]) -> None:
    exact = distributions(engine(tiny_dir(family)), family)
    half = distributions(engine(tiny_dir(family), dtype="bfloat16"), family)
    small = engine(tiny_dir(family), quantization="int8")
    ours = distributions(small, family)
    error, allowed = (np.sqrt(np.square(x - exact).mean()) for x in (ours, half))
    assert error < 3 * allowed and error < 0.06 * exact.std()
    params = matrices(small)
    assert all(path.startswith("text.layers") or path == "text.head" for path in params)
    values = sum(leaf.values.size for leaf in params.values())
    scales = sum(leaf.scale.size for leaf in params.values())
    assert all(leaf.values.dtype == jnp.int8 for leaf in params.values())
    assert values + 2 * scales < 0.57 * 2 * values, "with scales in bfloat16, about half of weights in bfloat16"
    runner = small.model.engines[0].runner
    rest = [leaf for path, leaf in zip(runner.paths, runner.params, strict=True) if path.startswith("text.layers")]
    left = max(leaf.size for leaf in rest if not isinstance(leaf, QuantizedArray))
    assert left <= max(leaf.shape[0] for leaf in params.values()) * 8, "only norms, biases and routers stay as they are"


def test_two_devices_give_the_same(tiny_dir: Callable[[str], Path]) -> None:
    family = "qwen3_vl_moe"
    one, two = (engine(tiny_dir(family), quantization="int8", tensor_parallel_size=tp_size) for tp_size in (1, 2))
    np.testing.assert_allclose(distributions(one, family), distributions(two, family), atol=1e-4)
    shared = [leaf for leaf in matrices(two).values() if leaf.values.addressable_shards[0].data.shape != leaf.shape]
    assert len(shared) == len(matrices(two)), "every matrix is split"


def test_dummy_weights(tiny_dir: Callable[[str], Path]) -> None:
    llm = engine(tiny_dir("qwen2_vl"), quantization="int8", load_format="dummy")
    assert matrices(llm) and np.isfinite(distributions(llm, "qwen2_vl")).all()


def test_programs_never_hold_all_weights_at_once(tmp_path: Path) -> None:
    """The temporary memory of a step is less than the matrices of the model in float32."""
    import tiny

    directory = tiny.make("qwen2_vl", tmp_path, layers=4, width=128, mlp=512)
    llm = engine(directory, quantization="int8")
    llm.generate("Hello", greedy(4), use_tqdm=False)
    whole = 4 * sum(leaf.values.size for leaf in matrices(llm).values())
    programs = llm.model.engines[0].runner._programs
    assert {type(key) for key in programs} == {Prefill, Decode}
    for program in programs.values():
        assert program.memory_analysis().temp_size_in_bytes < whole / 2


def test_other_methods_are_refused(tiny_dir: Callable[[str], Path]) -> None:
    with pytest.raises(ValidationError, match="quantization must be None or 'int8'"):
        engine(tiny_dir("qwen2_vl"), quantization="awq")


@pytest.mark.parametrize(
    ("spec", "axes", "shape"),
    [
        ("td,dkgh->tkgh", ("embed", "kv_heads", "group_kv", "head_dim"), (6, 2, 4, 3)),
        ("tkgh,kghd->td", ("kv_heads", "group", "head_dim", "embed"), (2, 4, 3, 6)),
        ("td,dpf->tpf", ("embed", "pair", "mlp"), (6, 2, 8)),
        ("sd,vd->sv", ("vocab", "embed"), (9, 6)),
        ("td,dnh->hnt", ("embed", "heads", "head_dim"), (6, 2, 3)),
    ],
)
@pytest.mark.parametrize("move_last", [False, True])
def test_a_product_with_steps_and_scales(
    spec: str, axes: tuple[str, ...], shape: tuple[int, ...], move_last: bool
) -> None:
    """Equal to the product with the value; the value is within half a step of what was rounded."""
    rng = np.random.default_rng(0)
    value = rng.standard_normal(shape).astype(np.float32)
    inputs = contracted_axes(axes)
    value *= np.exp(rng.standard_normal([1 if i in inputs else n for i, n in enumerate(shape)])).astype(np.float32)
    quantized = jax.jit(quantize, static_argnums=1, static_argnames="move_last")(value, inputs, move_last=move_last)
    assert quantized.shape == shape
    if move_last:
        assert quantized.values.shape[-len(inputs) :] == tuple(shape[i] for i in inputs)
    assert quantized.scale.shape == tuple(1 if i in inputs else n for i, n in enumerate(shape))
    restored = np.asarray(jax.jit(dequantize)(quantized))
    assert (np.abs(restored - value) <= np.asarray(quantized.scale) * 0.5001).all()
    left = spec.split(",")[0]
    sizes = dict(zip(spec.split(",")[1].split("->")[0], shape, strict=True)) | {"t": 5, "s": 5}
    x = rng.standard_normal([sizes[name] for name in left]).astype(np.float32)
    found = jax.jit(weight_einsum, static_argnums=0)(spec, x, quantized)
    np.testing.assert_allclose(found, np.einsum(spec, x, restored), rtol=1e-5, atol=1e-5)


def test_which_axes_are_summed_over() -> None:
    assert contracted_axes(("experts", "embed", "expert_mlp")) == (1,)
    assert contracted_axes(("experts", "expert_mlp", "embed")) == (1,)
    for axes in (
        ("embed",),
        ("embed", "router"),
        ("mlp",),
        ("kv_heads", "group_kv", "head_dim"),
        ("position", "embed"),
    ):
        assert contracted_axes(axes) == ()


def test_channels_of_zeros_and_parts() -> None:
    quantized = jax.jit(quantize, static_argnums=1)(np.zeros((2, 3, 4), np.float32), (1,))
    assert not np.asarray(jax.jit(dequantize)(quantized)).any() and np.isfinite(np.asarray(quantized.scale)).all()
    one = jax.jit(index_value)(quantized, jnp.int32(1))
    assert one.shape == (3, 4) and one.scale.shape == (1, 4)
