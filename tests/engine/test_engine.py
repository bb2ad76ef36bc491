"""The engine gives the same output alone, in a batch, in chunks, preempted or cached."""

import dataclasses
import re
import threading

import numpy as np
import pytest

from engine_inputs import chat_text, greedy, image_prompt, output_ids, random_pixels
from mmjax import LLM, SamplingParams
from mmjax.engine.model_runner import ModelRunner
from mmjax.engine.programs import Decode, Prefill, ProgramKey
from mmjax.outputs.request import GenerateRequest
from mmjax.types import RequestError

MIXED = [
    chat_text("Hello, who are you?"),
    image_prompt(random_pixels(1)),
    image_prompt(random_pixels(2, 120, 40), random_pixels(3, 28, 28), words="Compare them."),
    chat_text("One two three four five six seven eight nine ten eleven twelve."),
    image_prompt(random_pixels(4, 90, 90)),
    {"prompt_token_ids": [5, 6, 7]},
]


@pytest.fixture(scope="module")
def alone(shared_llm) -> list[list[int]]:
    """The output of each prompt in MIXED alone."""
    llm = shared_llm("qwen2_vl")
    return [output_ids(llm.generate(prompt, greedy(), use_tqdm=False))[0] for prompt in MIXED]


def test_outputs_do_not_depend_on_the_batch(qwen: LLM, alone: list[list[int]]) -> None:
    assert output_ids(qwen.generate(MIXED, greedy(), use_tqdm=False)) == alone
    assert output_ids(qwen.generate(MIXED[::-1], greedy(), use_tqdm=False)) == alone[::-1]


def test_chunked_prefill_gives_the_same_output(make_llm, alone: list[list[int]]) -> None:
    llm = make_llm("qwen2_vl", max_num_batched_tokens=32, enable_prefix_caching=False)
    outputs = llm.generate(MIXED, greedy(), use_tqdm=False)
    longest = max(len(o.prompt_token_ids) for o in outputs)
    assert longest > 32, "nothing was cut"
    assert output_ids(outputs) == alone


def test_the_next_chunk_is_queued_before_this_one_is_read(make_llm, monkeypatch, alone) -> None:
    """Packing a chunk's media is slow, so it must not start only when the previous chunk has been read."""
    llm = make_llm("qwen2_vl", max_num_batched_tokens=32, enable_prefix_caching=False)
    engine, queued, found = llm.model.engines[0], [], []
    prefill, collect = engine._prefill, engine._collect

    def dispatching(slices):
        queued.append(prefill(slices))
        return queued[-1]

    def reading(ticket):
        if ticket in queued and any(s.is_prefilling for s in engine.scheduler.running):
            found.append(len(queued) - 1 - queued.index(ticket))
        return collect(ticket)

    monkeypatch.setattr(engine, "_prefill", dispatching)
    monkeypatch.setattr(engine, "_collect", reading)
    assert output_ids(llm.generate(MIXED, greedy(), use_tqdm=False)) == alone
    assert len(found) > 2 and min(found) == 1, found


def test_preempted_sequences_give_the_same_output(make_llm, qwen: LLM) -> None:
    prompts = [chat_text("a" * 10 * i) for i in range(1, 5)]
    expected = output_ids(qwen.generate(prompts, greedy(100), use_tqdm=False))
    page_bytes = 2 * 2 * 16 * 2 * 16 * 4
    llm = make_llm("qwen2_vl", max_model_len=176, kv_cache_memory_bytes=15 * page_bytes)
    assert output_ids(llm.generate(prompts, greedy(100), use_tqdm=False)) == expected
    assert llm.counters()["preemptions"] > 0
    assert llm.reset_prefix_cache(), "every page came back"


def test_prefix_cache_counts_hits_and_distinguishes_media(qwen: LLM) -> None:
    first = qwen.generate(image_prompt(random_pixels(1, 112, 112)), greedy(), use_tqdm=False)[0]
    again = qwen.generate(image_prompt(random_pixels(1, 112, 112)), greedy(), use_tqdm=False)[0]
    other = qwen.generate(image_prompt(random_pixels(2, 112, 112)), greedy(), use_tqdm=False)[0]
    length = len(first.prompt_token_ids)
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens == (length - 1) // 16 * 16
    assert other.num_cached_tokens < 32, "only what precedes the picture is shared"
    assert output_ids([first]) == output_ids([again]) != output_ids([other])


