"""The environment of all tests: CPU, four devices, one thread per library, strict dtypes, warnings as errors."""

import dataclasses
import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmjax.engine.compile_counter import CompileCounter

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tiny models spend their time in the compiler. The programs of a tiny Qwen2-VL take 12 s of it without LLVM's
# optimizations, 4 s with the older emitters of fusions as well. One module per program, not 32, needs 1 500 memory maps
# instead of 2 000.
for flag in (
    "--xla_force_host_platform_device_count=4",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

# By the environment, so that the processes which tests start have the compiled programs too. Every program is written:
# to trace and compile even a small one again costs more than to read it.
_user_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_user_cache / "mmjax-tests" / f"jax-{version('jax')}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# The same holds for Python's bytecode, also where containers turn it off: to rewrite the assertions of all tests takes
# each process 8 s.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jax  # noqa: E402 - reads the environment when it is imported
import pytest  # noqa: E402
from cachetools import LRUCache  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

SHARE_ENGINES = (
    *(f"tests/{folder}/" for folder in ("docs", "engine", "serve", "vllm_docs")),
    "tests/models/test_preemption.py",
    "tests/models/test_recorded.py",
)
UNSHARED = ("tests/engine/test_decode_programs.py", "tests/engine/test_sampler.py")
ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("mmjax") is None:
    sys.path.append(str(ROOT))  # last, so that the root's kernels/ never hides an installed distribution of that name

jax.config.update("jax_numpy_dtype_promotion", "strict")

# Tracing and log-probabilities over whole vocabularies make many small objects beside a large heap: by default, looking
# for garbage among them takes a fifth of the time of test_goldens.py. `leave_nothing` collects after every file.
gc.set_threshold(50_000, 20, 50)

# These packages' annotations are checked at every call, so the shapes and dtypes of arrays while a program is traced.
install_import_hook(
    ["mmjax.kernels", "mmjax.nn", "mmjax.models"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",  # an int will do for a float
)


@pytest.fixture(scope="module", autouse=True)
def leave_nothing() -> Iterator[None]:
    """Let go of what tests compiled once it is much, and see that it went: XLA maps each function of each program for
    itself (an engine has 1 000 to 5 000 maps), and a process that has used up Linux' 65 530 crashes at the next one.

    Not after every file: the next one would trace jax.numpy's functions again.
    """
    yield
    if memory_maps() > 25_000:
        gc.collect()
        jax.clear_caches()
    count = memory_maps()
    assert count < 30_000, f"{count} memory maps are left: a fixture keeps engines that later tests do not use"


def memory_maps() -> int:
    """The memory maps of this process, 0 where the system does not tell."""
    maps = Path("/proc/self/maps")
    return len(maps.read_bytes().splitlines()) if maps.exists() else 0


@pytest.fixture(scope="session", autouse=True)
def share_programs() -> Iterator[None]:
    """An engine of the same sizes, dtypes and devices as an earlier one takes over its programs. To trace those of a
    tiny Qwen2-VL again and to read them from the compilation cache takes 2.6 s.

    Buckets are no sizes of a program, since its key has its own; only the largest number of sequences is one.
    """
    from mmjax import kernels
    from mmjax.engine.model_runner import ModelRunner
    from mmjax.engine.programs import ProgramKey

    compile_anew = ModelRunner._compile
    made: LRUCache[Hashable, Any] = LRUCache(maxsize=96)  # 150 memory maps each
    lock = threading.Lock()

    def take_or_compile(runner: ModelRunner, key: ProgramKey, free: Sequence[bool] = ()) -> Any:
        functions, buckets = runner.functions, runner.functions.buckets
        sizes = dataclasses.replace(
            buckets, token_buckets=(), seq_buckets=buckets.seq_buckets[-1:], encoder_buckets={}, embed_rows=0
        )
        leaves, structure = jax.tree.flatten((runner.params, runner.state))
        whole = (
            (key, tuple(free)),
            functions.graph,
            functions.paths,
            repr((functions.spec, sizes, functions.stops_early, runner.dtype, runner.platform)),
            functions.replicated,
            structure,
            tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves),
            kernels.multiplies_bfloat16(),
        )
        with lock:  # a warm-up compiles in several threads
            program = made.get(whole)
        if program is None:
            program = compile_anew(runner, key, free)
            with lock:
                made[whole] = program
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "_compile", take_or_compile)
        # Traced programs on disk would outlive what tests patch in traced code. They are also for programs that start
        # more often than their code changes: to write them takes a fifth more time, to read them saves two fifths.
        patch.setattr(ModelRunner, "_program_cache", lambda runner: None)
        yield


@pytest.fixture
def one_decode_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made meanwhile decode few sequences with the program for many: the other one takes a CPU second to
    compile. For tests that compare with something else than the same engine's outputs at another size."""
    monkeypatch.setattr("mmjax.engine.memory._seq_buckets", lambda largest: (largest,))


@pytest.fixture
def compiles() -> "Iterator[CompileCounter]":
    """Counts the programs asked of XLA while the test runs. `compiles.count` does not depend on earlier runs."""
    from mmjax.engine.compile_counter import count_compiles

    with count_compiles() as counter:
        yield counter


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden inputs and outputs, which is no part of the repository."""
    folder = Path(os.environ.get("MMJAX_SHARED", ROOT.parent / "shared"))
    if not (folder / "reference").is_dir():
        pytest.skip(f"no reference data: {folder}/reference is not a folder (set MMJAX_SHARED)")
    return folder


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_dir(family)`: a tiny random checkpoint of that family in the hub's layout, made once per session."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            import tiny

            folder = tmp_path_factory.mktemp(family)
            tiny.make(family, folder)
            made[family] = folder
        return made[family]

    return make


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist=loadfile`, but the files in SHARE_ENGINES run in one process, where they share programs. Without those of
    UNSHARED they take half the time of all tests. The functions of the longest file of `-m parity` run in both."""
    from xdist.scheduler import LoadFileScheduling

    class LoadEngineScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            if file == "tests/models/test_parity.py":
                return nodeid.partition("[")[0]
            shares = file.startswith(SHARE_ENGINES) and file not in UNSHARED
            return "engines" if shares else file

    return LoadEngineScheduling(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_torch = importlib.util.find_spec("torch") is None
    no_gpu = jax.default_backend() == "cpu"
    for item in items:
        if no_torch and item.get_closest_marker("parity"):
            item.add_marker(pytest.mark.skip(reason="torch is not installed"))
        if no_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="jax sees no accelerator (JAX_PLATFORMS=cuda pytest -m gpu)"))
