"""The flags of `mmjax serve`: on the command line, in a file, in the environment."""

from pathlib import Path
from typing import Any

import pytest

from mmjax.cli import flags
from mmjax.cli.main import _model_command, main, server_settings
from mmjax.config import EngineArgs


def parsed(*words: str) -> tuple[Any, dict[str, Any]]:
    """(settings of the server, arguments of the engine) from the flags of `mmjax serve`."""
    arguments = _model_command("serve", words)
    engine = flags.engine_kwargs(arguments)
    EngineArgs(arguments.model, **engine)
    return server_settings(arguments), engine


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (
            "microsoft/Phi-3.5-vision-instruct --runner generate --trust-remote-code --max-model-len 4096 "
            "--limit-mm-per-prompt.image 2",
            {
                "runner": "generate", "trust_remote_code": True, "max_model_len": "4096",
                "limit_mm_per_prompt": {"image": 2},
            },
        ),
        (
            "llava-hf/llava-onevision-qwen2-0.5b-ov-hf --runner generate --max-model-len 8192",
            {"runner": "generate", "max_model_len": "8192"},
        ),
        (
            'X --media-io-kwargs {"video":{"frame_recovery":true}}',
            {"media_io_kwargs": {"video": {"frame_recovery": True}}},
        ),
        (
            'X --media-io-kwargs {"image":{"rgba_background_color":[0,0,0]}}',
            {"media_io_kwargs": {"image": {"rgba_background_color": [0, 0, 0]}}},
        ),
        ("fixie-ai/ultravox-v0_5-llama-3_2-1b", {}),
        (
            "X --allowed-media-domains upload.wikimedia.org github.com www.bogotobogo.com",
            {"allowed_media_domains": ["upload.wikimedia.org", "github.com", "www.bogotobogo.com"]},
        ),
        (
            "TIGER-Lab/VLM2Vec-Full --runner pooling --chat-template x.jinja",
            {"runner": "pooling", "chat_template": "x.jinja"},
        ),
        ("--port 80 --no-enable-prefix-caching X", {"enable_prefix_caching": False}),
        ("--model X --max_num_seqs=3", {"max_num_seqs": 3}),
    ],
)  # fmt: skip
def test_engine_flags(words: str, wanted: dict[str, Any]) -> None:
    assert parsed(*words.split())[1] == wanted


def test_server_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "from outside")
    monkeypatch.setenv("MMJAX_MAX_AUDIO_CLIP_FILESIZE_MB", "3")
    plain = parsed("X")[0]
    assert plain.names == ("X",) and plain.keys == ("from outside",) and plain.audio_mb == 3 and plain.origins == ("*",)
    chosen = parsed(
        "X", "--served-model-name", "a", "b", "--api-key", "k", "l", "--response-role", "bot", "--allowed-origins",
        '["http://a", "http://b"]', "--default-chat-template-kwargs.thinking", "false",
        "--enable-prompt-tokens-details", "--enable-force-include-usage", "--trust-request-chat-template",
        "--tool-call-parser", "none",
    )[0]  # fmt: skip
    assert chosen.names == ("a", "b") and chosen.keys == ("k", "l") and chosen.role == "bot"
    assert chosen.origins == ("http://a", "http://b") and chosen.template_kwargs == {"thinking": False}
    assert chosen.prompt_details and chosen.always_usage and chosen.template_from_requests
    assert chosen.tool_parser is None


@pytest.mark.parametrize(("words", "closed"), [("", None), (".backend=guidance", None), (
    ".disable_additional_properties=false", False), (".disable_additional_properties=true", True)])  # fmt: skip
def test_closed_objects(words: str, closed: bool | None) -> None:
    given = [f"--structured-outputs-config{words}"] if words else []
    assert server_settings(_model_command("serve", ["X", *given])).closed_objects is closed


def test_flags_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(
        "model: X\nmax_model_len: 4k\nenforce-eager: true\nenable-prefix-caching: false\nallowed-origins: [a, b]\n"
        "limit-mm-per-prompt: {image: 2, video: 1}\nallowed-media-domains: [a.com, b.com]\nseed:\n"
    )
    chosen, engine = parsed("--config", str(file))
    assert chosen.names == ("X",) and chosen.origins == ("a", "b")
    assert engine == {
        "max_model_len": "4k", "enforce_eager": True, "enable_prefix_caching": False,
        "limit_mm_per_prompt": {"image": 2, "video": 1}, "allowed_media_domains": ["a.com", "b.com"],
    }  # fmt: skip
    words = [
        f"--config={file}",
        "Y",
        "--max-model-len",
        "9",
        "--limit-mm-per-prompt.image",
        "5",
        "--allowed-media-domains",
        "c",
    ]
    chosen, engine = parsed(*words)
    assert chosen.names == ("Y",) and engine["max_model_len"] == "9" and engine["allowed_media_domains"] == ["c"]
    assert engine["limit_mm_per_prompt"] == {"image": 5, "video": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["X", "--limit-mm-per-prompt", "image=2"], "--limit-mm-per-prompt.image 2"),
        (["X", "--limit-mm-per-prompt", "image=2,video=1"], """'{"image": 2, "video": 1}'"""),
        ([], "which model?"),
        (["X", "--no-such-flag"], "--no-such-flag"),
        (["X", "--config", "/no/such/file"], "No such file"),
        (["X", "--default-chat-template-kwargs", "[1]"], "takes a JSON object"),
        (["X", "--port", "http"], "invalid int value"),
    ],
)
def test_invalid_command_lines(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", *words])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ssl-certfile", "/no/such.pem"], "--ssl-certfile: there is no file /no/such.pem"),
        (["--ssl-keyfile", __file__], "needs --ssl-certfile"),
        (["--port", "70000"], "ports end at 65535"),
    ],
)
def test_invalid_settings_fail_before_the_model_is_loaded(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "/no/such/model", *words]) == 1
    assert message in capsys.readouterr().err


def test_invalid_flag_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in (("- a\n- b\n", "expected one"), ("a: [", "flags.yaml"), ("nonsense: 1", "--nonsense")):
        (tmp_path / "flags.yaml").write_text(text)
        with pytest.raises(SystemExit):
            main(["serve", "X", "--config", str(tmp_path / "flags.yaml")])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "chat", "run-batch"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "--max-model-len" in printed and "--config" in printed
