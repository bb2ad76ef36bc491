"""Whether an accelerator computes what the CPU computes: log-probabilities of every family, not greedy ids alone.

    python benchmarks/device_parity.py                                        # the CPU's side first, then the device's
    python benchmarks/device_parity.py --make-reference --reference DIR       # the CPU's side, on any machine
    python benchmarks/device_parity.py --reference DIR --devices 2            # the device's side, tensor parallel

Needs no checkpoint, no network and no torch. Models have the sizes of published ones with two layers in the decoder and
in each tower, or ("tiny") widths of 64; both have the published vocabularies. NumPy draws their weights and inputs from
fixed seeds, so they are the same bits everywhere.

Every prompt is followed by tokens that are given, not sampled, so that both sides see the same tokens whatever they
compute: 16 decode steps, all prompts at once, and the first prompt alone (decode steps of one sequence are another
program on a GPU). Compared are the log-probabilities, at each token of prompt and output, of the TOP likeliest tokens
and of the token that comes next, which is a random one. A log-probability is a logit less one number per position.

float32: at most FLOAT32 apart from the CPU's float32, and the same greedy ids. bfloat16: roundings differ by design, so
the distance from the CPU's float32 counts. The CPU takes the same steps with the same dtypes, in plain XLA, and its
distance is the measure: the device's may be BFLOAT16 times as large, by root mean square and at the largest. Both are
sums of rounding errors of the same size, in other orders; the rounding errors of a fault are not.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from parity_models import BY_NAME, CASES, SEED, WIDTHS, Case, Json, draw, make_prompts, overrides  # noqa: E402

TOP = 20
FLOAT32 = 2e-4
BFLOAT16 = 2.0
OUTPUT = 16
DTYPES = ("float32", "bfloat16")
PARTS = ("prefill", "decode")

Arrays = dict[str, np.ndarray]


# -- one engine --------------------------------------------------------------------------------------------------------


class Given:
    """A logits processor that leaves one token each time. dynamic, first_timestamp: see `LogitsProcessor`."""

    dynamic = True
    first_timestamp = 0

    def __init__(self, token_ids: Sequence[int], vocab: int) -> None:
        self.token_ids, self.vocab = token_ids, vocab

    def bias_row(self, output_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        row = np.full(self.vocab, -np.inf, np.float32)
        row[self.token_ids[min(len(output_ids), len(self.token_ids) - 1)]] = 0
        return row

    def prepare(self, output_ids: Sequence[int] | np.ndarray) -> None:
        """Nothing: a row is quickly made."""


def prepare_mmjax(*, emulate: bool) -> None:
    """Give mmjax the weights and the logits processor of this file. emulate: let a CPU compute in bfloat16 wherever an
    accelerator does."""
    import mmjax.entrypoints.load_model as loading
    import mmjax.entrypoints.replica as replica
    import mmjax.outputs.request as requests
    from mmjax.loader.checkpoint import Checkpoint
    from mmjax.loader.params import param_specs
    from mmjax.loader.precision import Precision

    class HostWeights(Checkpoint):
        def model_config(self, *, dummy: bool = False, headless: bool = False) -> Any:
            return super().model_config(dummy=True, headless=headless)

        def param_readers(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Any]]:
            _, specs = param_specs(self.family, self.model_config())
            for path, shape in shapes.items():
                yield path, lambda region, path=path, shape=shape: draw(path, shape, specs[path].axes)[region]

    class DevicePrecision(Precision):
        @classmethod
        def of(cls, requested: str, config: Mapping[str, Any], platform: str) -> Precision:
            return Precision.of(requested, config, "gpu")

    usual = requests._logits_processors

    def processors(model: Any, engine_input: Any, params: Any, grammar: Any) -> list[Any]:
        if params.extra_args:
            return [Given(params.extra_args["given"], model.vocab_size)]
        return list(usual(model, engine_input, params, grammar))

    vars(requests)["_logits_processors"] = processors
    vars(loading)["Checkpoint"] = HostWeights
    if emulate:
        vars(replica)["Precision"] = DevicePrecision


def observe(case: Case, width: str, dtype: str, devices: int) -> Arrays:
    """What an engine computes for the prompts of a case: ids, log-probabilities by `_table`, a digest of its inputs."""
    from mmjax import LLM, SamplingParams
    from mmjax.cli.bench.published_sizes import write_model

    with tempfile.TemporaryDirectory(prefix="mmjax-parity-") as directory:
        write_model(case.model, Path(directory))
        llm = LLM(
            directory, dtype=dtype, tensor_parallel_size=devices, hf_overrides=overrides(case, width),
            quantization=case.quantization, enforce_eager=True, enable_prefix_caching=False, max_num_seqs=4,
            max_model_len=None if case.name == "Whisper" else 2048, max_num_batched_tokens=2048, max_logprobs=TOP,
            kv_cache_memory_bytes=1 << 28,
        )  # fmt: skip
    processor, tokenizer = llm.model.input_processor.processor, llm.model.tokenizer
    assert tokenizer is not None
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    prompts = make_prompts(case, processor.placeholder_text if processor else {}, encode)
    rng = np.random.default_rng(SEED + 1)
    given = [rng.integers(300, 30_000, OUTPUT).tolist() for _ in prompts]
    free = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True, detokenize=False)
    forced = [dataclasses.replace(free, logprobs=TOP, prompt_logprobs=TOP, extra_args={"given": ids}) for ids in given]
    found: Arrays = {"inputs": _digest(llm, prompts)}
    batch: list[Any] = llm.generate(prompts, forced, use_tqdm=False)
    for i, out in enumerate(batch):
        assert list(out.outputs[0].token_ids) == given[i]
        found[f"{i}.prompt_ids"] = np.asarray(out.prompt_token_ids, np.int32)
        found |= _table(f"{i}.prefill", out.prompt_logprobs[1:], out.prompt_token_ids[1:])
        found |= _table(f"{i}.decode", out.outputs[0].logprobs, out.outputs[0].token_ids)
    alone: Any = llm.generate(prompts[0], forced[0], use_tqdm=False)[0].outputs[0]
    found |= _table("alone.decode", alone.logprobs, alone.token_ids)
    for i, prompt in enumerate(prompts):
        ids = llm.generate(prompt, free, use_tqdm=False)[0].outputs[0].token_ids
        found[f"{i}.greedy"] = np.asarray(ids, np.int32)
    if case.name == "Whisper":
        found |= _word_times(llm, prompts[0], given[0])
    return found


def _table(name: str, rows: Sequence[Any], next_ids: Sequence[int]) -> Arrays:
    """own: of the token that comes next. ids and top: of the likeliest tokens, the likeliest first."""
    best = [sorted(row.items(), key=lambda item: item[1].rank)[:TOP] for row in rows]
    return {
        f"{name}.own": np.asarray([row[i].logprob for row, i in zip(rows, next_ids, strict=True)], np.float32),
        f"{name}.ids": np.asarray([[token for token, _ in row] for row in best], np.int32),
        f"{name}.top": np.asarray([[entry.logprob for _, entry in row] for row in best], np.float32),
    }


def _digest(llm: Any, prompts: Sequence[Json]) -> np.ndarray:
    """CRCs of the arrays that encoders get: whether the host made the same of the media."""
    processor = llm.model.input_processor
    items = [entry.item for prompt in prompts for entry in processor.process(processor.parse(prompt)).items]
    arrays = [array for item in items for _, array in sorted(item.features.items())]
    return np.asarray([zlib.crc32(np.ascontiguousarray(array).tobytes()) for array in arrays], np.uint32)


def _word_times(llm: Any, prompt: Json, token_ids: Sequence[int]) -> Arrays:
    """Of Whisper's alignment: every eighth step of the scores, and the step at which each token begins."""
    from mmjax.entrypoints.word_timestamps import alignment_matrix, first_steps

    processor, [engine] = llm.model.input_processor, llm.model.engines
    engine_input = processor.process(processor.parse(prompt))
    [entry] = engine_input.items
    tokens = np.asarray([*prompt["prompt_token_ids"][:4], *token_ids, llm.model.eos_ids[0]], np.int32)
    scores = np.asarray(engine.align(entry.modality, entry.item, tokens).result())[:, : len(tokens), : 2 * 50]
    steps = first_steps(alignment_matrix(scores)[3:-1])
    return {"words.scores": scores[:, :, ::8].astype(np.float32), "words.steps": steps.astype(np.int32)}


