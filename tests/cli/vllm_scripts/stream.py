"""Answers token by token, from the asynchronous engine."""

import asyncio

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils import random_uuid
from vllm.v1.engine.async_llm import AsyncLLM


async def stream(engine: AsyncLLM, prompt: str) -> str:
    params = SamplingParams(max_tokens=6, temperature=0.8, seed=42, output_kind=RequestOutputKind.DELTA)
    text, steps = "", 0
    async for output in engine.generate(request_id=random_uuid(), prompt=prompt, sampling_params=params):
        for completion in output.outputs:
            text += completion.text
        steps += 1
        if output.finished:
            break
    print("steps", steps > 1)
    return text


async def main() -> None:
    engine_args = AsyncEngineArgs(model="Qwen/Qwen2.5-Omni-7B", enforce_eager=True, enable_log_requests=False)
    engine = AsyncLLM.from_engine_args(engine_args)
    assert AsyncLLMEngine is AsyncLLM
    try:
        texts = await asyncio.gather(*(stream(engine, prompt) for prompt in ("The future is", "In a galaxy")))
        params = SamplingParams(max_tokens=6, temperature=0.8, seed=42)
        final = None
        async for output in engine.generate("The future is", params, request_id="again"):
            final = output
        print("same", final is not None and final.outputs[0].text == texts[0])
    finally:
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
