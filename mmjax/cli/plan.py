"""`mmjax plan`: what a model needs on a slice of accelerators, from compiling its programs for it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmjax.config import EngineArgs

if TYPE_CHECKING:
    from mmjax.entrypoints.plan import CompiledProgram, Plan

GIB, MIB = 1 << 30, 1 << 20


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="slice to plan for, by chips: v5e-8, v6e-4, tpu7x-4, h100-2, ...",
    )
    group.add_argument("--json", action="store_true", help="print the plan as JSON")
    group.add_argument(
        "--save",
        type=Path,
        metavar="DIR",
        help="compile all programs and keep them in DIR; a start with MMJAX_COMPILATION_CACHE=DIR and the printed "
        "flags compiles none",
    )


def run(arguments: argparse.Namespace, engine_kwargs: Mapping[str, Any]) -> None:
    """Print the plan."""
    from mmjax.entrypoints.topology import Topology, compile_without_devices

    topology = Topology.of(arguments.topology)
    compile_without_devices(topology)  # before anything imports jax
    from mmjax.entrypoints.plan import make_plan

    with _model_directory(arguments.model) as directory:
        kwargs = {"tensor_parallel_size": topology.num_devices // engine_kwargs.get("data_parallel_size", 1)}
        args = EngineArgs.of(directory, **(kwargs | dict(engine_kwargs)))
        plan = make_plan(arguments.model, args, topology, arguments.save)
    print(json.dumps(dataclasses.asdict(plan), indent=1) if arguments.json else as_text(plan))


@contextlib.contextmanager
def _model_directory(model: str) -> Iterator[str]:
    """The directory of a model, written for the time of the plan if it is the name of a published one."""
    from mmjax.cli.bench import published_sizes

    if model.lower() not in published_sizes.MODELS or Path(model).is_dir():
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="mmjax-plan-") as directory:
        published_sizes.write_model(model, Path(directory))
        yield directory


def as_text(plan: Plan) -> str:
    """The plan for people."""
    verdict = "fits" if plan.fits else f"does not fit: {plan.reason}"
    replicas = f", {plan.replicas} replicas" if plan.replicas > 1 else ""
    lines = [
        f"{plan.model} on {plan.topology}: {verdict}",
        f"  each of {plan.devices} devices{replicas}: {_gib(plan.memory_bytes)}",
        f"    weights      {_gib(plan.weight_bytes)}",
    ]
    if not plan.fits:
        return "\n".join(lines)
    padded = plan.padding["cache_bytes_per_token"] / plan.cache_bytes_per_token
    lines += [
        f"    cache        {_gib(plan.cache_bytes)}",
        f"    state        {_gib(plan.state_bytes)}",
        f"    temp         {_gib(plan.temp_bytes)}",
        f"    code         {_gib(plan.code_bytes)}",
        f"  cache: {plan.cache_tokens} tokens of {plan.cache_bytes_per_token / 1024:.1f} KiB on each device; "
        f"{plan.max_batch} sequences of {plan.max_model_len} tokens; the longest has {plan.longest} tokens",
        f"  padding: {_gib(plan.padding['weight_bytes']).strip()} of the weights, {padded:.0%} of the cache",
        "  bounds, never reached:",
    ]
    lines += [
        f"    {bound.name:28} {max(bound.read_ms, bound.compute_ms):9.2f} ms ({bound.read_ms:.2f} to read, "
        f"{bound.compute_ms:.2f} to compute), {bound.tokens_per_s:.0f} tokens/s"
        for bound in plan.bounds
    ]
    lines += ["  compiled:", *(_program(program) for program in plan.programs), "  start:", f"    {plan.serve}"]
    return "\n".join(lines)


def _program(program: CompiledProgram) -> str:
    exchanges = ", ".join(f"{count} {kind}" for kind, count in sorted(program.collectives.items())) or "no collectives"
    gathered = f" (at most {program.gathered_bytes / MIB:.1f} MiB gathered)" if program.gathered_bytes else ""
    return (
        f"    {program.name:34} {program.seconds:6.1f} s, temp {program.temp_bytes / GIB:5.2f} GiB, "
        f"{exchanges}{gathered}"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:7.2f} GiB"
