"""`mmjax run`: scripts in the shape of vLLM's examples run as they are, and its names are mmjax's while they run."""

import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import mmjax
from doc_blocks import blocks_of
from mmjax.cli.main import main
from mmjax.cli.vllm_modules import MIRROR, MODULES, vllm_is_mmjax
from mmjax.config import EngineArgs
from mmjax.engine.loaded_model import LoadedModel
from mmjax.entrypoints.load_model import load_model
from mmjax.types import RequestError

SCRIPTS = Path(__file__).parent / "vllm_scripts"
TINY = {"Qwen/Qwen2.5-Omni-7B": "qwen2_5_omni", "Qwen/Qwen2-VL-2B-Instruct": "qwen2_vl"}
SMALL: dict[str, Any] = {  # few programs to compile
    "max_model_len": 384, "block_size": 16, "max_num_seqs": 1, "max_num_batched_tokens": 128, "num_decode_steps": 4,
    "enforce_eager": True, "enable_mm_embeds": True, "mm_processor_kwargs": {"min_pixels": 784, "max_pixels": 3136},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny_dir: Callable[[str], Path]) -> Iterator[dict[tuple[str, bool], LoadedModel]]:
    """Every script's LLM has a tiny model in place of the published one, which it shares with the other scripts."""
    made: dict[tuple[str, bool], LoadedModel] = {}

    def load(args: EngineArgs, **_: Any) -> LoadedModel:
        key = (args.model, args.pooling)
        if key not in made:
            small = SMALL | ({"max_num_batched_tokens": 32} if args.pooling else {})
            made[key] = load_model(EngineArgs(str(tiny_dir(TINY[args.model])), runner=args.runner, **small))
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmjax.entrypoints.llm.load_model", load)
        yield made


