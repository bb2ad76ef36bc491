"""Methods of vLLM's `LLM` besides generate, chat, embed and encode."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from engine_inputs import chat_text, greedy, image_prompt, random_pixels
from mmjax import LLM, PoolingParams, RequestError, RequestOutput
from mmjax.engine.compile_counter import CompileCounter
from mmjax.types.metrics import Counter, Gauge, Histogram

PROMPTS = [chat_text("Hello, who are you?"), image_prompt(random_pixels(1))]


def texts(llm: LLM) -> list[str]:
    """One prompt at a time, so that the same programs run each time."""
    return [llm.generate(prompt, greedy(6), use_tqdm=False)[0].outputs[0].text for prompt in PROMPTS]


# -- sleeping


@pytest.fixture
def awake(qwen: LLM) -> Iterator[LLM]:
    yield qwen
    qwen.wake_up()


def on_device(llm: LLM) -> int:
    """Live bytes of the engine's parameters and state."""
    runner = llm.model.engines[0].runner
    arrays = jax.tree.leaves((runner.params, runner.state))
    return sum(array.nbytes for array in arrays if not array.is_deleted())


@pytest.mark.parametrize("level", [1, 2])
def test_sleep(level: int, awake: LLM, compiles: CompileCounter) -> None:
    wanted, used = texts(awake), on_device(awake)
    before = compiles.count
    awake.sleep(level)
    assert awake.model.sleep_state == ("weights_offloaded" if level == 1 else "discard_all")
    assert on_device(awake) == 0
    with pytest.raises(RequestError, match=r"The engine sleeps .*: call wake_up first"):
        texts(awake)
    awake.wake_up()
    assert on_device(awake) == used
    assert texts(awake) == wanted
    assert compiles.count == before


def test_memory_comes_back_by_tags(awake: LLM) -> None:
    wanted, used = texts(awake), on_device(awake)
    awake.sleep()
    awake.sleep(2)  # again: the weights are still on the host
    awake.wake_up(tags=["weights"])
    assert 0 < on_device(awake) < used
    with pytest.raises(RequestError, match=r"sleeps \(kv_cache\)"):
        texts(awake)
    awake.wake_up(tags=["kv_cache"])
    assert texts(awake) == wanted
    awake.wake_up()
    with pytest.raises(RequestError, match="level must be 1 or 2, got 3"):
        awake.sleep(3)
    with pytest.raises(RequestError, match=r"unknown tags \['all'\]; known: weights, kv_cache"):
        awake.wake_up(["all"])


# -- steps


def test_requests_by_steps(qwen: LLM) -> None:
    engine = qwen.llm_engine
    assert engine is qwen.llm_engine and qwen.model_config.max_model_len == qwen.model.max_model_len
    engine.add_request("first", PROMPTS[0], greedy(6))
    engine.add_request("second", "A long story", greedy(300))
    with pytest.raises(RequestError, match="A request with the id 'first' is already running"):
        engine.add_request("first", "Hi", greedy(4))
    with pytest.raises(RequestError, match="LoRA is not supported"):
        engine.add_request("third", "Hi", greedy(4), lora_request=object())
    with pytest.raises(RequestError, match="only supported for pooling models"):
        engine.add_request("third", "Hi", PoolingParams())
    ended: dict[str, str] = {}
    while "first" not in ended:
        for output in engine.step():
            assert isinstance(output, RequestOutput)
            if output.finished:
                ended[output.request_id] = output.outputs[0].text
    assert engine.get_num_unfinished_requests() == 1
    engine.abort_request(["second", "unknown"])
    while any(each.has_work for each in qwen.model.engines):
        engine.step()
    assert not engine.has_unfinished_requests()
    assert ended == {"first": texts(qwen)[0]}


# -- metrics, queue, profiles


def test_metrics(qwen: LLM) -> None:
    def now() -> dict[str, Any]:
        return {metric.name: metric for metric in qwen.get_metrics()}

    texts(qwen)
    before = now()
    outputs = qwen.generate(PROMPTS, greedy(6), use_tqdm=False)
    after = now()
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    generated, name = "vllm:generation_tokens", {"model_name": qwen.args.model}
    assert isinstance(after[generated], Counter) and after[generated].labels == name
    assert after[generated].value - before[generated].value == made
    running = after["vllm:num_requests_running"]
    assert isinstance(running, Gauge) and running.value == 0
    sizes = after["vllm:request_generation_tokens"]
    assert isinstance(sizes, Histogram) and sizes.count - before[sizes.name].count == 2
    assert sizes.sum - before[sizes.name].sum == made
    assert sizes.buckets["+Inf"] == sizes.count and list(sizes.buckets)[-1] == "+Inf" and "10.0" in sizes.buckets


