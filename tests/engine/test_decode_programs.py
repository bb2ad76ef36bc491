"""What a GPU does in a decode step, on the CPU: programs without sampling, and layers of fused kernels."""

from types import SimpleNamespace

import numpy as np
import pytest
from mmjax.kernels import Tile

from engine_inputs import chat_text, greedy, image_prompt, output_ids, random_pixels
from mmjax import LLM, SamplingParams
from mmjax.engine.programs import Decode
from mmjax.loader import params
from mmjax.nn import decode_step

PROMPTS = [chat_text("Hello, who are you?"), image_prompt(random_pixels(1)), {"prompt_token_ids": [5, 6, 7]}]
SAMPLED = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=3, max_tokens=12, ignore_eos=True)


def decodes(llm: LLM) -> list[Decode]:
    return [key for key in llm.model.engines[0].runner._programs if isinstance(key, Decode)]


def test_rows_that_ask_for_no_sampling_run_without_its_branches(make_llm, qwen: LLM) -> None:
    llm = make_llm("qwen2_vl")
    runner = llm.model.engines[0].runner
    runner.max_greedy_seqs = 4
    programs = len(runner.program_keys())
    assert output_ids(llm.generate(PROMPTS, greedy(), use_tqdm=False)) == output_ids(
        qwen.generate(PROMPTS, greedy(), use_tqdm=False)
    )
    assert decodes(llm) and all(key.greedy for key in decodes(llm))
    mixed = [greedy(12), SAMPLED, greedy(12)]
    assert output_ids(llm.generate(PROMPTS, mixed, use_tqdm=False)) == output_ids(
        qwen.generate(PROMPTS, mixed, use_tqdm=False)
    )
    assert any(not key.greedy for key in decodes(llm)), "one row that samples takes the batch with it"
    assert set(runner._programs) <= set(runner.program_keys()), "a server would compile after warm-up"
    runner.max_greedy_seqs = 0
    assert programs > len(runner.program_keys())


@pytest.mark.parametrize(("family", "quantization"), [("qwen2_vl", None), ("qwen3_vl", None), ("qwen2_vl", "int8")])
def test_layers_of_fused_kernels_give_the_same_tokens(
    make_llm, shared_llm, monkeypatch, family: str, quantization: str | None
) -> None:
    plain = make_llm(family, quantization=quantization) if quantization else shared_llm(family)
    want = output_ids(plain.generate(PROMPTS, greedy(), use_tqdm=False))
    rows = []

    def can_run(c, x, kv_cache, batch) -> bool:
        decoding = batch.seq_index.shape[0] == x.shape[0]
        rows.extend([len(x)] * decoding)
        return decoding

    def tile_for(rows: int, shape: tuple[int, ...], *, head_dim: int = 0, int8: bool = False) -> Tile | None:
        # the tiny heads are none that the GPU would take
        return None if int8 and rows > 1 else Tile(32, 16, 2, split_k=2 if len(shape) == 2 else 1)

    on_gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]))
    monkeypatch.setattr(params, "int8_axes", lambda spec, mesh, as_on=params.int8_axes: as_on(spec, on_gpu))
    monkeypatch.setattr(decode_step, "can_run", can_run)
    monkeypatch.setattr(decode_step, "tile_for", tile_for)
    llm = make_llm(family, quantization=quantization, num_decode_steps=3)  # sizes whose programs no other test has
    llm.model.engines[0].runner.program_cache = None  # nor any later run of this one
    assert output_ids(llm.generate(PROMPTS, greedy(), use_tqdm=False)) == want
    assert [output_ids(llm.generate(prompt, greedy(), use_tqdm=False))[0] for prompt in PROMPTS] == want
    assert len(set(rows)) > 1 and 1 in rows, rows
