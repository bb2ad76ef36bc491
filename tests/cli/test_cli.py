"""The command line: flags in every form, and commands that can be tried without a device."""

import argparse
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mmjax
from mmjax.cli import flags
from mmjax.cli.main import main
from mmjax.config import EngineArgs


def parsed(*argv: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    flags.add_engine_flags(parser)
    return flags.engine_kwargs(parser.parse_args(flags.fold(argv)))


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], {}),
        (["--dtype", "float32", "--max-num-seqs=3"], {"dtype": "float32", "max_num_seqs": 3}),
        (["--max_num_seqs", "3"], {"max_num_seqs": 3}),
        (["--gpu-memory-utilization", "0.5"], {"gpu_memory_utilization": 0.5}),
        (["--max-model-len", "-1"], {"max_model_len": "-1"}),
        (["--enforce-eager"], {"enforce_eager": True}),
        (["--no-enable-mm-embeds"], {"enable_mm_embeds": False}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--allowed-media-domains", "a.com", "b.com"], {"allowed_media_domains": ["a.com", "b.com"]}),
        (["--mm-encoder-tp-mode", "data"], {"mm_encoder_tp_mode": "data"}),
        (["--skip-mm-profiling", "--tokenizer-mode=hf"], {"skip_mm_profiling": True, "tokenizer_mode": "hf"}),
        (["--limit-mm-per-prompt", '{"image": 2}'], {"limit_mm_per_prompt": {"image": 2}}),
        (["--limit-mm-per-prompt.image", "2"], {"limit_mm_per_prompt": {"image": 2}}),
        (["--limit_mm_per_prompt.video.count=1"], {"limit_mm_per_prompt": {"video": {"count": 1}}}),
        (["--media-io-kwargs.video.num-frames", "8"], {"media_io_kwargs": {"video": {"num_frames": 8}}}),
        (["--hf-overrides.name", "a word"], {"hf_overrides": {"name": "a word"}}),
        (["--hf-overrides.flag", "true"], {"hf_overrides": {"flag": True}}),
        (["--hf-overrides.x.y+", "1", "--hf-overrides.x.y+=a,b"], {"hf_overrides": {"x": {"y": [1, "a", "b"]}}}),
        (
            ["--limit-mm-per-prompt.image", "2", "--limit-mm-per-prompt", '{"video": 1}'],
            {"limit_mm_per_prompt": {"image": 2, "video": 1}},
        ),
    ],
)
def test_flags(argv: list[str], wanted: dict[str, Any]) -> None:
    assert parsed(*argv) == wanted
    EngineArgs("model", **parsed(*argv))


def test_one_domain_alone_is_a_list_of_one() -> None:
    assert EngineArgs("model", allowed_media_domains="a.com").allowed_media_domains == ["a.com"]


def test_human_sizes() -> None:
    assert EngineArgs("model", **parsed("--max-model-len", "4k")).max_model_len == 4000
    assert EngineArgs("model", **parsed("--max-model-len", "4K")).max_model_len == 4096


def test_the_last_value_wins_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        wanted = {"limit_mm_per_prompt": {"image": 3}}
        assert parsed("--limit-mm-per-prompt.image", "2", "--limit-mm-per-prompt.image", "3") == wanted
    assert "--limit-mm-per-prompt.image is given more than once" in caplog.text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--limit-mm-per-prompt", "image=2"], r"""write '\{"image": 2\}' or --limit-mm-per-prompt.image 2"""),
        (["--limit-mm-per-prompt", "[1]"], "takes a JSON object"),
        (["--limit-mm-per-prompt", "{"], "takes a JSON object"),
        (["--limit-mm-per-prompt.image"], "needs a value"),
        (["--limit-mm-per-prompt.image", "--seed"], "needs a value"),
        (["--dtype.x", "1"], "takes no keys"),
    ],
)
def test_flags_that_cannot_be_understood(argv: list[str], message: str) -> None:
    with pytest.raises(flags.FlagError, match=message):
        flags.fold(argv)


def test_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "throughput", "model", "--limit-mm-per-prompt", "image=2"])
    assert stop.value.code == 2
    assert "--limit-mm-per-prompt.image 2" in capsys.readouterr().err


def test_help_is_quick_and_imports_no_jax() -> None:
    code = (
        "import sys, mmjax.cli.main as m\ntry: m.main(['--help'])\nexcept SystemExit: assert 'jax' not in sys.modules"
    )
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code], cwd=Path(mmjax.__file__).parent.parent, check=True, capture_output=True
    )
    assert time.perf_counter() - begin < 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"{mmjax.__version__}\n"


def test_a_directory_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "holds no config.json" in capsys.readouterr().err


def test_convert_and_inspect(
    tiny_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, made = tiny_dir("qwen2_vl"), tmp_path / "made"
    assert main(["inspect", str(source)]) == 0
    assert "0 problems" in capsys.readouterr().out
    assert main(["convert", str(source), str(made), "--dtype", "bfloat16"]) == 0
    assert "parameters from" in capsys.readouterr().out
    assert main(["inspect", str(made)]) == 0
    told = capsys.readouterr().out
    assert "orbax" in told and "bfloat16" in told and "0 problems" in told


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_bench(kind: str, tiny_dir: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    shape = [
        "--prompts",
        "3",
        "--text",
        "8",
        "--image",
        "56x56",
        "--output",
        "5",
        "--repeats",
        "2",
        "--json",
        str(file),
    ]
    small = ["--max-model-len", "64", "--max-num-seqs", "1", "--max-num-batched-tokens", "64", "--load-format", "dummy"]
    small.append("--enforce-eager")  # three programs to compile instead of all
    traced = ["--profile", str(tmp_path / "trace")] if kind == "throughput" else []
    assert main(["bench", kind, str(tiny_dir("qwen2_vl")), *shape, *small, *traced]) == 0
    told = capsys.readouterr().out
    assert "output_tokens_per_s" in told
    phases = ("encode", "prefill", "decode") if traced else ()
    assert all(re.search(rf"^{phase} +\d", told, re.MULTILINE) for phase in phases)
    report = json.loads(file.read_text())
    assert report["requests"] == 3 and report["output_tokens"] == 15 and report["decode_steps_per_s"] > 0
    assert report["ttft_ms"]["median"] > 0 and 0 <= report["idle_share"] <= report["host_share"] <= 1
