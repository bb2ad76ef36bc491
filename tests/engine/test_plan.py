"""Runners on shapes instead of arrays: layouts, executables that are kept, sizes from what programs need, plans."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from engine_inputs import SMALL
from mmjax import LLM, sharding
from mmjax.cli.main import main
from mmjax.cli.plan import as_text
from mmjax.config import EngineArgs
from mmjax.engine.hlo import collectives
from mmjax.engine.layouts import chosen_layouts, freed, lay_out, layouts_of, with_layouts
from mmjax.engine.measured import Measured
from mmjax.engine.memory import RESERVED_BYTES, EngineMemory
from mmjax.engine.model_runner import ModelRunner
from mmjax.engine.program_cache import ProgramCache
from mmjax.engine.programs import AllocateState, SetLogitBiases
from mmjax.entrypoints import topology
from mmjax.entrypoints.plan import Plan, _Planner
from mmjax.entrypoints.replica import Replica
from mmjax.entrypoints.topology import Topology
from mmjax.loader import params
from mmjax.loader.checkpoint import Checkpoint
from mmjax.nn.weight import weight

GIB = 1 << 30
MEASURED = Measured(state_bytes=GIB // 4, temp_bytes=GIB // 2, code_bytes=GIB // 16, layouts=())


@pytest.fixture
def no_compilation_cache() -> Iterator[None]:
    """As in a plan: what jax reads from its own cache cannot be kept."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def replica_of(llm: LLM, directory: Path) -> Replica:
    """One of the same sizes as an engine."""
    args = EngineArgs(str(directory), **SMALL)
    devices = list(llm.model.engines[0].runner.mesh.devices.flat)
    return Replica(args, Checkpoint.open(str(directory)), sharding.mesh(devices), {"image": 1, "video": 1})


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_shapes_of_int8_parameters_are_those_of_the_loaded_ones(
    tiny_dir: Callable[[str], Path], platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU stores them in another order."""
    there = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    monkeypatch.setattr(params, "int8_axes", lambda spec, mesh, as_on=params.int8_axes: as_on(spec, there))
    directory = tiny_dir("qwen2_vl")
    args = EngineArgs(str(directory), quantization="int8", **SMALL)
    replica = Replica(args, Checkpoint.open(str(directory)), sharding.mesh(jax.devices()[:2]), {"image": 1})
    loaded = replica.load(lambda values, count: values)

    def described(tree: Any) -> Any:
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)

    assert described(loaded) == described(replica.abstract_params)


def test_a_runner_on_shapes_compiles_what_a_start_takes(
    qwen: LLM,
    tiny_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_compilation_cache: None,
) -> None:
    """An executable that was kept for shapes is found by the runner of the arrays, loaded and run."""
    real = qwen.model.engines[0].runner
    replica = replica_of(qwen, tiny_dir("qwen2_vl"))
    runner = replica.runner(replica.abstract_params, qwen.model.engines[0].memory)
    assert runner.is_abstract and not real.is_abstract
    described = [
        [(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves((each._inputs.params, each._inputs.state))]
        for each in (runner, real)
    ]
    assert described[0] == described[1]
    compile_itself = ModelRunner._compile.__closure__  # that of the tests shares programs
    assert compile_itself is not None
    compile_anew = next(cell.cell_contents for cell in compile_itself if callable(cell.cell_contents))
    cache = ProgramCache(tmp_path, "a model")
    for each in (runner, real):
        monkeypatch.setattr(each, "program_cache", cache)
    runner.keep_compiled = True
    for key in (AllocateState(), SetLogitBiases(1)):
        compile_anew(runner, key)

    def fail(*_: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(ModelRunner, "_lower", fail)
    state = compile_anew(real, AllocateState())()
    vocab = real.spec.vocab_size
    biases = np.full((1, vocab), 2, np.float32)
    state = compile_anew(real, SetLogitBiases(1))(state, np.zeros(1, np.int32), biases)
    np.testing.assert_array_equal(state.logit_bias[0], biases[0])
    assert not state.logit_bias[1:].any()
    with pytest.raises(AssertionError, match="compiled"):
        compile_anew(real, SetLogitBiases(2))


def test_what_is_kept_is_for_these_layouts_only(tmp_path: Path) -> None:
    cache = ProgramCache(tmp_path, "a model")
    compiled = jax.jit(jnp.sin).lower(jnp.ones(3)).compile()
    cache.write_compiled((1, (None,)), compiled)
    devices = (jax.devices()[0],)
    assert cache.read_compiled((1, (None,)), devices) is not None
    assert cache.read_compiled((1, (((0,), ()),)), devices) is None


def test_layouts_are_chosen_kept_and_used() -> None:
    mesh = sharding.mesh(jax.devices()[:1])
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones((4, 2))}
    params = {name: jax.device_put(x, sharding.named_sharding(mesh, ())) for name, x in params.items()}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    assert layouts_of(shapes) == (None, None)

    def double(params: Any, x: Any) -> Any:
        return 2 * params["a"] + x

    x = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding.named_sharding(mesh, ()))
    args, formats = freed((shapes, x), (True, True))
    chosen = chosen_layouts(jax.jit(double, in_shardings=formats).lower(*args).compile(), layouts_of(shapes))
    assert chosen[0] is not None and chosen[1] is None, "the program does not use b"
    columns = ((1, 0), ())
    measured = Measured.from_json(dataclasses.replace(MEASURED, layouts=(columns, None)).as_json())
    shapes = with_layouts(shapes, measured.layouts)
    program = jax.jit(double).lower(shapes, x).compile()
    with pytest.raises(ValueError, match="layout"):
        program(params, jnp.zeros(3))
    lay_out(params, measured.layouts)
    assert params["a"].format.layout.major_to_minor == (1, 0)
    np.testing.assert_array_equal(program(params, jnp.zeros(3)), 2 * np.arange(6.0).reshape(2, 3))


def test_the_cache_gets_what_programs_leave(tiny_dir: Callable[[str], Path]) -> None:
    spec = Checkpoint.open(str(tiny_dir("qwen2_vl"))).model_config().spec
    args = EngineArgs("model", max_model_len=4096)

    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 16 * GIB, "bytes_in_use": 7 * GIB}

    def cache_bytes(platform: str, measured: Measured | None) -> float:
        kv = {"kv_dtype": "bfloat16", "tp_size": 1}
        memory = EngineMemory.plan(args, spec, platform, **kv, device=Device(), measured=measured)  # type: ignore[arg-type]
        return memory.num_blocks * EngineMemory.block_bytes(args, spec, platform, **kv) / GIB  # type: ignore[arg-type]

    for platform in ("gpu", "tpu"):
        reserved = RESERVED_BYTES[platform] / GIB
        assert cache_bytes(platform, None) == pytest.approx(7, rel=1e-3)
        assert cache_bytes(platform, MEASURED) == pytest.approx(9 - 0.8125 - reserved, rel=1e-3)
        with pytest.raises(ValueError, match=r"only 0\.00 GiB are available"):
            cache_bytes(platform, dataclasses.replace(MEASURED, temp_bytes=10 * GIB))


@pytest.mark.parametrize("vocab", [64, 61])
def test_devices_exchange_logits_not_the_head(vocab: int) -> None:
    mesh = sharding.mesh(jax.devices()[:4])
    head = weight(64, 512, axes=("vocab", "embed"))
    value = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=sharding.named_sharding(mesh, ("vocab", "embed")))
    hidden = jax.ShapeDtypeStruct((2, 512), jnp.float32, sharding=sharding.named_sharding(mesh, ()))

    def logits(value: Any, hidden: Any) -> Any:
        return jax.lax.with_sharding_constraint(
            type(head)(value, axes=("vocab", "embed")).logits(hidden, vocab), sharding.named_sharding(mesh, ())
        )

    with jax.set_mesh(mesh):
        exchanged = collectives(jax.jit(logits).lower(value, hidden).compile().as_text() or "")
    assert [each.shape for each in exchanged.once] == [(2, 64)], exchanged


HLO = """\
HloModule jit_decode, entry_computation_layout={()}

%layer (x: f32[8]) -> f32[8] {
  %all-reduce.1 = f32[8]{0} all-reduce(%x), channel_id=1, to_apply=%add
}

%region_0.1.clone (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %call.1 = f32[8]{0} call(%a), to_apply=%layer
  %call.2 = f32[8]{0} call(%call.1), to_apply=%layer
  %all-gather-start.1 = (bf16[2,4]{1,0}, bf16[2,16]{1,0}) all-gather-start(%b), dimensions={1}
  %all-gather-done.1 = bf16[2,16]{1,0} all-gather-done(%all-gather-start.1)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %conditional.1 = f32[8]{0} conditional(%i, %p, %p), branch_computations={%layer, %other}
  %while.1 = (s32[], /*index=1*/f32[8]) while(%t), condition=%cond, body=%region_0.1.clone
  %reduce-scatter.1 = f32[2]{0} reduce-scatter(%p), to_apply=%add
}
"""


def test_collectives_of_a_program() -> None:
    found = collectives(HLO)
    assert sorted(each.kind for each in found.once) == ["all-reduce", "reduce-scatter"]
    assert found.counts() == {"all-reduce": 2, "all-gather": 1}
    assert max(each.num_bytes for each in found.per_iteration) == 2 * 16 * 2


# -- plans -----------------------------------------------------------------------------------------------------------


def test_an_unknown_topology_is_told_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--topology", "v5e-3"]) == 1
    told = capsys.readouterr().err
    assert "'v5e-3' is not known" in told and "v5e-8, " in told and "tpu7x-4" in told and "h100-2" in told


@pytest.mark.parametrize(("name", "extra"), [("v5e-1", "mmjax[tpu]"), ("h100-1", "mmjax[gpu]")])
def test_a_missing_compiler_is_named(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="No device is needed") as caught:
        Topology.of(name).devices()
    assert f"pip install '{extra}'" in str(caught.value)


def test_sizes_of_slices() -> None:
    assert (Topology.of("tpu7x-4").num_devices, Topology.of("v5p-8").num_hosts, Topology.of("V5E-8").num_hosts) == (
        8,
        2,
        1,
    )


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> _Planner:
    """Of Qwen3-VL-30B-A3B on four chips, whose devices are those of this machine."""
    from mmjax.cli.bench import published_sizes

    directory = tmp_path_factory.mktemp("model")
    published_sizes.write_model("qwen3-vl-30b-a3b", directory)
    args = EngineArgs(str(directory), max_model_len=4096, tensor_parallel_size=4, dtype="bfloat16")
    planned = _Planner("qwen3-vl-30b-a3b", args, Topology.of("v5p-4"), Checkpoint.open(str(directory)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Topology, "devices", lambda _: jax.devices()[:4])
        assert planned.replica.spec
    return planned


def test_bounds_count_what_a_step_needs(planner: _Planner) -> None:
    """30.5e9 parameters, of which a token uses 3.3e9, the head among them and the embedding not."""
    text = sum(
        np.prod(x.shape)
        for path, value in planner.replica.abstract_params.items()
        if path.startswith("text.")
        for x in jax.tree.leaves(value)
    )
    assert text == pytest.approx(30.5e9, rel=0.01)
    assert planner._flops(0) == pytest.approx(2 * (3.34e9 - 151936 * 2048), rel=0.02)
    whole, one = (sum(planner._read_bytes(tokens).values()) for tokens in (10**6, 1))
    assert 6 < whole / one < 12
    attention = planner._flops(1024) - planner._flops(0)
    assert attention == 4 * 1024 * 32 * 128 * 48


def test_a_plan_is_printed(planner: _Planner) -> None:
    memory = planner.replica.memory(planner._device)
    sizes = planner._sizes(memory, MEASURED)
    assert sizes["padding"]["cache_bytes_per_token"] == 0
    assert sizes["cache_tokens"] == (memory.num_blocks - 1) * 64
    serve = sizes["serve"]
    assert {"--tensor-parallel-size 4", "--max-model-len 4096"} <= set(re.findall(r"--\S+ \S+", serve))
    assert "--kv-cache-memory-bytes" in serve
    named = dataclasses.replace(
        planner.args, quantization="int8", enable_prefix_caching=False, limit_mm_per_prompt={"image": 2}
    )
    given = dataclasses.replace(planner, args=named)
    vars(given)["replica"] = planner.replica
    for flag in ("--quantization int8", "--no-enable-prefix-caching", """--limit-mm-per-prompt '{"image": 2}'"""):
        assert flag in given._serve(memory)
    assert planner._served(memory) == memory, "the printed flags give these sizes"
    plan = Plan("qwen3-vl-30b-a3b", "v5p-4", 4, 1, True, "", GIB, GIB // 2, **sizes)
    told = as_text(plan)
    assert "qwen3-vl-30b-a3b on v5p-4: fits" in told and serve in told and "decode, 32 x 1024 tokens" in told
    assert "does not fit: too large" in as_text(dataclasses.replace(plan, fits=False, reason="too large"))


def test_weights_larger_than_the_memory_are_not_compiled(planner: _Planner) -> None:
    chip = dataclasses.replace(planner.topology.chip, memory_bytes=GIB)
    small = dataclasses.replace(planner, topology=dataclasses.replace(planner.topology, chip=chip))
    vars(small)["replica"] = planner.replica
    plan = small.plan(keep=False)
    assert not plan.fits and plan.reason == "the weights alone are larger than the memory"