# -- comparing ---------------------------------------------------------------------------------------------------------


def distances(truth: Arrays, found: Arrays, name: str, of: str | None = None) -> np.ndarray:
    """|differences| of the log-probabilities in a table. of: the table of the truth, if it has another name.

    A token of the truth's likeliest that is not among the found ones has at most the least of their log-probabilities:
    the distance is at least that.
    """
    own, top, ids = (truth[f"{of or name}.{part}"] for part in ("own", "top", "ids"))
    known = np.isfinite(own)
    with np.errstate(invalid="ignore"):
        apart = np.where(known, np.abs(found[f"{name}.own"] - own), 0)
    same = ids[:, :, None] == found[f"{name}.ids"][:, None, :]
    matched = np.where(same, found[f"{name}.top"][:, None, :], 0).sum(axis=2)
    least = found[f"{name}.top"][:, -1:]
    further = np.where(same.any(axis=2), np.abs(matched - top), np.maximum(top - least, 0))
    both = np.concatenate([apart, further.reshape(-1)])
    return np.where(np.isnan(both), np.inf, both)


def summarize(truth: Arrays, found: Arrays) -> Json:
    """The largest and the mean square distance of prefill and decode, and what is equal."""
    prompts = sum(name.endswith(".greedy") for name in truth)
    prefill = np.concatenate([distances(truth, found, f"{i}.prefill") for i in range(prompts)])
    decode = [distances(truth, found, f"{i}.decode") for i in range(prompts)]
    decode.append(distances(truth, found, "alone.decode", "0.decode"))
    summary: Json = {
        name: [float(apart.max()), float(np.sqrt(np.mean(apart**2)))]
        for name, apart in (("prefill", prefill), ("decode", np.concatenate(decode)))
    }
    greedy = [np.array_equal(truth[f"{i}.greedy"], found[f"{i}.greedy"]) for i in range(prompts)]
    summary["greedy"] = [sum(greedy), prompts]
    summary["prompts"] = all(np.array_equal(truth[f"{i}.prompt_ids"], found[f"{i}.prompt_ids"]) for i in range(prompts))
    summary["inputs"] = np.array_equal(truth["inputs"], found["inputs"])
    if "words.steps" in truth:
        summary["scores"] = float(np.abs(truth["words.scores"] - found["words.scores"]).max())
        steps = truth["words.steps"]
        summary["words"] = [int((steps == found["words.steps"]).sum()), len(steps)]
    return summary


