"""What int8 weights cost the model that ships: how far its predictions move, beside what bfloat16 alone moves them.

    python benchmarks/int8_demo.py [--count 20]

Held-out questions of every skill, each with its right answer, are scored in float32, bfloat16 and int8 with bfloat16:
the mean Kullback-Leibler divergence from float32 per token, the share of tokens whose likeliest successor stays the
same, and the bytes of the language model's weights.
"""

import argparse
import dataclasses
from typing import Any

import numpy as np

from mmjax import LLM, SamplingParams
from mmjax.demo import DIRECTORY, ask, heldout

MODES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8 and bfloat16": {"dtype": "bfloat16", "quantization": "int8"},
}


def logprobs(mode: dict[str, Any], prompts: list[dict[str, Any]]) -> tuple[np.ndarray, int]:
    """(f32[tokens, V] of all prompts, bytes of the weights in the language model)."""
    llm = LLM(
        str(DIRECTORY), max_model_len=512, max_num_batched_tokens=512, max_num_seqs=8, enforce_eager=True,
        max_logprobs=-1, **mode,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1)
    rows = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        for entry in (output.prompt_logprobs or [])[1:]:
            assert entry is not None
            rows.append([entry[token].logprob for token in range(llm.model.vocab_size)])
    runner = llm.model.engines[0].runner
    leaves = zip(runner.paths, runner.params, strict=True)
    held = sum(size(leaf) for path, leaf in leaves if path.startswith("text."))
    return np.asarray(rows, np.float32), held


def size(leaf: Any) -> int:
    """Bytes of a weight, with its scales if it has any."""
    if dataclasses.is_dataclass(leaf):
        return sum(getattr(leaf, field.name).nbytes for field in dataclasses.fields(leaf))
    return int(leaf.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="questions of each skill (default: 20)")
    count = parser.parse_args().count
    prompts = []
    for skill in ask.SKILLS:
        for question in heldout.questions(skill, count):
            prompt = question.prompt
            prompts.append({**prompt, "prompt": prompt["prompt"] + question.qa.answer})
    scored = {name: logprobs(mode, prompts) for name, mode in MODES.items()}
    truth, whole = scored["float32"]
    print(f"{len(prompts)} questions with their answers, {len(truth)} tokens")
    for name, (rows, held) in scored.items():
        divergence = float((np.exp(truth) * (truth - rows)).sum(-1).mean())
        same = float((truth.argmax(-1) == rows.argmax(-1)).mean())
        print(f"{name:18} KL {divergence:.2e}   same first choice {same:.2%}   {held / whole:.2f} of float32's bytes")


if __name__ == "__main__":
    main()
