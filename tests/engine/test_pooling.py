"""Pooling: vectors of the last token and of all tokens, in batches, in chunks, from the prefix cache, with media."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine_inputs import chat_text, greedy, image_prompt, random_pixels
from mmjax import LLM, PoolingParams
from mmjax.types import EmbeddingRequestOutput, PoolingRequestOutput, RequestError, ValidationError

MakeLLM = Callable[..., LLM]
PROMPTS = [
    chat_text("Hello, who are you?"),
    image_prompt(random_pixels(1)),
    chat_text("Hi"),
    image_prompt(random_pixels(2, 120, 40), random_pixels(3, 28, 28)),
]
CLOSE = 1e-5


@pytest.fixture(scope="module")
def pooling(make_llm: MakeLLM) -> LLM:
    """Chunks of 32 tokens end inside images."""
    return make_llm("qwen2_vl", runner="pooling", max_num_batched_tokens=32, block_size=16)


@pytest.fixture(scope="module")
def alone(pooling: LLM) -> list[np.ndarray]:
    """The final hidden states of each prompt's tokens [T, D], not normalized, one prompt at a time."""
    params = PoolingParams(task="token_embed", use_activation=False)
    found = []
    for prompt in PROMPTS:
        pooling.reset_prefix_cache()
        found.append(pooling.encode(prompt, params, use_tqdm=False)[0].outputs.data)
    return found


def unit(hidden: np.ndarray) -> np.ndarray:
    return hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)


def test_hidden_states_are_those_behind_the_logits(
    alone: list[np.ndarray], pooling: LLM, shared_llm: Callable[[str], LLM]
) -> None:
    """Multiplied by the embedding, which is also this model's head, they give the logits of a generating engine."""
    runner = pooling.model.engines[0].runner
    head = np.asarray(runner.params[runner.paths.index("text.embed")])[: pooling.model.vocab_size]
    outputs = shared_llm("qwen2_vl").generate(PROMPTS, greedy(1, logprobs=8), use_tqdm=False)
    for hidden, output in zip(alone, outputs, strict=True):
        assert hidden.shape == (len(output.prompt_token_ids or ()), pooling.model.spec.hidden_size)
        logits = head @ hidden[-1]
        assert int(logits.argmax()) == output.outputs[0].token_ids[0]
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        for token, entry in (output.outputs[0].logprobs or [{}])[0].items():
            assert logprobs[token] == pytest.approx(entry.logprob, abs=1e-4)


