"""The command line: `mmjax demo|serve|chat|run-batch|plan|run|convert|inspect|bench|version`.

Commands import what they need when they run, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mmjax
from mmjax.cli import chat, flags, plan, run
from mmjax.cli.bench import command as bench
from mmjax.types import vllm_arguments

MAPPINGS = flags.MAPPINGS | {"default_chat_template_kwargs"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 2 for a wrong command line, 1 for unusable input."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in MODEL_COMMANDS:
            arguments = _model_command(words[0], words[1:])
        else:
            parser = top_parser()
            try:
                # the arguments of a script are its own
                arguments = parser.parse_args(words if words[:1] == ["run"] else flags.fold(words))
            except flags.FlagError as error:
                parser.error(str(error))
        command: Callable[[argparse.Namespace], None] = arguments.command
        command(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"mmjax: {error}", file=sys.stderr)
        return 1
    return 0


def model_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command in MODEL_COMMANDS: its own flags and those of the engine."""
    _, add_flags, _ = MODEL_COMMANDS[name]
    parser = argparse.ArgumentParser(f"mmjax {name}", allow_abbrev=False)
    parser.add_argument("model", nargs="?", help="model directory, hub id, or `demo`")
    parser.add_argument("--model", dest="named_model", help=argparse.SUPPRESS)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of flags, such as `max-model-len: 4096`; flags on the command line override them",
    )
    add_flags(parser)
    flags.add_engine_flags(parser)
    return parser


def _model_command(name: str, words: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of a command in MODEL_COMMANDS, including those in the file of `--config`."""
    parser = model_parser(name)
    try:
        arguments = parser.parse_args(flags.fold(flags.from_file(words), MAPPINGS))
    except flags.FlagError as error:
        parser.error(str(error))
    arguments.model = arguments.model or arguments.named_model
    if arguments.model is None:
        parser.error("which model? Name a directory, a hub id, or `demo`")
    vllm_arguments.settle(flags.server_kwargs(arguments), vllm_arguments.SERVER)
    arguments.command = MODEL_COMMANDS[name][2]
    return arguments


def top_parser() -> argparse.ArgumentParser:
    """The parser of all other commands. It lists those in MODEL_COMMANDS, but without their flags."""
    parser = argparse.ArgumentParser("mmjax", description="Multimodal inference in JAX.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_demo(commands.add_parser("demo", help="try the model that ships with mmjax on images, videos and audio"))

    for name, (meaning, *_) in MODEL_COMMANDS.items():  # `_model_command` adds their flags
        commands.add_parser(name, help=meaning, add_help=False)

    run.add_flags(commands.add_parser("run", help="run a Python script that was written for vLLM"))

    convert = commands.add_parser("convert", help="convert a checkpoint to the format that loads fastest")
    convert.add_argument("source", help="model directory or hub id (safetensors)")
    convert.add_argument("destination", type=Path, help="directory to create")
    convert.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype to write (default: as stored)"
    )
    convert.set_defaults(command=_convert)

    inspect = commands.add_parser("inspect", help="describe the checkpoint in a directory; only headers are read")
    inspect.add_argument("directory", type=Path, help="checkpoint directory")
    inspect.set_defaults(command=_inspect)

    bench.add_parsers(commands.add_parser("bench", help="measure the speed of an engine or a server on random inputs"))

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(command=_version)
    return parser


def _serve_flags(parser: argparse.ArgumentParser) -> None:
    from mmjax.serve import command

    command.add_flags(parser)
    flags.add_unlisted_server_flags(parser)


def _serve(arguments: argparse.Namespace) -> None:
    from mmjax.config import env_number
    from mmjax.serve import command

    # Longer than clients keep an idle connection (httpx, and with it the openai package: 5 s). With equal times on both
    # sides, 1 request in 4000 under load was sent on a connection that the server was closing.
    keep_alive = int(env_number("HTTP_TIMEOUT_KEEP_ALIVE", 60))
    command.run(arguments, flags.engine_kwargs(arguments), server_settings(arguments), keep_alive)


def server_settings(arguments: argparse.Namespace) -> Any:
    """The server's settings, from its flags and the environment."""
    from mmjax.config import env, env_flag, env_number
    from mmjax.serve import command

    key = env("API_KEY", "")
    return command.settings(
        arguments,
        keys=(key,) if key else (),
        audio_mb=env_number("MAX_AUDIO_CLIP_FILESIZE_MB", 25),
        max_stops=int(env_number("MAX_STOP_STRINGS", 4)),
        max_prompts=int(env_number("MAX_COMPLETION_PROMPTS", 1024)),
        development=env_flag("SERVER_DEV_MODE", False),
        store_mb=env_number("RESPONSES_STORE_MB", 64),
    )


def _batch_flags(parser: argparse.ArgumentParser) -> None:
    from mmjax.serve import batches

    batches.add_flags(parser)
    _serve_flags(parser)


def _run_batch(arguments: argparse.Namespace) -> None:
    from mmjax.serve import batches

    batches.run(arguments, flags.engine_kwargs(arguments), server_settings(arguments))


def _chat(arguments: argparse.Namespace) -> None:
    chat.run(arguments, flags.engine_kwargs(arguments))


def _plan(arguments: argparse.Namespace) -> None:
    plan.run(arguments, flags.engine_kwargs(arguments))


MODEL_COMMANDS: dict[
    str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]
] = {
    "serve": ("serve OpenAI's HTTP API", _serve_flags, _serve),
    "chat": ("chat with a model in the terminal", chat.add_flags, _chat),
    "plan": ("say what a model needs on a slice of accelerators, without having one", plan.add_flags, _plan),
    "run-batch": ("process a file of requests in OpenAI's batch format", _batch_flags, _run_batch),
}
"""name -> (help, adds its flags, runs it)."""


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", nargs="?", help="a question about your own files")
    for modality in ("image", "video", "audio"):
        parser.add_argument(
            f"--{modality}", type=Path, action="append", default=[], metavar="FILE", help=f"your own {modality} file"
        )
    parser.add_argument("--out", type=Path, default=Path("mmjax-demo"), help="directory for the generated files")
    parser.add_argument("--seed", type=int, help="seed of the generated files")
    parser.add_argument(
        "--eval",
        type=int,
        nargs="?",
        const=100,
        metavar="N",
        help="measure each skill on N questions that are not in the training set (default: 100)",
    )
    parser.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    from mmjax.demo import show

    files = {"image": arguments.image, "video": arguments.video, "audio": arguments.audio}
    show.run(files, arguments.question, arguments.out, arguments.seed, arguments.eval)