def test_cache_salt_separates_prefixes(qwen: LLM) -> None:
    prompt = {"prompt": chat_text("A sentence that is long enough to fill more than one page of the cache.")}
    cached = [
        qwen.generate(prompt | salt, greedy(2), use_tqdm=False)[0].num_cached_tokens
        for salt in ({}, {}, {"cache_salt": "a"}, {"cache_salt": "a"}, {"cache_salt": "b"})
    ]
    assert [c > 0 for c in cached] == [False, True, False, True, False]


def test_a_cached_prefix_may_end_inside_an_image(qwen: LLM) -> None:
    """Half an image from the prefix cache, the rest from its rows; the encoder runs again if they are gone."""
    image = random_pixels(7, 224, 224)
    expected = output_ids(qwen.generate(image_prompt(image, words="x"), greedy(), use_tqdm=False))
    tokens = qwen.generate(image_prompt(image, words="x"), greedy(1), use_tqdm=False)[0].prompt_token_ids
    qwen.reset_prefix_cache()
    cut = {"prompt_token_ids": tokens[:40] + tokens[-3:], "multi_modal_data": {}}
    cut["prompt_token_ids"] = [t for t in cut["prompt_token_ids"] if t != qwen.model.tokenizer.id_of("<|image_pad|>")]
    qwen.generate(cut, greedy(1), use_tqdm=False)
    qwen.reset_mm_cache()
    assert output_ids(qwen.generate(image_prompt(image, words="x"), greedy(), use_tqdm=False)) == expected


def test_encoder_cache_is_bounded(make_llm) -> None:
    """More images than rows: later ones wait for earlier ones, and each output is correct."""
    llm = make_llm("qwen2_vl", max_model_len=256, max_num_batched_tokens=64)
    pictures = [random_pixels(i, 140, 140) for i in range(12)]
    rows = llm.model.engines[0].encoder_cache.capacity
    outputs = llm.generate([image_prompt(p) for p in pictures], greedy(4), use_tqdm=False)
    assert sum(25 for _ in pictures) > rows
    assert output_ids(outputs) == [
        output_ids(llm.generate(image_prompt(p), greedy(4), use_tqdm=False))[0] for p in pictures
    ]


def test_seeds_make_outputs_repeatable_and_independent(qwen: LLM) -> None:
    def params(seed: int | None, n: int = 1) -> SamplingParams:
        return SamplingParams(temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True, n=n)

    prompt = chat_text("Say something.")
    one = output_ids(qwen.generate(prompt, params(7), use_tqdm=False))[0]
    crowd = qwen.generate([prompt] * 4, [params(s) for s in (1, 7, 7, None)], use_tqdm=False)
    assert output_ids(crowd)[1] == output_ids(crowd)[2] == one
    assert output_ids(crowd)[0] != one != output_ids(crowd)[3]
    several = qwen.generate(prompt, params(7, n=3), use_tqdm=False)[0].outputs
    assert [o.index for o in several] == [0, 1, 2]
    assert list(several[0].token_ids) == one
    assert len({tuple(o.token_ids) for o in several}) == 3


def test_stopping(qwen: LLM) -> None:
    prompt = chat_text("Hello")
    free = qwen.generate(prompt, greedy(16), use_tqdm=False)[0].outputs[0]
    assert free.finish_reason == "length" and len(free.token_ids) == 16
    third = free.token_ids[2]
    at = free.token_ids.index(third)
    stopped = qwen.generate(prompt, greedy(16, stop_token_ids=[third]), use_tqdm=False)[0].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", third)
    assert stopped.token_ids == free.token_ids[: at + 1], "the stop token is in the ids"
    later = qwen.generate(prompt, greedy(16, stop_token_ids=[third], min_tokens=6), use_tqdm=False)[0].outputs[0]
    assert len(later.token_ids) >= 6
    assert third not in later.token_ids[:6], "while a stop may not happen it cannot be said"


def test_stop_strings_truncate_text_and_ids(qwen: LLM) -> None:
    prompt = chat_text("Hello")
    free = qwen.generate(prompt, greedy(24), use_tqdm=False)[0].outputs[0]
    readable = [i for i, c in enumerate(free.text) if c.isascii() and c.isprintable()]
    middle = free.text[readable[len(readable) // 2]]
    cut = qwen.generate(prompt, greedy(24, stop=middle), use_tqdm=False)[0].outputs[0]
    assert cut.text == free.text[: free.text.index(middle)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", middle)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    kept = qwen.generate(prompt, greedy(24, stop=[middle], include_stop_str_in_output=True), use_tqdm=False)[0]
    assert kept.outputs[0].text == cut.text + middle


def test_logprobs_and_prompt_logprobs(qwen: LLM) -> None:
    out = qwen.generate(MIXED[1], greedy(6, logprobs=3, prompt_logprobs=2), use_tqdm=False)[0]
    answer = out.outputs[0]
    assert len(answer.logprobs) == 6
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        assert entry[token].rank == 1, "greedy takes the likeliest"
        assert len(entry) == 3
        assert sum(np.exp(e.logprob) for e in entry.values()) < 1.0001
    assert answer.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for t, e in zip(answer.token_ids, answer.logprobs, strict=True))
    )
    assert out.prompt_logprobs[0] is None
    assert len(out.prompt_logprobs) == len(out.prompt_token_ids)
    for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True):
        assert token in entry and 2 <= len(entry) <= 3