def test_metrics_of_phases(qwen: LLM) -> None:
    """Each token, dispatch and second is counted once, under vLLM's names and in its buckets."""
    texts(qwen)
    before = {metric.name: metric for metric in qwen.get_metrics()}
    outputs = qwen.generate(PROMPTS, greedy(6), use_tqdm=False)
    after = {metric.name: metric for metric in qwen.get_metrics()}

    def gained(name: str) -> tuple[int, float]:
        new, old = after[f"vllm:{name}"], before[f"vllm:{name}"]
        assert isinstance(new, Histogram) and isinstance(old, Histogram)
        return new.count - old.count, new.sum - old.sum

    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    times = [output.metrics for output in outputs]
    computed = sum(len(output.prompt_token_ids) - output.num_cached_tokens for output in outputs)
    assert gained("request_prefill_kv_computed_tokens") == (2, computed)
    assert gained("iteration_tokens_total")[1] == computed + sum(lengths)
    assert gained("request_params_max_tokens") == (2, 12) and gained("request_params_n") == (2, 2)
    assert gained("request_max_num_generation_tokens") == (2, sum(lengths))
    for name, seconds in (
        ("request_queue_time_seconds", [each.first_scheduled_time - each.arrival_time for each in times]),
        ("request_prefill_time_seconds", [each.first_token_time - each.first_scheduled_time for each in times]),
        ("request_decode_time_seconds", [each.last_token_time - each.first_token_time for each in times]),
        ("request_inference_time_seconds", [each.last_token_time - each.first_scheduled_time for each in times]),
    ):
        assert min(seconds) >= 0 and gained(name) == (2, pytest.approx(sum(seconds)))
    count, seconds = gained("inter_token_latency_seconds")
    assert count == sum(lengths) - 2
    assert seconds == pytest.approx(gained("request_decode_time_seconds")[1], abs=0.05)
    buckets = after["vllm:request_queue_time_seconds"].buckets
    assert [*buckets][:3] == ["0.3", "0.5", "0.8"] and [*buckets][-2:] == ["7680.0", "+Inf"]


def test_sleep_state(qwen: LLM) -> None:
    states = [metric for metric in qwen.get_metrics() if metric.name == "vllm:engine_sleep_state"]
    assert {each.labels["sleep_state"]: each.value for each in states} == {
        "awake": 1, "weights_offloaded": 0, "discard_all": 0
    }  # fmt: skip


def test_queue(qwen: LLM) -> None:
    wanted = texts(qwen)
    assert qwen.enqueue(PROMPTS[0], greedy(6)) == ["0"] and qwen.enqueue(PROMPTS[1:], greedy(6)) == ["1"]
    assert [output.outputs[0].text for output in qwen.wait_for_completion(use_tqdm=False)] == wanted
    assert qwen.wait_for_completion(use_tqdm=False) == []


def test_profiles(qwen: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", calls.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("end"))
    qwen.start_profile()
    qwen.stop_profile()
    monkeypatch.setenv("VLLM_TORCH_PROFILER_DIR", str(tmp_path))
    qwen.start_profile("first")
    configured = dataclasses.replace(qwen.args, profiler_config={"torch_profiler_dir": "/elsewhere"})
    monkeypatch.setattr(qwen, "args", configured)
    qwen.start_profile()
    assert calls == ["mmjax-profile", "end", str(tmp_path / "first"), "/elsewhere"]


def test_size_of_the_world(qwen: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    args = dataclasses.replace(qwen.args, tensor_parallel_size=2, data_parallel_size=3)
    monkeypatch.setattr(qwen, "args", args)
    assert (qwen.get_world_size(), qwen.get_world_size(include_dp=False)) == (6, 2)


@pytest.mark.parametrize(
    "method",
    ["classify", "reward", "beam_search", "apply_model", "collective_rpc", "update_weights",
     "init_weight_transfer_engine"],
)  # fmt: skip
def test_what_is_not_supported_says_so(qwen: LLM, method: str) -> None:
    with pytest.raises(RequestError, match=rf"LLM.{method}\(\) is not supported: \w"):
        getattr(qwen, method)("anything", some="argument")
