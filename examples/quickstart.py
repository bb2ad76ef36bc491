"""A first run without any download: tiny models with random weights, asked about text, an image and a sound.

    python examples/quickstart.py

The weights are random, so the answers mean nothing; it shows that everything from prompt to tokens works here.
"""

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmjax import LLM, SamplingParams

TINY = Path(__file__).resolve().parent.parent / "tests" / "tiny.py"
FAMILIES = ("qwen2_vl", "whisper")


def make_checkpoint(family: str, folder: Path) -> Path:
    """A tiny random checkpoint in the layout of the hub, written by the tests' own maker."""
    spec = importlib.util.spec_from_file_location("tiny", TINY)
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    return Path(tiny.make(family, folder / family))


def prompts(family: str) -> dict[str, Any]:
    """The prompts for each model. `<image>` stands for the model's own placeholder."""
    rng = np.random.default_rng(0)
    if family == "whisper":
        time_s = np.arange(16_000 * 3) / 16_000
        return {"sound": {"prompt": "", "multi_modal_data": {"audio": (np.sin(440 * 2 * np.pi * time_s), 16_000)}}}
    picture = Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8))
    return {
        "text": "What is a picture?",
        "text and image": {"prompt": "<image>What is in this picture?", "multi_modal_data": {"image": picture}},
    }


def main() -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with tempfile.TemporaryDirectory() as scratch:
        for family in FAMILIES:
            begin = time.perf_counter()
            model = make_checkpoint(family, Path(scratch))
            length = 256 if family != "whisper" else None  # small sizes: little to compile
            llm = LLM(str(model), max_model_len=length, max_num_seqs=1, max_num_batched_tokens=128)
            print(f"{family}: ready in {time.perf_counter() - begin:.1f} s (weights are random)")
            for name, prompt in prompts(family).items():
                begin = time.perf_counter()
                (output,) = llm.generate(prompt, greedy, use_tqdm=False)
                took = time.perf_counter() - begin
                print(f"  {name}: {len(output.prompt_token_ids or ())} tokens in, {took:.3f} s, out:")
                print(f"    {list(output.outputs[0].token_ids)}")


if __name__ == "__main__":
    main()
