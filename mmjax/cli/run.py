"""`mmjax run`: runs a Python script that was written for vLLM."""

from __future__ import annotations

import argparse
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from mmjax.cli.vllm_modules import vllm_is_mmjax


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("script", type=Path, help="Python script; in it, `vllm` is mmjax")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script (default: none)")
    parser.set_defaults(command=lambda parsed: run(parsed.script, parsed.arguments))


def run(script: Path, arguments: Sequence[str]) -> None:
    """Run a script as `python SCRIPT ARGUMENTS` would, except that `vllm` is mmjax. ValueError if there is no such
    file; an error of the script is printed with its traceback, and ends the process with status 1."""
    if not script.is_file():
        raise ValueError(f"there is no script {script}")
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        with vllm_is_mmjax():
            runpy.run_path(str(script), run_name="__main__")
    except Exception as error:
        traceback.print_exception(_of_script(error, script))
        raise SystemExit(1) from error
    finally:
        sys.argv, sys.path[:] = argv, path


def _of_script(error: Exception, script: Path) -> Exception:
    """The error, its traceback from the first line of the script on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != str(script):
        trace = trace.tb_next
    return error if trace is None else error.with_traceback(trace)
