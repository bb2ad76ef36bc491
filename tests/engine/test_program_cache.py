"""Traced programs on disk: read where they fit, made again where they do not."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mmjax import LLM
from mmjax.engine import program_cache
from mmjax.engine.model_runner import ModelRunner
from mmjax.engine.program_cache import ProgramCache
from mmjax.engine.programs import SetLogitBiases, StepFunctions

KEY = SetLogitBiases(1)


@pytest.fixture
def runner(qwen: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModelRunner:
    runner = qwen.model.engines[0].runner
    monkeypatch.setattr(runner, "program_cache", ProgramCache(tmp_path, "a model"))
    return runner


def files(tmp_path: Path) -> list[Path]:
    return [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_known_program_is_not_traced(runner: ModelRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with jax.set_mesh(runner.mesh):
        first = runner._lower(KEY)
        assert len(files(tmp_path)) == 1

        def fail(*_: object) -> None:
            raise AssertionError("traced")

        monkeypatch.setattr(StepFunctions, "set_logit_biases", fail)
        again = runner._lower(KEY)
        assert again.in_avals == first.in_avals and again.out_info == first.out_info
        assert "module @jit_set_logit_biases" in again.as_text(), "profiles tell programs apart by their names"
        with pytest.raises(AssertionError, match="traced"):
            runner._lower(SetLogitBiases(2))


@pytest.mark.parametrize("damage", ["cut", "empty", "other model", "other code"])
def test_what_does_not_fit_is_traced_again(
    runner: ModelRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    with jax.set_mesh(runner.mesh):
        runner._lower(KEY)
        (file,) = files(tmp_path)
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-100])
        elif damage == "empty":
            file.write_bytes(b"")
        elif damage == "other model":
            monkeypatch.setattr(runner, "program_cache", ProgramCache(tmp_path, "another model"))
        else:
            monkeypatch.setattr(program_cache, "source_digest", lambda: "other")
            monkeypatch.setattr(runner, "program_cache", ProgramCache(tmp_path, "a model"))
        traced = []
        whole = StepFunctions.set_logit_biases

        def count(*args: jax.Array) -> object:
            traced.append(args)
            return whole(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(StepFunctions, "set_logit_biases", count)
        runner._lower(KEY)
    assert traced


def test_programs_of_old_code_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_cache.export(jax.jit(jnp.sin), (jnp.ones(3),))
    assert program is not None
    for code in "abcdef":
        monkeypatch.setattr(program_cache, "source_digest", lambda code=code: code)
        cache = ProgramCache(tmp_path, "a model")
        cache.write(KEY, program)
        assert cache.read(KEY) is not None
    assert len(files(tmp_path)) == program_cache.KEPT_SOURCES


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = program_cache.export(jax.jit(jnp.sin), (jnp.ones(3),))
    assert program is not None
    (tmp_path / "traced").write_text("a file in its place")
    cache = ProgramCache(tmp_path, "a model")
    cache.write(KEY, program)
    cache.write(KEY, program)
    assert cache.read(KEY) is None and caplog.text.count("cannot be kept") == 1
