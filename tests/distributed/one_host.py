"""One host of an engine, as a process of its own:  one_host.py RANK SIZE PORT MODEL FAMILY CASES JSON
PORT: of the leader; 0 if the environment says which processes there are.

The leader prints the token ids of the family's recorded questions: of two runs, and of one after each level of sleep.
Of more than two processes, each of which compiles for itself, the first run asks for no more than the second.
JSON: further arguments of LLM.
"""

import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine_inputs import SMALL, greedy, output_ids
from mmjax import LLM
from models.questions import QUESTIONS


def main(rank: int, size: int, port: int, model: str, family: str, cases: str, more: str) -> None:
    logging.basicConfig(level=logging.INFO)
    arguments = {**SMALL, "enforce_eager": True, "tensor_parallel_size": size, **json.loads(more)}
    hosts = {"nnodes": size, "node_rank": rank, "master_addr": "127.0.0.1", "master_port": port} if port else {}
    llm = LLM(model, **arguments, **hosts)
    asked = [QUESTIONS[family][case]() for case in cases.split(",")]
    more_calls = greedy(12, prompt_logprobs=1, presence_penalty=1e-6, logit_bias={0: 1e-6})
    runs = [
        output_ids(llm.generate(asked, params, use_tqdm=False))
        for params in (more_calls if size <= 2 else greedy(12), greedy(12))
    ]
    for level in (1, 2):
        llm.sleep(level)
        llm.wake_up()
        runs.append(output_ids(llm.generate(asked, greedy(12), use_tqdm=False)))
    print(json.dumps(runs), flush=True)


if __name__ == "__main__":
    _, rank, size, port, *rest = sys.argv
    main(int(rank), int(size), int(port), *rest)
