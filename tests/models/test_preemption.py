"""Preempted requests with media: prompt, embeddings and positions must be restored together."""

from collections.abc import Callable
from pathlib import Path

from engine_inputs import greedy, image_prompt, output_ids, random_pixels
from mmjax import LLM
from models.questions import VIDEO, clip, qwen2_vl
from models.test_recorded import SMALL

BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4  # keys and values of 2 layers, 16 tokens, 2 heads of 16 numbers


def test_preempted_outputs_are_the_same(tiny_dir: Callable[[str], Path]) -> None:
    """The positions of grids lag behind the tokens, also for generated tokens that are computed a second time."""
    options = SMALL | {"block_size": 16, "max_model_len": 176, "kv_cache_memory_bytes": 15 * BLOCK_BYTES}
    llm = LLM(str(tiny_dir("qwen2_vl")), **options, enforce_eager=True)
    prompts = [image_prompt(random_pixels(seed, 56 * seed, 84)) for seed in (1, 2, 3)]
    prompts.append(qwen2_vl(VIDEO + "Who?", video=[clip(4, 8, 56, 56)]))
    alone = [output_ids(llm.generate(prompt, greedy(90), use_tqdm=False))[0] for prompt in prompts]
    assert llm.counters()["preemptions"] == 0
    assert llm.reset_prefix_cache()
    assert output_ids(llm.generate(prompts, greedy(90), use_tqdm=False)) == alone
    assert llm.counters()["preemptions"] > 0
    assert llm.reset_prefix_cache(), "a block was lost"