def _convert(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from mmjax.converters.orbax import convert_checkpoint
    from mmjax.loader.checkpoint import Checkpoint
    from mmjax.loader.params import param_specs

    checkpoint = Checkpoint.open(arguments.source)
    _, specs = param_specs(checkpoint.family, checkpoint.model_config())
    with tqdm(unit="B", unit_scale=True, desc="converting") as bar:

        def progress(path: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        plan = convert_checkpoint(
            checkpoint.directory,
            arguments.destination,
            table=checkpoint.family.table,
            shapes={path: spec.shape for path, spec in specs.items()},
            dtype=arguments.dtype,
            progress=progress,
            tensors=checkpoint.tensors,
            config=checkpoint.config if checkpoint.family.table.parts else None,
        )
    counts = f"{len(specs)} parameters from {len(plan.claimed)} tensors, {len(plan.ignored)} ignored"
    print(f"{arguments.destination}: {counts}")


def _inspect(arguments: argparse.Namespace) -> None:
    from mmjax.converters.inspect import describe, render
    from mmjax.loader.checkpoint import Checkpoint
    from mmjax.loader.params import param_specs

    try:
        checkpoint = Checkpoint.open(str(arguments.directory))
    except ValueError as error:  # not a model that mmjax supports: describe only its files
        print(render(describe(arguments.directory)) + f"\nno model to compare with: {error}")
        return
    _, specs = param_specs(checkpoint.family, checkpoint.model_config())
    shapes = {path: spec.shape for path, spec in specs.items()}
    table, tensors = checkpoint.family.table, checkpoint.tensors
    print(render(describe(arguments.directory, table=table, shapes=shapes, tensors=tensors)), end="")


def _version(arguments: argparse.Namespace) -> None:
    print(mmjax.__version__)