CASES: list[tuple[str, list[str], str]] = [
    ("vision", [], r"elapsed True\n\d+ '.*'\n\d+ '.*'\n"),
    ("vision", ["--modality=video", "--num_prompts", "1", "-tp", "1"], r"elapsed True\n\d+ '.*'\n"),
    ("multi_image", [], r"\d+ (\[.*\])\n(\[.*\])\n"),
    ("audio", ["--num-audios", "0"], r"\d+ 4\n"),
    ("audio", ["--num-audios", "2"], r"\d\d+ 4\n"),
    ("embedding", ["--dtype", "float32", "-tp", "1"], r"64 1\.0\n64 1\.0\n\(8,\)\n1\.0 True\n"),
    (
        "chat",
        ["--max-tokens", "3", "--temperature", "0", "--swap-space", "4", "--limit-mm-per-prompt.image", "2",
         "--chat-template-path", "TEMPLATE"],
        r"'.*' 3\n'.*' 3\n'4 messages'\n",
    ),
    (
        "batch", [],
        r"\[1, 2, 3, 4, 5\] 1\n(vllm:\w+ (0|True)\n)+True True True\nTrue False\n",
    ),
    ("stream", [], r"steps True\nsteps True\nsame True\n"),
    ("steps", ["--model", "Qwen/Qwen2.5-Omni-7B", "--max_num_seqs", "4"], 
     r"0 \[3\]\n(2 \[2, 2\]\n1 \[9\]\n|1 \[9\]\n2 \[2, 2\]\n)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "printed"), CASES, ids=[" ".join([c[0], *c[1][:2]]) for c in CASES])
def test_scripts(
    name: str, arguments: list[str], printed: str, models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages | length }} messages")
    words = [str(template) if word == "TEMPLATE" else word for word in arguments]
    assert main(["run", str(SCRIPTS / f"{name}.py"), *words]) == 0
    assert re.fullmatch(printed, capsys.readouterr().out)
    assert not any(module.partition(".")[0] == "vllm" for module in sys.modules)


def test_every_name_exists() -> None:
    with vllm_is_mmjax():
        for module, names in MODULES.items():
            found = importlib.import_module(module)
            for name in names:
                assert name == MIRROR or hasattr(found, name), (module, name)
            for name in found.__all__:
                getattr(found, name)


def test_the_examples_of_the_documentation_import_the_same_objects() -> None:
    """The code below the imports of an example is the same for both packages, so it does the same."""
    lines = {
        line
        for block in blocks_of("multimodal_inputs.md")
        for line in re.findall(r"^from mmjax.*$", block.code, re.MULTILINE)
        if "mmjax.demo" not in line
    }
    assert len(lines) > 3
    for line in lines:
        ours: dict[str, Any] = {}
        theirs: dict[str, Any] = {}
        exec(line, ours)
        with vllm_is_mmjax():
            exec(line.replace("mmjax", "vllm"), theirs)
        names = ours.keys() - {"__builtins__"}
        assert names and all(ours[name] is theirs[name] for name in names)


def test_what_is_not_there() -> None:
    with vllm_is_mmjax():
        import vllm  # type: ignore[import-not-found]

        assert vllm.LLM is mmjax.LLM and vllm.__version__ == "0.19.0"
        assert vllm.sampling_params.SamplingParams is mmjax.SamplingParams  # never imported
        with pytest.raises(ModuleNotFoundError, match=r"no counterpart of the module 'vllm\.no_such_module'"):
            importlib.import_module("vllm.no_such_module")
        with pytest.raises(AttributeError, match=r"no counterpart of vllm\.NoSuchName"):
            _ = vllm.NoSuchName
        with pytest.raises(ImportError):
            exec("from vllm.utils import no_such_function")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("vllm")


def test_what_has_no_meaning_is_refused_at_use() -> None:
    with vllm_is_mmjax():
        from vllm import ModelRegistry
        from vllm.config import KVTransferConfig, PoolerConfig
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import BeamSearchParams
        from vllm.v1.sample.logits_processor import LogitsProcessor

        class Mine(LogitsProcessor):  # type: ignore[misc]
            pass

        from vllm import EngineArgs as TheirArgs
    with pytest.raises(RequestError, match=r"ModelRegistry\.register_model is not supported: add a family"):
        ModelRegistry.register_model("Mine", object)
    for refused in (KVTransferConfig, BeamSearchParams):
        with pytest.raises(RequestError, match=f"{refused.__name__} is not supported: "):
            refused(beam_width=2)
    adapter = LoRARequest("mine", 1, "/adapter")
    assert adapter == LoRARequest("mine", 1, "/adapter") and hash(adapter)
    with pytest.raises(RequestError, match="LoRA is not supported"):
        mmjax.entrypoints.llm.check_adapters(1, adapter)
    for keywords in ({"logits_processors": [Mine]}, {"pooler_config": PoolerConfig(pooling_type="MEAN")}):
        with pytest.raises(RequestError, match=f"{next(iter(keywords))} is not supported"):
            TheirArgs("model", **keywords)
    made = TheirArgs("model", pooler_config=PoolerConfig(pooling_type="LAST"), swap_space=2, seed=None)
    assert EngineArgs(**asdict(made)) == EngineArgs("model")


def test_an_installed_vllm_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "vllm.py").write_text("LLM = 'theirs'")
    monkeypatch.syspath_prepend(tmp_path)
    outside = importlib.import_module("vllm")
    try:
        with caplog.at_level(logging.WARNING), vllm_is_mmjax():
            assert importlib.import_module("vllm").LLM is mmjax.LLM
        told = f"{tmp_path / 'vllm.py'} is not used: under `mmjax run`, `import vllm` imports mmjax."
        assert caplog.messages == [told]
        assert importlib.import_module("vllm") is outside
    finally:
        del sys.modules["vllm"]


def test_a_script_runs_as_python_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, beside\n"
        "print(__name__, sys.argv[1:], beside.NAME, __file__ == sys.argv[0])\n"
        "if sys.argv[1:] == ['--fail']:\n    raise ValueError('of the script')\n"
        "sys.exit(3)\n"
    )
    argv, path = list(sys.argv), list(sys.path)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["run", str(script), "--my_flag=1", "--help"])
        assert ended.value.code == 3
        with pytest.raises(SystemExit) as ended:
            main(["run", str(script), "--fail"])
    finally:
        sys.modules.pop("beside", None)
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "__main__ ['--my_flag=1', '--help'] beside True"
    assert err.splitlines()[:2] == ["Traceback (most recent call last):", f'  File "{script}", line 4, in <module>']
    assert (sys.argv, sys.path) == (argv, path)
    assert main(["run", str(tmp_path / "none.py")]) == 1
    assert "there is no script" in capsys.readouterr().err