def faults(dtype: str, found: Json, measure: Json) -> list[str]:
    """What is wrong with a summary. measure: of the CPU in the same dtype."""
    wrong = [] if found["prompts"] else ["prompt ids"]
    for name in ("prefill", "decode"):
        if dtype == "float32" and found[name][0] > FLOAT32:
            wrong.append(name)
        if dtype == "bfloat16" and any(a > BFLOAT16 * b for a, b in zip(found[name], measure[name], strict=True)):
            wrong.append(name)
    if dtype == "float32":
        wrong += ["greedy ids"] if found["greedy"][0] < found["greedy"][1] else []
        wrong += ["words"] if found.get("scores", 0) > FLOAT32 or len(set(found.get("words", [0]))) > 1 else []
    return wrong


def table(results: Sequence[Json]) -> str:
    """In Markdown."""
    lines = [
        "| model | width | float32: prefill | decode | greedy ids | bfloat16: prefill | decode | times the CPU's | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        cells, wrong = [result["case"], result["width"]], []
        for dtype in DTYPES:
            found, measure = result["found"].get(dtype), result["measure"]
            if found is None:
                cells += [""] * 3
                continue
            wrong += [f"{dtype}: {what}" for what in faults(dtype, found, measure)]
            cells += [f"{found[name][0]:.1e}" if dtype == "float32" else f"{found[name][0]:.3f}" for name in PARTS]
            if dtype == "float32":
                words = "" if "words" not in found else ", word times {}/{}".format(*found["words"])
                cells.append("{}/{}".format(*found["greedy"]) + words)
            else:
                ratios = [found[name][1] / max(measure[name][1], 1e-12) for name in PARTS]
                cells.append(", ".join(f"{ratio:.2f}" for ratio in ratios))
        lines.append(f"| {' | '.join([*cells, ', '.join(wrong) or 'equal'])} |")
    return "\n".join(lines)


# -- processes ---------------------------------------------------------------------------------------------------------


def reference_file(directory: Path, case: Case, width: str) -> Path:
    """Where the CPU's side of a case is."""
    return directory / f"{re.sub('[^a-z0-9.]+', '-', case.name.lower())}-{width}.npz"


def work(args: argparse.Namespace) -> None:
    """In a process of its own: the reference of a case, or its comparison with a device, as JSON on the last line."""
    case, width = BY_NAME[args.worker], args.widths[0]
    file = reference_file(args.reference, case, width)
    import jax

    prepare_mmjax(emulate=jax.default_backend() == "cpu")
    begin = time.perf_counter()
    if args.make_reference:
        truth = observe(case, width, "float32", 1)
        rounded = summarize(truth, observe(case, width, "bfloat16", 1))
        stored: Any = truth | {"measure": np.asarray(json.dumps(rounded))}
        np.savez_compressed(file, **stored)
        print(json.dumps({"measure": rounded, "s": time.perf_counter() - begin}))
        return
    with np.load(file) as arrays:
        truth = dict(arrays)
    found = {dtype: summarize(truth, observe(case, width, dtype, args.devices)) for dtype in args.dtypes}
    device = f"{args.devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    measure = json.loads(str(truth["measure"]))
    print(json.dumps({"found": found, "measure": measure, "device": device, "s": time.perf_counter() - begin}))


def run_process(args: argparse.Namespace, case: Case, width: str, *, reference: bool) -> Json:
    """Run `work` for a case. Its result, or with "error" the end of what it printed."""
    platform = "cpu" if reference else args.platform
    env = os.environ | {"MMJAX_PROGRESS": "0", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if platform:
        env["JAX_PLATFORMS"] = platform
    if platform == "cpu" and not reference:
        flag = f"--xla_force_host_platform_device_count={args.devices}"
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flag}"
    command = [sys.executable, __file__, "--worker", case.name, "--widths", width, "--reference", str(args.reference)]
    command += ["--devices", str(args.devices), "--dtypes", *args.dtypes, *["--make-reference"] * reference]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=args.timeout, check=False)
    lines = done.stdout.splitlines()
    result = json.loads(lines[-1]) if done.returncode == 0 and lines else {"error": (done.stdout + done.stderr)[-3000:]}
    told = "failed\n" + result["error"] if "error" in result else f"{result['s']:.0f} s"
    print(f"{'reference' if reference else 'device'}: {case.name}, {width}: {told}", file=sys.stderr, flush=True)
    return result


