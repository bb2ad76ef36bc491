"""`mmjax bench serve` against servers over the shared engines."""

import json
from pathlib import Path

import pytest

from api_server import client_over
from http_server import listening_server
from mmjax import AsyncLLM
from mmjax.cli.main import main


def test_chats_with_images(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Closed loop at two concurrencies. The tiny vocabulary has bytes where others have words."""
    file = tmp_path / "result.json"
    argv = ["--random-input-len", "3", "--random-output-len", "6", "--image-size", "56x56", "--ignore-eos"]
    argv += ["--num-prompts", "4", "--sweep-concurrency", "1,3", "--goodput", "e2el:1000000"]
    assert main(["bench", "serve", "--base-url", f"{address}/v1", *argv, "--result-filename", str(file)]) == 0
    assert capsys.readouterr().out.count("Successful requests:                     4") == 2
    one, three = json.loads(file.read_text())
    assert (one["model_id"], one["max_concurrency"], three["max_concurrency"]) == ("tiny", 1, 3)
    assert one["max_concurrent_requests"] == 1 and three["max_concurrent_requests"] <= 3
    for run in (one, three):
        assert (run["completed"], run["failed"], run["total_output_tokens"]) == (4, 0, 24)
        assert run["total_input_tokens"] > 4 * 3
        assert 0 < run["median_ttft_ms"] <= run["median_e2el_ms"] and run["median_tpot_ms"] > 0
        assert run["request_goodput"] == run["request_throughput"]


def test_completions_at_a_rate(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--endpoint", "/v1/completions", "--random-input-len", "4", "--random-output-len", "5", "--ignore-eos"]
    argv += ["--num-prompts", "5", "--request-rate", "50", "--random-range-ratio", "0.4", "--temperature", "0"]
    assert main(["bench", "serve", "--base-url", address, "--model", "alias", *argv]) == 0
    told = capsys.readouterr().out
    assert (
        "Successful requests:                     5" in told
        and "Request rate configured (RPS):           50.00" in told
    )


def test_requests_that_fail(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "serve", "--base-url", address, "--num-prompts", "1", "--random-input-len", "9000"]
    assert main(argv) == 1
    told = capsys.readouterr().err
    assert "does not serve the first request: HTTP 400" in told and "maximum context length" in told


def test_transcriptions(listening: AsyncLLM, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--endpoint", "/v1/audio/transcriptions", "--audio-seconds", "1", "--random-output-len", "6"]
    with listening_server(client_over(listening, audio_mb=1.0).app) as address:
        assert main(["bench", "serve", "--base-url", address, "--num-prompts", "2", *argv]) == 0
    told = capsys.readouterr().out
    assert "Successful requests:                     2" in told and "RTFx (audio s/s):" in told
