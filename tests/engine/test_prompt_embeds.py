"""Embeddings in place of a whole prompt: the embeddings of tokens give the same output as the tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from api_server import client_over
from engine_inputs import IMAGE, chat_text, greedy, image_prompt, output_ids, random_pixels
from mmjax import LLM, AsyncLLM, PoolingParams, SamplingParams
from mmjax.utils.serial_utils import tensor2base64

FAMILIES = ["qwen2_vl", "qwen3_vl", "qwen3_moe"]  # three positions a token; rows that reach later layers; no media


@pytest.fixture(scope="module")
def table(tiny_dir: Callable[[str], Path]) -> Callable[..., np.ndarray]:
    """`table(family, tokens)`: rows of the model's embedding."""

    def rows(family: str, tokens: Any) -> np.ndarray:
        weights = load_file(tiny_dir(family) / "model.safetensors")
        [name] = [name for name in weights if name.endswith("embed_tokens.weight")]
        return weights[name][np.asarray(tokens)].astype(np.float32)

    return rows


@pytest.fixture(scope="module")
def taking(make_llm: Any) -> Callable[..., LLM]:
    """`taking(family)`: an engine that accepts such prompts, with empty caches."""
    made: dict[str, LLM] = {}

    def get(family: str = "qwen2_vl") -> LLM:
        llm = made.get(family) or made.setdefault(family, make_llm(family, enable_prompt_embeds=True))
        llm.reset_mm_cache()
        assert llm.reset_prefix_cache()
        return llm

    return get


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(20, 200, count).tolist()


@pytest.mark.usefixtures("one_decode_size")
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_tokens_give_the_same_output(family: str, taking: Any, table: Any) -> None:
    llm = taking(family)
    lengths = (1, 16, 33, 150)  # one token, a page, pages and a bit, more than a step takes
    prompts = [tokens_of(n, n) for n in lengths]
    want = output_ids(llm.generate([{"prompt_token_ids": p} for p in prompts], greedy(8), use_tqdm=False))
    assert len(set(map(tuple, want))) > 1
    rows = [{"prompt_embeds": table(family, p), "prompt": "only told"} for p in prompts]
    out = llm.generate(rows, greedy(8), use_tqdm=False)
    assert output_ids(out) == want
    assert out[0].prompt == "only told" and out[2].prompt_token_ids == [0] * 33
    assert output_ids(llm.generate(rows[2], greedy(8), use_tqdm=False)) == [want[2]]


def test_arrays_of_every_library(taking: Any, table: Any) -> None:
    llm, tokens = taking(), tokens_of(20)
    rows = table("qwen2_vl", tokens)
    want = output_ids(llm.generate({"prompt_token_ids": tokens}, greedy(6), use_tqdm=False))
    for form in (rows, rows.astype(np.float64), jnp.asarray(rows), np.asfortranarray(rows)):
        assert output_ids(llm.generate({"prompt_embeds": form}, greedy(6), use_tqdm=False)) == want
    half = rows.astype(ml_dtypes.bfloat16)
    assert llm.generate({"prompt_embeds": half}, greedy(6), use_tqdm=False)[0].finished


def test_blocks_are_cached_by_content(taking: Any, table: Any) -> None:
    """Prompts with equal prefixes share blocks; other rows, tokens and salts do not."""
    llm = taking()
    tokens = tokens_of(70)
    rows, other = table("qwen2_vl", tokens), table("qwen2_vl", tokens_of(70, 1))
    longer = np.concatenate([rows[:40], other[:20]])

    def cached(prompt: dict[str, Any]) -> int | None:
        return llm.generate(prompt, greedy(3), use_tqdm=False)[0].num_cached_tokens

    assert [cached({"prompt_embeds": r}) for r in (rows, rows, other, longer)] == [0, 64, 0, 32]
    assert cached({"prompt_embeds": rows, "cache_salt": "mine"}) == 0
    assert cached({"prompt_token_ids": tokens}) == 0
    assert output_ids(llm.generate({"prompt_embeds": longer}, greedy(6), use_tqdm=False)) == output_ids(
        llm.generate({"prompt_token_ids": tokens[:40] + tokens_of(70, 1)[:20]}, greedy(6), use_tqdm=False)
    )


def test_chunks_batches_and_preemption(make_llm: Any, table: Any) -> None:
    """A small KV cache and encoder cache, and other prompts of all kinds, do not change the outputs."""
    small = {"kv_cache_memory_bytes": 130_000, "max_model_len": 160, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    llm = make_llm("qwen2_vl", enable_prompt_embeds=True, **small)
    prompts = [tokens_of(60 + i, i) for i in range(4)]
    mixed: list[Any] = [{"prompt_embeds": table("qwen2_vl", p)} for p in prompts]
    mixed[2:2] = [image_prompt(random_pixels(1)), chat_text("Hi")]
    want = [output_ids(llm.generate(prompt, greedy(24), use_tqdm=False))[0] for prompt in mixed]
    tokens = output_ids(llm.generate([{"prompt_token_ids": p} for p in prompts], greedy(24), use_tqdm=False))
    assert want[:2] + want[4:] == tokens
    assert output_ids(llm.generate(mixed, greedy(24), use_tqdm=False)) == want
    assert llm.counters()["preemptions"] > 0


def test_embeddings_of_media_within_the_prompt(taking: Any, table: Any) -> None:
    """A prompt whose text and image are both embeddings."""
    llm = taking("llava")
    asked = {"prompt": "What is <image>?", "multi_modal_data": {"image": random_pixels(1)}}
    seen = llm.generate(asked, greedy(8), use_tqdm=False)
    rendered = llm.model.input_processor.process(llm.model.input_processor.parse(asked))
    rows = table("llava", rendered.token_ids)
    [span], [entry], engine = rendered.spans, rendered.items, llm.model.engines[0]
    rows[span.start : span.start + span.length] = np.asarray(engine.runner.state.mm_embeds)[
        engine.encoder_cache.get(entry.item_hash)
    ]
    assert output_ids(llm.generate({"prompt_embeds": rows}, greedy(8), use_tqdm=False)) == output_ids(seen)


def test_penalties_ignore_the_prompt(taking: Any, table: Any) -> None:
    """Embeddings have no ids, so a repetition penalty only sees the output."""
    llm, rows = taking(), table("qwen2_vl", tokens_of(20))
    plain = llm.generate({"prompt_embeds": rows}, greedy(1), use_tqdm=False)[0].outputs[0]
    params = SamplingParams(temperature=0, max_tokens=1, repetition_penalty=1.9, logprobs=2, ignore_eos=True)
    assert llm.generate({"prompt_embeds": rows}, params, use_tqdm=False)[0].outputs[0].token_ids == plain.token_ids
    several = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=5, ignore_eos=True)
    [out] = llm.generate({"prompt_embeds": rows}, several, use_tqdm=False)
    [same] = llm.generate({"prompt_token_ids": tokens_of(20)}, several, use_tqdm=False)
    assert [a.token_ids for a in out.outputs] == [a.token_ids for a in same.outputs]