def run_case(args: argparse.Namespace, case: Case, width: str) -> Json:
    """Both sides of a case: the CPU's if the reference lacks it, and the device's if it is asked for."""
    result: Json = {"case": case.name, "width": width}
    if not reference_file(args.reference, case, width).exists():
        result |= run_process(args, case, width, reference=True)
    if not args.make_reference and "error" not in result:
        result |= run_process(args, case, width, reference=False)
    return result


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="directory of the CPU's side; what it lacks is made")
    parser.add_argument("--make-reference", action="store_true", help="make the CPU's side only")
    parser.add_argument("--platform", help="of the device, as in JAX_PLATFORMS (default: the one that JAX chooses)")
    parser.add_argument("--devices", type=int, default=1, help="devices that share a model (default: 1)")
    parser.add_argument("--cases", nargs="+", choices=sorted(BY_NAME), metavar="NAME", help="some of the models only")
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="models at a time")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a model (default: 900)")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the figures to this file, and run only models that it lacks",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.worker:
        work(args)
        return
    known: list[Json] = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    results = [result for result in known if "found" in result]
    done = [(result["case"], result["width"]) for result in results]
    cases = [case for case in CASES if not args.cases or case.name in args.cases]
    pairs = [(case, width) for width in reversed(args.widths) for case in cases if (case.name, width) not in done]
    with tempfile.TemporaryDirectory(prefix="mmjax-parity-") as directory:
        args.reference = args.reference or Path(directory)
        args.reference.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(args.processes) as pool:  # the largest first
            for job in as_completed([pool.submit(run_case, args, *pair) for pair in pairs]):
                results.append(job.result())
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1) + "\n")
    failed = [result for result in results if "error" in result]
    order = list(BY_NAME)
    good = sorted(
        (r for r in results if "found" in r), key=lambda r: (order.index(r["case"]), -WIDTHS.index(r["width"]))
    )
    if good:
        print(f"{good[0]['device']}\n\n{table(good)}")
    wrong = [r for r in good if any(faults(dtype, each, r["measure"]) for dtype, each in r["found"].items())]
    if failed or wrong:
        sys.exit(f"{len(failed)} models did not run, {len(wrong)} differ")


if __name__ == "__main__":
    main()