def test_prompt_logprobs_agree_with_generation(qwen: LLM) -> None:
    """A token has the same log-probability when it is sampled and when it is in a prompt."""
    out = qwen.generate(chat_text("Hello"), greedy(8, logprobs=1), use_tqdm=False)[0]
    said = [e[t].logprob for t, e in zip(out.outputs[0].token_ids, out.outputs[0].logprobs, strict=True)]
    whole = {"prompt_token_ids": out.prompt_token_ids + list(out.outputs[0].token_ids)}
    read = qwen.generate(whole, greedy(1, prompt_logprobs=0), use_tqdm=False)[0]
    back = [e[t].logprob for t, e in zip(read.prompt_token_ids[-8:], read.prompt_logprobs[-8:], strict=True)]
    assert said == pytest.approx(back, abs=2e-4)


def test_logit_biases_reach_the_device(qwen: LLM) -> None:
    prompt = chat_text("Hello")
    free = output_ids(qwen.generate(prompt, greedy(), use_tqdm=False))[0]
    only = qwen.generate(prompt, greedy(allowed_token_ids=[9, 11]), use_tqdm=False)
    assert set(output_ids(only)[0]) <= {9, 11}
    biased = output_ids(qwen.generate(prompt, greedy(logit_bias={20: 100}), use_tqdm=False))[0]
    assert set(biased) == {20}
    banned = output_ids(qwen.generate(prompt, greedy(logit_bias={free[0]: -100}), use_tqdm=False))[0]
    assert free[0] not in banned
    together = qwen.generate(
        [prompt] * 3, [greedy(), greedy(logit_bias={20: 100}), greedy(allowed_token_ids=[9, 11])], use_tqdm=False
    )
    assert output_ids(together) == [free, biased, output_ids(only)[0]], "one row's constraint is nobody else's"


def test_penalties_change_only_their_own_row(qwen: LLM) -> None:
    prompt = chat_text("Hello")
    free = output_ids(qwen.generate(prompt, greedy(32), use_tqdm=False))[0]
    assert len(set(free)) < len(free), "something repeats, or there is nothing to penalise"
    both = qwen.generate(
        [prompt] * 2, [greedy(32), greedy(32, presence_penalty=2.0, frequency_penalty=2.0)], use_tqdm=False
    )
    assert output_ids(both)[0] == free
    assert len(set(output_ids(both)[1])) > len(set(free))


def test_bad_words_are_never_sampled(qwen: LLM) -> None:
    prompt = chat_text("Hello")
    free = qwen.generate(prompt, greedy(16), use_tqdm=False)[0].outputs[0]
    pairs = [qwen.model.tokenizer.decode(free.token_ids[i : i + 2], False) for i in range(15)]
    word = next(w for w in pairs if w.isascii() and w.strip() and len(qwen.model.tokenizer.encode(w, False)) == 2)
    out = qwen.generate([prompt, prompt], [greedy(16, bad_words=[word]), greedy(16)], use_tqdm=False)
    assert word not in out[0].outputs[0].text
    assert output_ids(out)[1] == list(free.token_ids)


def test_long_outputs_stop_at_max_model_len(qwen: LLM) -> None:
    assert qwen.model.max_model_len == 384
    out = qwen.generate({"prompt_token_ids": [5] * 360}, greedy(1000), use_tqdm=False)[0]
    assert len(out.outputs[0].token_ids) == 24
    assert out.outputs[0].finish_reason == "length"


def test_whisper_shares_encoded_audio_between_outputs(shared_llm) -> None:
    llm = shared_llm("whisper")
    rng = np.random.default_rng(0)
    clips = [(rng.standard_normal(16000 * s).astype(np.float32) * 0.1, 16000) for s in (1, 2, 3)]
    prompts = [{"prompt": "", "multi_modal_data": {"audio": clip}} for clip in clips]
    alone = [output_ids(llm.generate(p, greedy(), use_tqdm=False))[0] for p in prompts]
    encoded = llm.counters()["encoded_items"]
    assert output_ids(llm.generate(prompts, greedy(), use_tqdm=False)) == alone
    assert llm.counters()["encoded_items"] == encoded, "the pages of their cross attention were still there"
    assert len({tuple(a) for a in alone}) > 1, "the audio is heard"
    assert llm.reset_prefix_cache()
    assert output_ids(llm.generate(prompts[::-1], greedy(), use_tqdm=False)) == alone[::-1]


