"""`mmjax bench` without an engine: arrivals, what a response says, figures, flags, published sizes, profiles."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from jax.profiler import ProfileData

from mmjax.cli.bench import CHAT, profile
from mmjax.cli.bench.plot import plot_sweep
from mmjax.cli.bench.published_configs import PUBLISHED
from mmjax.cli.bench.published_sizes import MODELS, model_files, write_model
from mmjax.cli.bench.serve import RandomRequests, ResponseReader, Target, arrivals, prepare, random_length
from mmjax.cli.bench.serve_metrics import Load, RequestResult, Selection, ServeResult
from mmjax.cli.main import main
from mmjax.loader.checkpoint import Checkpoint
from mmjax.loader.family import Family
from mmjax.loader.params import param_specs
from mmjax.models import FAMILIES
from mmjax.tokenizer.tokenizer import Tokenizer

# -- what is sent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0])
def test_arrivals(burstiness: float) -> None:
    times = arrivals(4000, Load(20.0, burstiness), np.random.default_rng(0))
    gaps = np.diff(times, prepend=0)
    assert times[-1] == pytest.approx(4000 / 20) and (gaps >= 0).all()
    spread = gaps.std() / gaps.mean()  # of a gamma distribution: the inverse root of its shape
    assert spread == pytest.approx(burstiness**-0.5, rel=0.1)


def test_arrivals_at_once() -> None:
    assert not arrivals(5, Load(), np.random.default_rng(0)).any()


def test_lengths() -> None:
    rng = np.random.default_rng(0)
    assert {random_length(10, 0.0, rng) for _ in range(9)} == {10}
    assert {random_length(10, 0.2, rng) for _ in range(99)} == {8, 9, 10, 11, 12}
    assert min(random_length(1, 0.9, rng) for _ in range(99)) == 1


def test_requests() -> None:
    inputs = RandomRequests(2, input_len=7, output_len=3, image_size=(40, 30), images_per_request=2, audio_s=0.1)
    target = Target("http://a:1/v1/", CHAT, "m", {"X-Team": "a"}, {"ignore_eos": True})
    first, second = prepare(target, inputs, [0, 1])
    assert str(first.http.url) == "http://a:1/v1/chat/completions" and first.http.headers["x-team"] == "a"
    body = json.loads(first.http.content)
    parts = body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "input_audio", "text"]
    assert len(parts[-1]["text"].split()) == 7 == first.input_tokens
    assert (body["max_completion_tokens"], body["stream"], body["ignore_eos"]) == (3, True, True)
    assert body["stream_options"] == {"include_usage": True} and "temperature" not in body
    assert second.http.content != first.http.content
    assert prepare(target, inputs, [0, 1])[1].http.content == second.http.content


# -- what comes back -----------------------------------------------------------------------------------------------


def read(*chunks: Any) -> ResponseReader:
    """A stream whose chunks arrive at 1, 2, ...; every event is cut in two."""
    reader = ResponseReader()
    for now, chunk in enumerate(chunks, 1):
        data = b"data: " + (chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()) + b"\r\n\r\n"
        reader.feed(data[:9], now - 0.5)
        reader.feed(data[9:], now)
    return reader


def delta(finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}


def test_a_chat() -> None:
    """The role is no token, a chunk without text is one, the last reason and the usage are none."""
    reader = read(
        delta(role="assistant", content=""), delta(content="a"), delta(content=""), delta("stop"), USAGE, b"[DONE]"
    )
    assert (reader.times, reader.last, reader.usage["completion_tokens"]) == ([2, 3], 4, 4)


def test_a_chat_with_the_role_in_every_chunk() -> None:
    reader = read(*(delta(role="assistant", content=text) for text in ("", "a", "b")))
    assert (reader.times, reader.last) == ([2, 3], 3)


@pytest.mark.parametrize("fields", [{"reasoning_content": "a"}, {"reasoning": "a"}, {"tool_calls": [{}]}])
def test_other_output(fields: dict[str, Any]) -> None:
    assert read(delta(role="assistant", **fields)).times == [1]


def test_completions_and_transcripts() -> None:
    assert read({"choices": [{"text": "a", "finish_reason": None}]}, {"choices": [{"text": "b"}]}).times == [1, 2]
    events = [
        {"type": "transcript.text.delta", "delta": "a"},
        {"type": "transcript.text.done", "usage": {"output_tokens": 3}},
    ]
    reader = read(*events)
    assert (reader.times, reader.last, reader.usage) == ([1], 2, {"output_tokens": 3})


def test_errors_in_a_response() -> None:
    assert "too long" in str(read(delta(content="a"), {"error": {"message": "too long"}}).error)
    assert "not a JSON object: <html>" in str(read(b"<html>").error)
    assert read(delta(content="a")).error is None


# -- figures -------------------------------------------------------------------------------------------------------

REQUESTS = [
    RequestResult(start=0.0, ttft=0.1, latency=1.1, gaps=(0.5, 0.5), input_tokens=10, output_tokens=11),
    RequestResult(start=0.5, ttft=0.3, latency=0.3, input_tokens=20, output_tokens=1),
    RequestResult(start=2.0, ttft=0.2, latency=0.6, gaps=(0.4,), input_tokens=30, output_tokens=3, audio_s=4.0),
    RequestResult(error="HTTP 400: too long"),
]


def result(**selection: Any) -> ServeResult:
    return ServeResult(Load(2.0, 1.0, 8), Selection(**selection), REQUESTS, 4.0)


def test_figures() -> None:
    figures = result(percentiles=(50.0, 99.9)).as_json()
    assert (figures["completed"], figures["failed"], figures["errors"]) == (3, 1, ["HTTP 400: too long"])
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (60, 15)
    assert (figures["request_throughput"], figures["output_throughput"]) == (0.75, 3.75)
    assert (figures["max_concurrent_requests"], figures["rtfx"]) == (2, 1.0)
    assert figures["mean_ttft_ms"] == pytest.approx(200) and figures["p50_ttft_ms"] == pytest.approx(200)
    assert figures["p99.9_ttft_ms"] == pytest.approx(299.8) and figures["std_ttft_ms"] == pytest.approx(81.65, abs=0.01)
    assert figures["mean_tpot_ms"] == pytest.approx((100 + 200) / 2), "one token has no time per output token"
    assert figures["median_itl_ms"] == pytest.approx(500) and figures["mean_e2el_ms"] == pytest.approx(2000 / 3)
    assert "request_goodput" not in figures and figures["request_rate"] == 2.0


@pytest.mark.parametrize(
    ("goals", "good"),
    [({"ttft": 250.0}, 2), ({"tpot": 150.0}, 2), ({"e2el": 500.0}, 1), ({"ttft": 150.0, "tpot": 50.0}, 0)],
)
def test_goodput(goals: dict[str, float], good: int) -> None:
    assert result(goals=goals).as_json()["request_goodput"] == good / 4


def test_the_table() -> None:
    lines = result(metrics=("ttft", "e2el"), goals={"ttft": 250.0}).as_table().splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    for line in (
        "Successful requests:                     3",
        "Failed requests:                         1",
        "Request goodput (req/s):                 0.50",
        "---------------Time to First Token----------------",
        "Median TTFT (ms):                        200.00",
        "P99 E2EL (ms):                           1090.00",
        "  HTTP 400: too long",
    ):
        assert line in [each.rstrip() for each in lines]
    assert not any("TPOT" in line for line in lines)


def test_nothing_completed() -> None:
    failed = ServeResult(Load(), Selection(), REQUESTS[-1:], 1.0)
    assert "not measured" in failed.as_table() and failed.as_json()["max_concurrent_requests"] == 0


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweep = [ServeResult(Load(math.inf, 1.0, n), Selection(), REQUESTS, 4.0 / n) for n in (1, 2, 4)]
    plot_sweep(sweep, "a model", tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


# -- flags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--goodput", "ttft=5"], "not of the form ttft:500"),
        (["--goodput", "itl:5"], "one of ttft, tpot, e2el"),
        (["--percentile-metrics", "ttft,speed"], "no metric: speed"),
        (["--metric-percentiles", "50,101"], "from 0 to 100"),
        (["--sweep-concurrency", "1,0"], "not of the form 1,2,4"),
        (["--image-size", "640"], "not of the form 640x480"),
    ],
)
def test_flags_that_cannot_be_parsed(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "serve", *argv])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--endpoint", "/v1/completions", "--image-size", "9x9"], "takes no images: use --endpoint"),
        (["serve", "--endpoint", "/v1/completions", "--audio-seconds", "1"], "takes no audio: use --endpoint"),
        (["serve", "--endpoint", "/v1/audio/transcriptions"], "needs --audio-seconds"),
        (["serve", "--plot", "a.png"], "add --sweep-concurrency"),
        (["serve", "--sweep-concurrency", "1,2", "--max-concurrency", "3"], "leave that out"),
        (["serve", "--request-rate", "0"], "--request-rate must be greater than 0"),
        (["serve", "--random-range-ratio", "1"], "less than 1"),
        (["serve", "--header", "Team"], "not of the form NAME=VALUE"),
        (["serve", "--base-url", "http://127.0.0.1:9", "--num-prompts", "1"], "--base-url names another"),
        (["latency"], "name either a model"),
        (["latency", "demo", "--model-config", "whisper-tiny"], "name either a model"),
        (["latency", "--model-config", "qwen"], "known are: qwen2-vl-2b, "),
        (["latency", "--model-config", "whisper-tiny", "--load-format", "safetensors"], "no weights to load"),
    ],
)
def test_flags_that_contradict(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) == 1
    assert message in capsys.readouterr().err


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else sys.modules[name])
    assert main(["bench", "serve", "--sweep-concurrency", "1,2", "--plot", "a.png"]) == 1
    assert "pip install 'mmjax[bench]'" in capsys.readouterr().err


# -- published sizes -----------------------------------------------------------------------------------------------

# Of the published checkpoints, but without the last layer of LLaVA's CLIP, which is not used, and with a bias of
# Whisper's keys, which no checkpoint stores because it is zero.
PARAMETERS = {
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen3-vl-30b-a3b": 31_070_754_032,
    "llava-1.5-7b": 7_063_427_072 - 12_596_224 - 2_048,
    "whisper-tiny": 37_760_640 + 12 * 384,
    "whisper-large-v3-turbo": 808_878_080 + 40 * 1280,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmjax.cli.bench.published_sizes.make_tokenizer", lambda *_, **__: NoTokenizer())
    write_model(name, tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    _, specs = param_specs(checkpoint.family, checkpoint.model_config(dummy=True))
    assert sum(math.prod(spec.shape) for spec in specs.values()) == PARAMETERS[name]


class NoTokenizer:
    def save(self, file: str) -> None: ...


@pytest.mark.parametrize("name", ["llava-1.5-7b", "whisper-tiny"])
def test_tokenizers_of_published_sizes(name: str, tmp_path: Path) -> None:
    write_model(name, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    text = "two words, ünïcode"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and "<" not in tokenizer.text_of(9_999)
    if name == "whisper-tiny":
        wanted = {"<|endoftext|>": 50257, "<|en|>": 50259, "<|transcribe|>": 50359, "<|notimestamps|>": 50363}
        wanted |= {"<|0.00|>": 50364, "<|30.00|>": 51864}
        assert len(ids) == len(text.encode())
    else:
        wanted = {"<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
        assert ids[0] == 1 and tokenizer.vocab_size == 32002
    assert {token: tokenizer.id_of(token) for token in wanted} == wanted


def test_published_sizes_are_of_every_family() -> None:
    assert {Family.of(PUBLISHED[name][0]).name for name in MODELS.values()} == set(FAMILIES.values())
    with pytest.raises(ValueError, match="'qwen2' is not known; known are: qwen2-vl-2b, "):
        write_model("qwen2", Path())


def test_placeholders_of_published_sizes_are_special(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmjax.cli.bench.published_sizes.make_tokenizer", lambda size, special, bos: (size, special))
    for name in MODELS.values():
        files, tokenizer = model_files(name)
        size, special = cast(Any, tokenizer)
        config = files["config.json"]
        part = config.get("thinker_config", config)
        ids = {part[key] for key in part if key.endswith(("_token_id", "_token_index"))}
        ids |= {files["generation_config.json"][f"{key}_token_id"] for key in ("bos", "eos", "pad")}
        rows = part.get("text_config", part).get("vocab_size", 32000)
        assert ids <= set(special) and size <= rows + (config["architectures"] == ["UltravoxModel"]), name


# -- profiles ------------------------------------------------------------------------------------------------------


def xplane(plane: str, line: str, events: list[tuple[str, str, int]]) -> ProfileData:
    """A trace with (kernel, module, microseconds) as events of one line."""
    names = {name: i for i, name in enumerate(dict.fromkeys(name for name, _, _ in events), 1)}
    metadata = "".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}\n' for name, i in names.items()
    )
    shown = ""
    for name, module, us in events:
        stats = f'stats {{ metadata_id: 1 str_value: "{module}" }} stats {{ metadata_id: 2 str_value: "{name}" }}'
        shown += f"events {{ metadata_id: {names[name]} duration_ps: {us * 1_000_000} {stats if module else ''} }}\n"
    keys = "".join(
        f'stat_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}\n'
        for i, name in enumerate(("hlo_module", "hlo_op"), 1)
    )
    text = f'planes {{ name: "{plane}" {metadata} {keys} lines {{ name: "{line}" {shown} }} }}'
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))


EVENTS = [
    ("gemm_fusion_dot_3", "jit_prefill", 300),
    ("gemm_fusion_dot_12", "jit_decode", 100),
    ("gemm_fusion_dot.7", "jit_decode.4", 100),
    ("paged_decode", "jit_decode", 400),
    ("MemcpyD2H", "", 100),
]


def test_profile_of_a_gpu() -> None:
    rows = [
        line.split() for line in profile.tables(xplane("/device:GPU:0", "Stream #13(Compute)", EVENTS)).splitlines()
    ]
    assert rows[:4] == [
        ["phase", "ms", "share", "kernels"],
        ["decode", "0.60", "60.0%", "3"],
        ["prefill", "0.30", "30.0%", "1"],
        ["other", "0.10", "10.0%", "1"],
    ]
    assert rows[6] == ["paged_decode", "decode", "0.40", "40.0%", "1", "400.00"]
    assert ["gemm_fusion_dot", "decode", "0.20", "20.0%", "2", "100.00"] in rows


def test_profile_of_a_cpu() -> None:
    """Events without an operation are of the host, and a loop lasts as long as what is in it."""
    events = [*EVENTS, ("while.2", "jit_decode", 9999), ("cond.1.clone", "jit_decode", 9999)]
    told = profile.tables(xplane("/host:CPU", "tf_XLAPjRtCpuClient/1", events))
    assert "other" not in told and told.splitlines()[1].split() == ["decode", "0.60", "66.7%", "3"]


def test_profile_without_a_device() -> None:
    assert "no events of a device" in profile.tables(xplane("/device:GPU:0", "XLA Ops", EVENTS))
