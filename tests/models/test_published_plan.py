"""A published model compiled for slices of TPUs: its temporary memory, and what its devices exchange."""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = [
    pytest.mark.published,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install 'mmjax[tpu]'"),
]
GIB = 1 << 30
HEAD_BYTES = 151936 * 2048 * 2


def plan(topology: str) -> dict[str, Any]:
    """In a process of its own: libtpu reads the environment once."""
    command = [
        sys.executable,
        "-m",
        "mmjax",
        "plan",
        "qwen2.5-vl-3b",
        "--topology",
        topology,
        "--max-model-len",
        "4096",
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["fits"], found["reason"]
    return found


def test_one_chip_copies_no_weights() -> None:
    """In the default layouts the decode loop took 4.14 GiB."""
    decode = plan("v5e-1")["programs"][0]
    assert decode["name"].startswith("decode") and decode["temp_bytes"] < 0.6 * GIB


def test_four_chips_gather_no_weight() -> None:
    programs = plan("v5e-4")["programs"]
    assert all(program["gathered_bytes"] < HEAD_BYTES / 4 for program in programs), programs
    decode = programs[0]
    assert decode["temp_bytes"] < 0.6 * GIB
    assert decode["collectives"]["all-reduce"] <= 2 * 36 + 1, "two a layer, and one of the embedding"
