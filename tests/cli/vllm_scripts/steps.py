"""Requests that are added while the engine runs, step by step."""

import argparse

from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser


def process(engine: LLMEngine, prompts: list[tuple[str, SamplingParams]]) -> None:
    request_id = 0
    while prompts or engine.has_unfinished_requests():
        if prompts:
            prompt, params = prompts.pop(0)
            engine.add_request(str(request_id), prompt, params)
            request_id += 1
        request_outputs: list[RequestOutput] = engine.step()
        for request_output in request_outputs:
            if request_output.finished:
                print(request_output.request_id, [len(one.token_ids) for one in request_output.outputs])


def main(args: argparse.Namespace) -> None:
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(args))
    process(
        engine,
        [
            ("A robot may not injure", SamplingParams(temperature=0.0, max_tokens=3, logprobs=1)),
            (
                "To be or not to be,",
                SamplingParams(temperature=0.8, top_k=5, presence_penalty=0.2, max_tokens=9, seed=1),
            ),
            ("What is the meaning of life?", SamplingParams(n=2, temperature=0.8, top_p=0.95, max_tokens=2, seed=1)),
        ],
    )


if __name__ == "__main__":
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(description="Step by step"))
    main(parser.parse_args())