def test_batch_and_prefix_cache_change_nothing(alone: list[np.ndarray], pooling: LLM) -> None:
    assert pooling.reset_prefix_cache()
    pooling.reset_mm_cache()
    for turn in range(2):
        outputs = pooling.embed(PROMPTS, use_tqdm=False)
        for hidden, output in zip(alone, outputs, strict=True):
            assert isinstance(output, EmbeddingRequestOutput) and output.finished
            assert output.outputs.hidden_size == hidden.shape[1]
            np.testing.assert_allclose(output.outputs.embedding, unit(hidden[-1]), atol=CLOSE)
            assert len(output.prompt_token_ids) == len(hidden)
            assert output.num_cached_tokens == ((len(hidden) - 1) // 16 * 16 if turn else 0)
    assert [int(output.request_id) for output in outputs] == sorted(int(output.request_id) for output in outputs)
    engine = pooling.model.engines[0]
    assert not engine.has_work and engine.num_unfinished == 0 and pooling.reset_prefix_cache(), (
        "every page was given back"
    )


def test_all_tokens_run_despite_the_prefix_cache(alone: list[np.ndarray], pooling: LLM) -> None:
    pooling.embed(PROMPTS, use_tqdm=False)
    outputs = pooling.encode(PROMPTS, pooling_task="token_embed", use_tqdm=False)
    for hidden, output in zip(alone, outputs, strict=True):
        assert isinstance(output, PoolingRequestOutput)
        np.testing.assert_allclose(output.outputs.data, unit(hidden), atol=CLOSE)


def test_parameters_of_each_prompt(alone: list[np.ndarray], pooling: LLM) -> None:
    params = [PoolingParams(), PoolingParams(dimensions=8), PoolingParams(use_activation=False), PoolingParams()]
    outputs = pooling.encode(PROMPTS, params, use_tqdm=False)
    wanted = [unit(alone[0][-1]), unit(alone[1][-1, :8]), alone[2][-1], unit(alone[3][-1])]
    for output, vector in zip(outputs, wanted, strict=True):
        assert output.outputs.data.dtype == np.float32
        np.testing.assert_allclose(output.outputs.data, vector, atol=CLOSE)
    assert pooling.embed([]) == []


def test_the_longest_prompt(make_llm: MakeLLM) -> None:
    llm = make_llm("qwen2_vl", runner="pooling", max_model_len=64)
    ids = list(range(64))
    assert llm.embed(ids, use_tqdm=False)[0].outputs.hidden_size == 64
    with pytest.raises(RequestError, match="longer than the maximum model length of 64"):
        llm.embed([*ids, 1], use_tqdm=False)


@pytest.mark.parametrize(
    "options",
    [
        {"runner": "pooling", "tensor_parallel_size": 2},
        {"convert": "embed", "data_parallel_size": 2},
    ],
)
def test_devices_share_the_work(options: dict[str, Any], alone: list[np.ndarray], make_llm: MakeLLM) -> None:
    llm = make_llm("qwen2_vl", **options)
    for hidden, output in zip(alone, llm.embed(PROMPTS, use_tqdm=False), strict=True):
        np.testing.assert_allclose(output.outputs.embedding, unit(hidden[-1]), atol=CLOSE)


def test_no_head_is_loaded_and_nothing_compiled_after_start(make_llm: MakeLLM) -> None:
    llm = make_llm("llava", runner="pooling", enforce_eager=False, max_model_len=128, max_num_batched_tokens=32)
    assert "text.head" not in llm.model.engines[0].runner.paths
    prompt = {"prompt": "USER: <image>\nWhat?", "multi_modal_data": {"image": random_pixels(1)}}
    first, second = (output.outputs.embedding for output in llm.embed([prompt, "Hi"], use_tqdm=False))
    assert np.linalg.norm(first) == pytest.approx(1) and np.abs(np.subtract(first, second)).max() > 0.01
    assert llm.counters()["compiles_after_warmup"] == 0


def test_each_runner_refuses_the_other_calls(pooling: LLM, shared_llm: Callable[[str], LLM]) -> None:
    with pytest.raises(ValueError, match="only supported for generative models"):
        pooling.generate("Hi")
    with pytest.raises(ValueError, match="only supported for generative models"):
        pooling.chat([{"role": "user", "content": "Hi"}])
    for method in ("embed", "encode"):
        with pytest.raises(ValueError, match=rf"LLM.{method}\(\) is only supported for pooling models"):
            getattr(shared_llm("qwen2_vl"), method)("Hi")


@pytest.mark.parametrize(
    ("params", "task", "error", "words"),
    [
        (PoolingParams(dimensions=65), None, ValidationError, "dimensions must be at most 64"),
        (PoolingParams(task="classify"), None, RequestError, "Pooling task 'classify' is not supported"),
        (PoolingParams(task="token_embed"), "embed", RequestError, "asks for 'token_embed'"),
        (None, "score", RequestError, "Pooling task 'score' is not supported"),
        ([PoolingParams()] * 2, None, ValueError, r"prompts \(1\) and params \(2\) must be the same"),
        (greedy(1), None, TypeError, "should be PoolingParams"),
    ],
)
def test_refusals(params: Any, task: str | None, error: type[Exception], words: str, pooling: LLM) -> None:
    with pytest.raises(error, match=words):
        pooling.encode("Hi", params, pooling_task=task)
    with pytest.raises(RequestError):
        pooling.embed(["Hi", {"prompt": "x", "multi_modal_data": {"image": [random_pixels(1)]}}], use_tqdm=False)
    assert len(pooling.embed("Hi", use_tqdm=False)) == 1, "the engine stays usable"


def test_an_encoder_decoder_cannot_pool(make_llm: MakeLLM) -> None:
    with pytest.raises(ValueError, match="is for decoder-only models"):
        make_llm("whisper", runner="pooling")
    with pytest.raises(ValidationError, match="convert"):
        make_llm("qwen2_vl", runner="generate", convert="embed")


SCORED = [PROMPTS[0], PROMPTS[1]]


def test_score(pooling: LLM) -> None:
    first, second, third = (output.outputs.data for output in pooling.encode([*SCORED, "Hi"], use_tqdm=False))
    one_to_many = pooling.score(SCORED[0], [SCORED[1], "Hi", SCORED[0]], use_tqdm=False)
    wanted = [float(np.dot(first, second)), float(np.dot(first, third)), 1.0]
    np.testing.assert_allclose([output.outputs.score for output in one_to_many], wanted, atol=1e-5)
    pairs = pooling.score(SCORED, ["Hi", "Hi"], use_tqdm=False)
    np.testing.assert_allclose(
        [output.outputs.score for output in pairs], [np.dot(first, third), np.dot(second, third)], atol=1e-5
    )
    assert repr(one_to_many[2].outputs).startswith("ScoringOutput(score=")
    assert one_to_many[1].prompt_token_ids[-1] == pooling.model.encode("Hi", add_special_tokens=True)[-1]
    for wrong in ((SCORED, ["a", "b", "c"]), (SCORED, "a")):
        with pytest.raises(RequestError, match="score compares 1 prompt with N, or N with N"):
            pooling.score(*wrong)
    with pytest.raises(RequestError, match="only supported for cross-encoder models"):
        pooling.score("a", "b", chat_template="x")
