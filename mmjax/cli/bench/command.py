"""The flags of `mmjax bench throughput|latency|serve`, and what runs them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmjax.cli import flags
from mmjax.cli.bench import CHAT, COMPLETIONS, GOALS, METRICS, TRANSCRIPTIONS

if TYPE_CHECKING:  # imported when they run, so that --help is quick
    from mmjax.cli.bench.serve import RandomRequests, Target
    from mmjax.cli.bench.serve_metrics import Load, Selection, ServeResult


def add_parsers(bench: argparse.ArgumentParser) -> None:
    """Add the benchmarks to `mmjax bench`."""
    benchmarks = bench.add_subparsers(required=True, metavar="BENCHMARK")
    for name, prompts, meaning in (
        ("throughput", 16, "measure an engine on many prompts at once"),
        ("latency", 1, "measure an engine on one small batch, repeated"),
    ):
        benchmark = benchmarks.add_parser(name, help=meaning, allow_abbrev=False)
        benchmark.set_defaults(command=_bench_engine, benchmark=name)
        _add_workload(benchmark, prompts)
        flags.add_engine_flags(benchmark)
    serve = benchmarks.add_parser("serve", help="measure a server with OpenAI's API", allow_abbrev=False)
    serve.set_defaults(command=_bench_serve)
    _add_requests(serve)
    _add_load(serve)
    _add_report(serve)


# -- throughput and latency ----------------------------------------------------------------------------------------


def _add_workload(parser: argparse.ArgumentParser, prompts: int) -> None:
    parser.add_argument("model", nargs="?", help="model directory or hub id; random weights with --load-format dummy")
    parser.add_argument("--model", dest="named_model", help=argparse.SUPPRESS)
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--model-config", metavar="NAME",
        help="instead of a model: random weights in the sizes of a published one, such as `qwen2.5-vl-3b`",
    )  # fmt: skip
    group.add_argument(
        "--prompts", "--num-prompts", "--batch", "--batch-size", type=int, default=prompts,
        help=f"prompts at once (default: {prompts})",
    )  # fmt: skip
    group.add_argument(
        "--text", "--input-len", type=int, default=64, help="approximate tokens of text per prompt (default: 64)"
    )
    group.add_argument(
        "--image", type=_size, action="append", default=[], metavar="WxH", help="one more image per prompt"
    )
    group.add_argument(
        "--audio", type=float, default=0.0, metavar="SECONDS", help="seconds of audio per prompt (default: 0)"
    )
    group.add_argument(
        "--output", "--output-len", type=int, default=64, help="tokens to generate per prompt (default: 64)"
    )
    group.add_argument(
        "--repeats", "--num-iters", type=int, default=5,
        help="runs of the latency benchmark; the median is reported (default: 5)",
    )  # fmt: skip
    group.add_argument("--json", "--output-json", type=Path, metavar="FILE", help="also write the figures to this file")
    group.add_argument(
        "--profile", type=Path, metavar="DIR",
        help="trace one more run into this directory, and print its time by phase and by kernel",
    )  # fmt: skip


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 640x480")
    return int(match[1]), int(match[2])


def _bench_engine(arguments: argparse.Namespace) -> None:
    from mmjax.cli.bench import engine, profile

    work = engine.Workload(
        prompts=arguments.prompts,
        text=arguments.text,
        images=tuple(arguments.image),
        audio_s=arguments.audio,
        output=arguments.output,
    )
    engine_kwargs = flags.engine_kwargs(arguments)
    with _model_directory(arguments, engine_kwargs) as model:
        bench = engine.Bench(model, engine_kwargs)
        result = (
            bench.throughput(work) if arguments.benchmark == "throughput" else bench.latency(work, arguments.repeats)
        )
        print(result.as_table())
        if arguments.json:
            arguments.json.write_text(result.as_json() + "\n")
        if arguments.profile:
            with profile.trace(arguments.profile):
                bench.run(work, seed=arguments.repeats + 1)  # other inputs than all runs before: no cache has them
            print(f"\n{profile.tables(profile.read_trace(arguments.profile))}")


@contextlib.contextmanager
def _model_directory(arguments: argparse.Namespace, engine_kwargs: dict[str, Any]) -> Iterator[str]:
    """The model to load. For --model-config it is written to a directory that is removed at the end, and the arguments
    of the engine ask for random weights."""
    from mmjax.cli.bench import published_sizes

    model = arguments.model or arguments.named_model
    if (model is None) == (arguments.model_config is None):
        raise ValueError(
            "name either a model (a directory, a hub id or `demo`) or --model-config: "
            + ", ".join(published_sizes.MODELS)
        )
    if model is not None:
        yield model
        return
    if engine_kwargs.setdefault("load_format", "dummy") != "dummy":
        raise ValueError("--model-config has no weights to load: leave out --load-format")
    with tempfile.TemporaryDirectory(prefix="mmjax-bench-") as directory:
        published_sizes.write_model(arguments.model_config, Path(directory))
        yield directory


# -- serve ---------------------------------------------------------------------------------------------------------


def _add_requests(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url", default="http://127.0.0.1:8000", help="address of the server, with or without /v1"
    )
    server.add_argument("--endpoint", choices=(CHAT, COMPLETIONS, TRANSCRIPTIONS), default=CHAT, help="route")
    # not `--model`'s dest: the tables of the documentation leave that out
    server.add_argument("--model", dest="served_model", metavar="NAME", help="model (unset: the first that is listed)")
    server.add_argument("--api-key", metavar="KEY", help="sent as bearer token (unset: MMJAX_API_KEY)")
    server.add_argument("--header", nargs="+", default=[], metavar="NAME=VALUE", help="more headers of every request")

    group = parser.add_argument_group("requests")
    group.add_argument("--num-prompts", type=int, default=1000, help="number of requests")
    group.add_argument("--random-input-len", "--input-len", type=int, default=1024, help="tokens of text per request")
    group.add_argument(
        "--random-output-len", "--output-len", type=int, default=128, help="tokens to generate per request, at most"
    )
    group.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="R",
        help="lengths are uniform between 1 - R and 1 + R times the given ones; from 0 to less than 1",
    )  # fmt: skip
    group.add_argument(
        "--tokenizer", metavar="MODEL", help="directory or hub id, for input lengths that are exact (unset: words)"
    )
    group.add_argument("--images-per-request", type=int, metavar="N", help="images per request (default: 0)")
    group.add_argument(
        "--image-size", type=_size, metavar="WxH", help="size of each image; alone, it asks for one (default: 640x480)"
    )
    group.add_argument("--audio-seconds", type=float, default=0.0, metavar="S", help="seconds of audio per request")
    group.add_argument("--ignore-eos", action="store_true", help="generate the whole output length (vLLM and mmjax)")
    group.add_argument("--temperature", type=float, help="of sampling (unset: the server's default)")
    group.add_argument("--seed", type=int, default=0, help="of lengths, contents and arrival times")


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument(
        "--request-rate", type=float, default=math.inf, metavar="RPS",
        help="requests per second; `inf` sends all at once, or as --max-concurrency allows (default: inf)",
    )  # fmt: skip
    group.add_argument(
        "--burstiness", type=float, default=1.0,
        help="shape of the gamma distribution of the gaps; 1 is a Poisson process, less comes in bursts",
    )  # fmt: skip
    group.add_argument("--max-concurrency", type=int, metavar="N", help="most requests in flight")
    group.add_argument(
        "--sweep-concurrency", type=_numbers, metavar="N,N,...", help="one run for each of these --max-concurrency"
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("report")
    group.add_argument(
        "--percentile-metrics", type=_metrics, default=("ttft", "tpot", "itl"), metavar="NAMES",
        help=f"metrics to print, of {', '.join(METRICS)} (default: ttft,tpot,itl)",
    )  # fmt: skip
    group.add_argument(
        "--metric-percentiles", type=_percentiles, default=(99.0,), metavar="P,P,...",
        help="percentiles to compute (default: 99)",
    )  # fmt: skip
    group.add_argument(
        "--goodput", nargs="+", type=_goal, default=[], metavar="METRIC:MS",
        help=f"count requests that keep these limits, of {', '.join(GOALS)}",
    )  # fmt: skip
    group.add_argument("--save-result", action="store_true", help="write the figures to a JSON file")
    group.add_argument(
        "--result-filename", type=Path, metavar="FILE",
        help="the file, which implies --save-result (unset: the name has the model, load and date)",
    )  # fmt: skip
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the sweep as a PNG; needs `mmjax[bench]`")


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1,2,4")
    return tuple(map(int, text.split(",")))


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(METRICS):
        raise argparse.ArgumentTypeError(f"no metric: {', '.join(sorted(unknown))}; there are {', '.join(METRICS)}")
    return names


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(map(float, text.split(",")))
    except ValueError:
        values = ()
    if not values or not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 50,90,99.9, from 0 to 100")
    return values


def _goal(text: str) -> tuple[str, float]:
    match = re.fullmatch(rf"({'|'.join(GOALS)}):(\d+\.?\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ttft:500, with one of {', '.join(GOALS)}, in ms")
    return match[1], float(match[2])


def _bench_serve(arguments: argparse.Namespace) -> None:
    from mmjax.cli.bench import plot, serve

    _check(arguments)
    if arguments.plot:
        plot.check_installed()
    inputs, loads, selection = _requests(arguments), _loads(arguments), _selection(arguments)
    target = _target(arguments)
    if not target.model:
        target = dataclasses.replace(target, model=serve.first_model(target))
    results = serve.run(target, inputs, loads, selection, arguments.seed)
    for result in results:
        print(result.as_table())
    if arguments.save_result or arguments.result_filename:
        _save(arguments, target, results)
    if arguments.plot:
        plot.plot_sweep(results, target.model, arguments.plot)
        print(f"plot: {arguments.plot}")
    if not any(result.completed for result in results):
        raise ValueError("all requests failed")


def _check(arguments: argparse.Namespace) -> None:
    """ValueError for flags that contradict each other, and for sizes that mean nothing."""
    endpoint = arguments.endpoint
    if endpoint != CHAT and (arguments.image_size or arguments.images_per_request):
        raise ValueError(f"{endpoint} takes no images: use --endpoint {CHAT}")
    if endpoint == COMPLETIONS and arguments.audio_seconds:
        raise ValueError(f"{endpoint} takes no audio: use --endpoint {CHAT} or {TRANSCRIPTIONS}")
    if endpoint == TRANSCRIPTIONS and not arguments.audio_seconds:
        raise ValueError(f"{endpoint} needs --audio-seconds")
    if arguments.sweep_concurrency and arguments.max_concurrency:
        raise ValueError("--sweep-concurrency sets --max-concurrency: leave that out")
    if arguments.plot and not arguments.sweep_concurrency:
        raise ValueError("--plot draws a sweep: add --sweep-concurrency 1,2,4,8")
    if not 0 <= arguments.random_range_ratio < 1:
        raise ValueError("--random-range-ratio must be at least 0 and less than 1")
    positive = ("num_prompts", "random_input_len", "random_output_len", "request_rate", "burstiness", "max_concurrency")
    for name in positive:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"{flags.flag(name)} must be greater than 0")
    for name in ("images_per_request", "audio_seconds"):
        if (getattr(arguments, name) or 0) < 0:
            raise ValueError(f"{flags.flag(name)} must not be negative")


def _target(arguments: argparse.Namespace) -> Target:
    from mmjax.cli.bench.serve import Target
    from mmjax.config import env

    headers = {}
    if key := arguments.api_key or env("API_KEY", ""):
        headers["Authorization"] = f"Bearer {key}"
    for text in arguments.header:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--header {text!r} is not of the form NAME=VALUE")
        headers[name] = value
    extra: dict[str, Any] = {"ignore_eos": True} if arguments.ignore_eos else {}
    if arguments.temperature is not None:
        extra["temperature"] = arguments.temperature
    return Target(arguments.base_url, arguments.endpoint, arguments.served_model or "", headers, extra)


def _requests(arguments: argparse.Namespace) -> RandomRequests:
    from mmjax.cli.bench.serve import RandomRequests

    encode = None
    if arguments.tokenizer:
        from mmjax.loader.checkpoint import find_model
        from mmjax.tokenizer.tokenizer import Tokenizer

        encode = Tokenizer(find_model(arguments.tokenizer)).encode
    images = arguments.images_per_request
    return RandomRequests(
        num_prompts=arguments.num_prompts,
        input_len=arguments.random_input_len,
        output_len=arguments.random_output_len,
        range_ratio=arguments.random_range_ratio,
        image_size=arguments.image_size or (640, 480),
        images_per_request=(1 if arguments.image_size else 0) if images is None else images,
        audio_s=arguments.audio_seconds,
        encode=encode,
    )


def _loads(arguments: argparse.Namespace) -> list[Load]:
    from mmjax.cli.bench.serve_metrics import Load

    levels = arguments.sweep_concurrency or [arguments.max_concurrency]
    return [Load(arguments.request_rate, arguments.burstiness, level) for level in levels]


def _selection(arguments: argparse.Namespace) -> Selection:
    from mmjax.cli.bench.serve_metrics import Selection

    return Selection(arguments.percentile_metrics, arguments.metric_percentiles, dict(arguments.goodput))


def _save(arguments: argparse.Namespace, target: Target, results: list[ServeResult]) -> None:
    """Write the result of a run, or those of a sweep as a list."""
    date = time.strftime("%Y%m%d-%H%M%S")
    about = {"date": date, "base_url": target.base_url, "endpoint": target.endpoint, "model_id": target.model}
    figures = [{**about, **result.as_json()} for result in results]
    file = arguments.result_filename
    if file is None:
        file = Path(re.sub(r"[^\w.-]", "-", f"mmjax-{target.model}-{arguments.request_rate:g}qps-{date}.json"))
    file.write_text(json.dumps(figures if arguments.sweep_concurrency else figures[0], indent=2) + "\n")
    print(f"figures: {file}")
