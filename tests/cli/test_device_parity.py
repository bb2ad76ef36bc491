"""What benchmarks/device_parity.py compares, and how."""

import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import device_parity
import numpy as np
import pytest
from device_parity import Arrays, distances, faults, summarize, table
from parity_models import CASES, WIDTHS, Case, draw, overrides

from mmjax.cli.bench.published_configs import PUBLISHED
from mmjax.hf_config import canonical, override
from mmjax.loader.family import Family
from mmjax.loader.params import param_specs
from mmjax.models import FAMILIES


def test_every_family_is_compared() -> None:
    compared = {Family.of(PUBLISHED[case.model][0]).name for case in CASES}
    assert compared == set(FAMILIES.values())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sizes(case: Case, width: str) -> None:
    config, files = PUBLISHED[case.model]
    config = override(canonical(config), overrides(case, width))
    family = Family.of(config)
    _, specs = param_specs(family, family.config.from_hf(config, files, tied=False))
    layers = {path.split(".")[2] for path in specs if path.startswith("text.layers.")}
    assert layers == {"0", "1"}
    outside = [math.prod(spec.shape) for path, spec in specs.items() if "embed" not in path and "head" not in path]
    assert sum(outside) < (2e6 if width == "tiny" else 1.5e9)


def test_weights_are_the_same_bits_everywhere() -> None:
    values = draw("text.layers.0.down", (300, 20), ("mlp", "embed"))
    assert zlib.crc32(values.tobytes()) == 1778817410
    assert abs(values.std() * 300**0.5 - 1.4) < 0.02
    norm = draw("text.layers.0.attn_norm", (4096,), ("embed",))
    assert abs(norm.mean() - 1) < 0.01 and abs(norm.std() - 0.1) < 0.01


TRUTH: Arrays = {
    "0.prompt_ids": np.arange(3), "0.greedy": np.arange(4), "inputs": np.arange(1),
    "0.prefill.own": np.float32([-3, -np.inf]), "0.prefill.ids": np.int32([[5, 6], [7, 8]]),
    "0.prefill.top": np.float32([[-1, -2], [-1, -1.5]]), "0.decode.own": np.float32([-1]),
    "0.decode.ids": np.int32([[5, 6]]), "0.decode.top": np.float32([[-1, -2]]),
}  # fmt: skip
TRUTH |= {name.replace("0.", "alone.", 1): value for name, value in TRUTH.items() if ".decode." in name}


def changed(**values: np.ndarray) -> Arrays:
    return TRUTH | {name.replace("_", "."): np.asarray(value) for name, value in values.items()}


def test_distances() -> None:
    assert not distances(TRUTH, TRUTH, "0.prefill").any()
    swapped = changed(**{"0.prefill.ids": [[6, 5], [7, 8]], "0.prefill.top": [[-2, -1], [-1, -1.5]]})
    assert not distances(TRUTH, swapped, "0.prefill").any()
    moved = changed(**{"0.prefill.top": [[-1, -2.25], [-1, -1.5]], "0.prefill.own": [-3.5, -np.inf]})
    assert distances(TRUTH, moved, "0.prefill").tolist() == [0.5, 0, 0, 0.25, 0, 0]
    missing = changed(**{"0.prefill.ids": [[9, 5], [7, 8]], "0.prefill.top": [[-0.5, -2.75], [-1, -1.5]]})
    assert distances(TRUTH, missing, "0.prefill").tolist() == [0, 0, 1.75, 0.75, 0, 0]
    broken = changed(**{"0.prefill.own": [np.nan, -np.inf]})
    assert distances(TRUTH, broken, "0.prefill")[0] == np.inf


def test_verdicts() -> None:
    equal = summarize(TRUTH, TRUTH)
    assert not faults("float32", equal, equal)
    off = summarize(TRUTH, changed(**{"0.decode.own": [-1.001], "0.greedy": [0, 1, 2, 9]}))
    assert faults("float32", off, equal) == ["decode", "greedy ids"]
    assert faults("bfloat16", off, equal) == ["decode"] and not faults("bfloat16", off, off)
    found = {"float32": off, "bfloat16": off}
    row = table([{"case": "Llama", "width": "tiny", "found": found, "measure": off}]).splitlines()[-1]
    wrong = "float32: decode, float32: greedy ids"
    assert row == f"| Llama | tiny | 0.0e+00 | 1.0e-03 | 0/1 | 0.000 | 0.001 | 0.00, 1.00 | {wrong} |"


@pytest.mark.published
def test_command(tmp_path: Path) -> None:
    """One model, on two devices of the CPU."""
    script = [sys.executable, device_parity.__file__, "--platform", "cpu", "--devices", "2", "--cases", "Qwen2-VL"]
    options = ["--widths", "tiny", "--reference", str(tmp_path), "--json", str(tmp_path / "out.json")]
    done = subprocess.run([*script, *options], capture_output=True, text=True, check=False, env=os.environ.copy())
    assert done.returncode == 0, done.stderr
    [result] = json.loads((tmp_path / "out.json").read_text())
    assert 0 < result["found"]["float32"]["decode"][0] < 2e-4 and result["found"]["float32"]["greedy"] == [2, 2]
    assert 1e-3 < result["found"]["bfloat16"]["prefill"][0] < 1
    assert done.stdout.splitlines()[-1].startswith("| Qwen2-VL | tiny |")
