"""Many prompts at once, with parameters of their own; then the metrics, and sleep."""

import vllm.envs as envs
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.sampling_params import StructuredOutputsParams  # noqa: F401
from vllm.v1.metrics.reader import Counter, Gauge, Histogram, Vector

logger = init_logger(__name__)

PROMPTS = ["Hello, my name is", "The president of", "The capital of France is", "The future of AI is"]


def main() -> None:
    llm = LLM(
        model="Qwen/Qwen2.5-Omni-7B",
        swap_space=4,
        disable_log_stats=False,
        enable_prefix_caching=True,
        enable_sleep_mode=True,
        compilation_config={"cudagraph_mode": "PIECEWISE"},
    )
    tokenizer_free = TokensPrompt(prompt_token_ids=[5, 6, 7])
    params = [SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=i + 1, logprobs=1) for i in range(5)]
    outputs: list[RequestOutput] = llm.generate([*PROMPTS, tokenizer_free], params)
    print([len(output.outputs[0].token_ids) for output in outputs], len(outputs[0].outputs[0].logprobs))
    for metric in llm.get_metrics():
        if isinstance(metric, Gauge) and metric.name == "vllm:num_requests_running":
            print(metric.name, metric.value)
        elif isinstance(metric, Counter) and metric.name == "vllm:request_success":
            print(metric.name, metric.value >= 5)
        elif isinstance(metric, Vector):
            raise AssertionError("no counter here has several values")
        elif isinstance(metric, Histogram):
            assert metric.buckets["+Inf"] == metric.count
    llm.sleep(level=1)
    llm.wake_up()
    greedy = SamplingParams(temperature=0, max_tokens=3)
    before, after = (llm.generate(PROMPTS[0], greedy, use_tqdm=False)[0].outputs[0] for _ in range(2))
    print(before == after, llm.reset_prefix_cache(), llm.llm_engine.model_config.max_model_len > 0)
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    print(envs.VLLM_USE_V1, current_platform.is_rocm())


if __name__ == "__main__":
    main()