def test_abort_frees_everything(qwen: LLM) -> None:
    engine = qwen.model.engines[0]
    request = GenerateRequest(qwen.model, qwen.model.process(MIXED[1]), greedy(100))
    for _ in range(4):
        engine.step()
    assert engine.block_pool.num_free < engine.block_pool.num_blocks - 1
    request.abort()
    assert engine.block_pool.num_free == engine.block_pool.num_blocks - 1
    while engine.has_work:
        engine.step()
    assert request.output().outputs[0].finish_reason == "abort"
    assert output_ids(qwen.generate(MIXED[1], greedy(), use_tqdm=False))


def test_priority_orders_the_queue(make_llm) -> None:
    llm = make_llm("qwen2_vl", max_num_seqs=1)
    prompts = [chat_text(w) for w in ("a", "b", "c")]
    out = llm.generate(prompts, greedy(2), priority=[2, 0, 1], use_tqdm=False)
    order = sorted(range(3), key=lambda i: out[i].metrics.first_token_time)
    assert order == [1, 2, 0]


BAD = {
    "image without placeholder": (
        {"prompt": "hi", "multi_modal_data": {"image": random_pixels(1)}},
        ValueError,
        "image",
    ),
    "placeholder without image": (image_prompt(), ValueError, None),
    "unknown modality": ({"prompt": "hi", "multi_modal_data": {"smell": 1}}, ValueError, "Unsupported modality"),
    "no prompt": ({"nothing": 1}, TypeError, "must contain"),
    "a number": (17, TypeError, None),
    "mixed ids": ([1, "a"], TypeError, None),
    "too long": ({"prompt_token_ids": [5] * 384}, ValueError, "maximum model length of 384"),
    "empty": ({"prompt_token_ids": []}, ValueError, "cannot be empty"),
    "unknown token": ({"prompt_token_ids": [10**6]}, ValueError, "out of vocabulary"),
    "not a picture": (image_prompt("nonsense"), ValueError, None),
    "image too large for the model": (image_prompt(random_pixels(1, 1400, 1400)), ValueError, None),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_the_engine_continues(qwen: LLM, case: str, alone: list[list[int]]) -> None:
    prompt, error, words = BAD[case]
    if case == "placeholder without image":
        prompt = {"prompt": chat_text("<|vision_start|><|image_pad|><|vision_end|>?")}
    with pytest.raises(error, match=words):
        qwen.generate([MIXED[0], prompt, MIXED[1]], greedy(), use_tqdm=False)
    assert not qwen.model.engines[0].has_work
    assert output_ids(qwen.generate(MIXED[:2], greedy(), use_tqdm=False)) == alone[:2]


WRONG = [
    ("limit_mm_per_prompt", "image=2"),
    ("media_io_kwargs", ["video"]),
    ("mm_processor_kwargs", "fps=2"),
    ("tokenizer_mode", "slow"),
    ("mm_encoder_tp_mode", "tensor"),
    ("video_pruning_rate", 0.5),
]


def test_invalid_arguments(make_llm, qwen: LLM, tiny_dir) -> None:
    with pytest.raises(TypeError, match="tensor_paralel_size"):
        make_llm("qwen2_vl", tensor_paralel_size=2)
    with pytest.raises(ValueError, match="8 devices"):
        make_llm("qwen2_vl", tensor_parallel_size=8)
    with pytest.raises(ValueError, match="max_model_len"):
        make_llm("qwen2_vl", max_model_len=10**6)
    with pytest.raises(ValueError, match="kv_cache_memory_bytes"):
        make_llm("qwen2_vl", kv_cache_memory_bytes=10_000)
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        make_llm("qwen2_vl", gpu_memory_utilization=1.5)
    for name, value in WRONG:
        with pytest.raises(ValueError, match=name):
            make_llm("qwen2_vl", **{name: value})
    with pytest.raises(TypeError, match="SamplingParams, got dict"):
        qwen.generate("a", {"temperature": 0}, use_tqdm=False)
    with pytest.raises(ValueError, match="neither a model directory nor a hub id"):
        LLM("no such/model/any where")
    with pytest.raises(ValueError, match="must be the same"):
        qwen.generate(["a", "b"], [greedy()], use_tqdm=False)
    with pytest.raises(RequestError, match="at most 16"):
        qwen.generate("a", greedy(stop_token_ids=list(range(5, 40))), use_tqdm=False)
    assert qwen.generate([]) == []


def test_the_operator_limits_n(qwen: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MAX_N_SEQUENCES", "2")
    with pytest.raises(ValueError, match=r"n must be at most 2, got 3\."):
        qwen.generate("a", SamplingParams(n=3), use_tqdm=False)


def test_limits_are_checked_before_any_work(make_llm) -> None:
    llm = make_llm("qwen2_vl", limit_mm_per_prompt={"image": 1, "video": 0})
    with pytest.raises(ValueError, match=r"At most 1 image\(s\) may be provided in one prompt"):
        llm.generate(image_prompt(random_pixels(1), random_pixels(2)), greedy(), use_tqdm=False)
    assert llm.counters()["mm_cache_queries"] == 0


def test_steps_write_the_kv_cache_in_place(make_llm) -> None:
    """The compiled programs alias the whole state, need little memory beside it, and copy no array of its shape."""
    runner = make_llm("qwen2_vl", max_model_len=8192).model.engines[0].runner
    pool = runner.state.kv_cache
    shape = ",".join(map(str, pool.k.shape))
    buckets = runner.buckets
    for key in (Prefill(buckets.token_buckets[-1]), Decode(buckets.seq_buckets[-1], buckets.num_decode_steps)):
        program = runner.program(key)
        memory = program.memory_analysis()
        state = sum(
            x.nbytes
            for x in (pool.k, pool.v, runner.state.mm_embeds, runner.state.token_counts, runner.state.logit_bias)
        )
        assert memory.alias_size_in_bytes >= state
        assert memory.temp_size_in_bytes < pool.k.nbytes / 10
        copies = re.findall(rf"= f32\[{shape}\]\S* (?:copy|transpose|convert)\(.*", program.as_text())
        assert not copies, copies


def test_the_largest_programs_serve_while_smaller_ones_are_compiled(make_llm, qwen, monkeypatch) -> None:
    prompts = [chat_text("Hello"), image_prompt(random_pixels(1)), chat_text("Who are you?")]
    compiled, may_go_on = ModelRunner._compile, threading.Event()
    llm = make_llm("qwen2_vl")
    runner = llm.model.engines[0].runner

    def compile_later(self: ModelRunner, key: ProgramKey) -> object:
        assert self._is_largest(key) or may_go_on.wait(60)
        return compiled(self, key)

    expected = output_ids(qwen.generate(prompts, greedy(4), use_tqdm=False))
    monkeypatch.setattr(ModelRunner, "_compile", compile_later)
    runner.warm_up(lambda items, total: items, behind=True)
    assert [len(sizes) for sizes in (runner.ready.token_buckets, runner.ready.seq_buckets)] == [1, 1]
    assert runner.ready.seq_buckets[-1] == runner.buckets.seq_buckets[-1] > runner.buckets.seq_buckets[0]
    assert output_ids(llm.generate(prompts, greedy(4), use_tqdm=False)) == expected and not runner.warm
    may_go_on.set()
    runner._compiling_behind.join(60)
    assert runner.ready == runner.buckets and runner.warm
    assert output_ids(llm.generate(prompts, greedy(4), use_tqdm=False)) == expected
    assert llm.counters()["compiles_after_warmup"] == 0


def test_nothing_compiles_after_warm_up(make_llm, compiles) -> None:
    llm = make_llm("qwen2_vl", enforce_eager=False, max_num_seqs=2, max_model_len=256, max_num_batched_tokens=128)
    warm = compiles.count
    sizes = [(28, 28), (30, 200), (56, 57), (101, 33), (224, 224), (280, 140), (29, 280)]
    rich = SamplingParams(
        temperature=0.9, top_p=0.9, top_k=20, min_p=0.01, presence_penalty=0.5, repetition_penalty=1.1, seed=3,
        max_tokens=20, logprobs=5, prompt_logprobs=2, logit_bias={7: 1.0}, stop=["zzz"], bad_words=["bad word"], n=2,
    )  # fmt: skip
    params = [rich if i % 2 else greedy(9) for i in range(len(sizes))]
    llm.generate([image_prompt(random_pixels(i, *size)) for i, size in enumerate(sizes)], params, use_tqdm=False)
    llm.generate(MIXED, dataclasses.replace(rich, n=1), use_tqdm=False)
    assert compiles.count == warm
    assert llm.counters()["compiles_after_warmup"] == 0