def test_vectors(make_llm: Any, table: Any) -> None:
    llm, tokens = make_llm("qwen3_moe", runner="pooling", enable_prompt_embeds=True), tokens_of(30)
    rows, words = llm.encode(
        [{"prompt_embeds": table("qwen3_moe", tokens)}, {"prompt_token_ids": tokens}], PoolingParams(), use_tqdm=False
    )
    np.testing.assert_allclose(rows.outputs.data, words.outputs.data, atol=1e-5)


ROWS = np.zeros((3, 64), np.float32)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "width": ({"prompt_embeds": ROWS[:, :9]}, ValueError, "got 9, but model expects 64"),
    "axes": ({"prompt_embeds": ROWS[0]}, ValueError, "must be 2D"),
    "batch": ({"prompt_embeds": ROWS[None]}, ValueError, "must be 2D"),
    "none": ({"prompt_embeds": ROWS[:0]}, ValueError, "at least one token"),
    "integers": ({"prompt_embeds": ROWS.astype(np.int32)}, ValueError, "must hold floats, got int32"),
    "nan": ({"prompt_embeds": ROWS * np.nan}, ValueError, "NaN or infinite"),
    "overflow": ({"prompt_embeds": ROWS.astype(np.float64) + 1e300}, ValueError, "NaN or infinite"),
    "list": ({"prompt_embeds": ROWS.tolist()}, ValueError, "must be an array of torch, NumPy or JAX"),
    "text": ({"prompt_embeds": "AAAA"}, ValueError, "must be an array of torch, NumPy or JAX"),
    "long": ({"prompt_embeds": np.zeros((384, 64), np.float16)}, ValueError, "maximum model length of 384"),
    "ids": ({"prompt_embeds": ROWS, "prompt_token_ids": [1]}, ValueError, "the whole prompt"),
    "media": (image_prompt(random_pixels(1)) | {"prompt_embeds": ROWS}, ValueError, "the whole prompt"),
    "words": ({"prompt_embeds": ROWS, "prompt": 3}, TypeError, "should be a string"),
    "salt": ({"prompt_embeds": ROWS, "cache_salt": ""}, ValueError, "cache_salt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals(case: str, taking: Any) -> None:
    llm, (prompt, error, words) = taking(), WRONG[case]
    with pytest.raises(error, match=words):
        llm.generate([chat_text("Hi"), prompt], greedy(2), use_tqdm=False)
    assert llm.model.engines[0].num_unfinished == 0


def test_refused_unless_enabled(make_llm: Any, taking: Any) -> None:
    with pytest.raises(ValueError, match="You must set `--enable-prompt-embeds` to input `prompt_embeds`"):
        make_llm("qwen2_vl", load_format="dummy").generate({"prompt_embeds": ROWS}, use_tqdm=False)
    whisper = make_llm("whisper", max_model_len=64, enable_prompt_embeds=True, load_format="dummy")
    with pytest.raises(TypeError, match="Cannot pass embeddings prompt to encoder-decoder models"):
        whisper.generate({"prompt_embeds": ROWS}, use_tqdm=False)
    with pytest.raises(ValueError, match="prompt_logprobs needs a prompt of tokens"):
        taking().generate({"prompt_embeds": ROWS}, greedy(1, prompt_logprobs=1), use_tqdm=False)
    with pytest.raises(ValueError, match="placeholder"):
        taking().generate({"prompt": IMAGE}, greedy(1), use_tqdm=False)


def test_over_http(taking: Any, table: Any) -> None:
    """POST /generate takes the rows as a tensor file in base64, and refuses anything else."""
    llm, rows = taking(), table("qwen2_vl", tokens_of(20))
    want = output_ids(llm.generate({"prompt_embeds": rows}, greedy(5), use_tqdm=False))
    params = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
    engine = AsyncLLM(llm)
    try:
        client = client_over(engine)

        def ask(given: Any) -> Any:
            return client.post("/generate", json={"prompts": {"prompt_embeds": given}, "sampling_params": params})

        assert [ask(tensor2base64(rows)).json()[0]["outputs"][0]["token_ids"]] == want
        for wrong in ("QUJD", "@", "", tensor2base64(rows[:, :5]), rows.tolist(), 3):
            assert ask(wrong).status_code == 400
        assert [ask(tensor2base64(rows)).json()[0]["outputs"][0]["token_ids"]] == want
    finally:
        engine.close()
        del engine.llm  # see tests/online.py
