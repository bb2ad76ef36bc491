"""The tables of vLLM's arguments: each row says what the parser and the constructor do."""

import argparse
import logging
import re
from types import ModuleType
from typing import Any

import pytest

from doc_blocks import PAGES
from mmjax import RequestError
from mmjax.cli import flags
from mmjax.cli.main import MAPPINGS, main, model_parser
from mmjax.config import EngineArgs
from mmjax.types.vllm_arguments import ENGINE, KEYWORDS, OLDER, SERVER, VERSION, Argument, settle

Rows = dict[str, tuple[str, str]]


@pytest.fixture(scope="module")
def page(tables: ModuleType) -> str:
    """The page for users of vLLM, as on the site."""
    text: str = tables.on_page_markdown(PAGES["vllm.md"].read_text())
    return text


def rows(page: str, heading: str) -> Rows:
    """name -> (what becomes of it, why) of the table under a heading."""
    section = re.search(rf"^### {heading}\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    assert section is not None
    found = re.findall(r"^\| `(\w+)`[^|]* \| (\w+) \| (.*) \|$", section[1], re.MULTILINE)
    return {name: (outcome, note) for name, outcome, note in found}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return model_parser("serve")


def given(argument: Argument | None) -> tuple[list[str], Any]:
    """The words on the command line after the flag, and the value in Python, that ask for something."""
    if argument is None or argument.form == "value":
        return ["7"], "7"
    if argument.form == "switch":
        return [], next(value for value in (True, False) if argument.asks(value))
    if argument.form == "json":
        return ['{"a": 1}'], {"a": 1}
    return ["a", "b"], ["a", "b"]


def word(name: str, value: Any) -> str:
    return flags.flag(f"no_{name}" if value is False else name)


def parse(parser: argparse.ArgumentParser, name: str, argument: Argument | None) -> Any:
    """The parsed value of a flag."""
    words, value = given(argument)
    parsed = vars(parser.parse_args(flags.fold(["model", word(name, value), *words], MAPPINGS)))
    assert parsed[name] == value
    return parsed[name]


def check(outcome: str, note: str, name: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A keyword of `LLM` is ignored with one line that says why, or refused with what to do."""
    caplog.clear()
    known = KEYWORDS if name in KEYWORDS else SERVER
    if outcome == "refused":
        with pytest.raises(RequestError, match=re.escape(f"{name} is not supported: {note}")):
            settle({name: value}, known)
        return
    assert outcome == "ignored"
    settle({name: value}, known)
    assert caplog.messages == [f"{name} does nothing here: {note}."]


def test_the_tables_name_the_version(page: str) -> None:
    assert f"vLLM {VERSION}" in page


def test_engine_arguments(page: str, parser: argparse.ArgumentParser, caplog: pytest.LogCaptureFixture) -> None:
    found = rows(page, "Keywords of LLM, and their flags")
    assert len(found) > 180 and ENGINE.keys() <= found.keys()
    for name, (outcome, note) in found.items():
        if outcome == "works":
            assert name in flags.FIELDS and flags.flag(name) in parser._option_string_actions
        elif name in flags.FIELDS:  # checked as any other field
            check(outcome, note, name, not ENGINE[name].default, caplog)
        elif name in flags.OF_SERVER:  # the server's flag of this name works
            check(outcome, note, name, "name", caplog)
        else:
            check(outcome, note, name, parse(parser, name, ENGINE[name]), caplog)


def test_server_flags(page: str, parser: argparse.ArgumentParser, caplog: pytest.LogCaptureFixture) -> None:
    found = rows(page, "Other flags of vllm serve")
    assert len(found) > 45 and SERVER.keys() <= found.keys()
    for name, (outcome, note) in found.items():
        if outcome == "works":
            assert flags.flag(name) in parser._option_string_actions and name not in SERVER
        else:
            check(outcome, note, name, parse(parser, name, SERVER[name]), caplog)


def test_older_arguments(page: str, parser: argparse.ArgumentParser, caplog: pytest.LogCaptureFixture) -> None:
    for name, (outcome, note) in rows(page, "Arguments of earlier releases").items():
        if outcome == "works":
            assert flags.flag(name) in parser._option_string_actions
        else:
            check(outcome, note, name, parse(parser, name, OLDER[name]), caplog)


def test_what_vllm_does_by_default_is_accepted_silently(caplog: pytest.LogCaptureFixture) -> None:
    defaults = {name: argument.default for name, argument in KEYWORDS.items()}
    assert EngineArgs.of("model", **defaults) == EngineArgs("model")
    usual = {"enable_chunked_prefill": True, "kv_cache_dtype": "auto", "pipeline_parallel_size": "1"}
    assert EngineArgs.of("model", **usual, cpu_offload_gb=0.0, config_format="hf") == EngineArgs("model")
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("keywords", "wanted"),
    [
        ({"task": "embed"}, {"runner": "pooling"}),
        ({"task": "generate"}, {"runner": "generate"}),
        ({"task": "auto"}, {}),
        ({"disable_mm_preprocessor_cache": True}, {"mm_processor_cache_gb": 0.0}),
        ({"rope_theta": 1e6}, {"hf_overrides": {"rope_theta": 1e6}}),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "hf_overrides": {"num_hidden_layers": 2}},
            {"hf_overrides": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "num_hidden_layers": 2}},
        ),
        ({"load_format": "safetensors"}, {"load_format": "safetensors"}),
        ({"pooler_config": {"seq_pooling_type": "LAST", "use_activation": True}}, {}),
        ({"override_pooler_config": {"pooling_type": "LAST"}}, {}),
    ],
)
def test_other_names(keywords: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert EngineArgs.of("model", **keywords) == EngineArgs("model", **wanted)


def test_what_the_constructor_refuses(caplog: pytest.LogCaptureFixture) -> None:
    for keywords, words in (
        ({"task": "classify"}, "task 'classify' is not supported"),
        ({"enable_lora": True}, "merge the adapter into the weights"),
        ({"pooler_config": {"pooling_type": "MEAN"}}, "the final hidden state of the last token"),
        ({"kv_cache_dtype": "fp8"}, 'leave it at "auto"'),
    ):
        with pytest.raises(ValueError, match=words):
            EngineArgs.of("model", **keywords)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no_such_argument"):
        EngineArgs.of("model", no_such_argument=1)
    with caplog.at_level(logging.WARNING):
        assert EngineArgs.of("model", trust_remote_code=True, swap_space=8).trust_remote_code
    assert [line.partition(" ")[0] for line in caplog.messages] == ["trust_remote_code", "swap_space"]


COMMAND = (
    "serve model -tp 2 -dp=2 --enable-chunked-prefill --task generate --swap-space 4 --disable-log-requests "
    "--download-dir /models --kv-cache-dtype auto --load-format safetensors -q int8 -O3 -cc.mode 3 --hf-token "
    "--max-num-batched-tokens 8k"
)


def test_a_usual_command(parser: argparse.ArgumentParser, caplog: pytest.LogCaptureFixture) -> None:
    parsed = parser.parse_args(flags.fold(COMMAND.split()[1:], MAPPINGS))
    args = EngineArgs.of("model", **flags.engine_kwargs(parsed))
    assert (args.tensor_parallel_size, args.data_parallel_size, args.quantization) == (2, 2, "int8")
    assert (args.download_dir, args.hf_token, args.max_num_batched_tokens) == ("/models", True, 8000)
    assert [line.partition(" ")[0] for line in caplog.messages] == [
        "disable_log_requests", "optimization_level", "compilation_config",
    ]  # fmt: skip


def test_a_refused_flag_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "model", "--api-server-count", "2"]) == 1
    assert "api_server_count is not supported: one process serves one engine" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "model", "--max-num-batched-tokens", "many"])
    assert "must be a number such as 4096, 4k or 4K" in capsys.readouterr().err
