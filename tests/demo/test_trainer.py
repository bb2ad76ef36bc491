"""The trainer of the model that ships: its forward pass is transformers' own, and it goes on from what it has saved."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmjax.demo import DIRECTORY

pytestmark = pytest.mark.parity

TRAINER = Path(__file__).resolve().parents[2] / "examples" / "train_demo"
LITTLE = ["--kinds", "image", "video", "--size", "0.02", "--workers", "2", "--minutes", "3"]
SAVED = ("weights-0", "weights-1", "moments-exp_avg", "moments-exp_avg_sq", "model")


# Each run is a process of its own, forked from one that has imported all there is to import: that takes 5 CPU seconds.
RUNS = """
import json, multiprocessing, sys
sys.path.insert(0, sys.argv[1])
import train
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

def run(options):
    sys.argv = ["train.py", *options]
    train.Training(train.options()).run()

for options in json.loads(sys.argv[2]):
    process = multiprocessing.get_context("fork").Process(target=run, args=(options,))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)
"""


def train(*runs: list[str]) -> str:
    """What short runs printed, each with its options."""
    options = json.dumps([[*LITTLE, *run] for run in runs])
    alone = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", RUNS, str(TRAINER), options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_batches_are_computed_as_transformers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TRAINER))
    monkeypatch.setattr(sys, "argv", ["check.py"])
    importlib.import_module("check").main()


def test_a_run_goes_on_from_what_the_one_before_saved(tmp_path: Path) -> None:
    """Weights, moments and the count of steps come back to the last bit, and what is saved is a whole checkpoint."""
    first, resumed = tmp_path / "first", tmp_path / "resumed"
    told = train(
        ["--out", str(first), "--steps", "2", "--test-size", "1"],
        ["--out", str(resumed), "--resume", str(first), "--steps", "0", "--test-size", "0"],
    )
    assert "step 2 loss/right/hints" in told and "HELD OUT: color" in told
    assert [json.loads((folder / "state.json").read_text())["step"] for folder in (first, resumed)] == [2, 2]
    for name in SAVED:
        before, after = (load_file(folder / f"{name}.safetensors") for folder in (first, resumed))
        assert before and before.keys() == after.keys()
        assert all(np.array_equal(value, after[key]) for key, value in before.items()), name
    shipped = load_file(DIRECTORY / "model.safetensors")
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in shipped.items()}
