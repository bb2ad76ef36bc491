"""One, two or four devices, and one or two replicas, give the same tokens."""

import jax
import numpy as np
import pytest

from engine_inputs import chat_text, greedy, image_prompt, output_ids, random_pixels
from mmjax import LLM
from mmjax.engine.hlo import collectives
from mmjax.engine.programs import Decode, Prefill
from mmjax.loader.params import ParamSpec, fit_to_mesh

QWEN = [
    chat_text("Hello, who are you?"),
    image_prompt(random_pixels(1)),
    image_prompt(random_pixels(2, 120, 40), random_pixels(3, 28, 28)),
]
SOUND = (np.random.default_rng(0).standard_normal(32000).astype(np.float32) * 0.1, 16000)
WHISPER = [{"prompt": "", "multi_modal_data": {"audio": SOUND}}]
LLAVA = [
    {"prompt": "USER: <image>\nWhat? ASSISTANT:", "multi_modal_data": {"image": random_pixels(1)}},
    "USER: Hi ASSISTANT:",
]


@pytest.fixture(scope="module")
def one_device(shared_llm) -> dict[str, list[list[int]]]:
    prompts = {"qwen2_vl": QWEN, "qwen3_vl_moe": QWEN, "whisper": WHISPER, "llava": LLAVA}
    return {
        family: output_ids(shared_llm(family).generate(p, greedy(), use_tqdm=False)) for family, p in prompts.items()
    }


# Two devices split the heads, four also repeat (Qwen2-VL) or pad them.
@pytest.mark.usefixtures("one_decode_size")
@pytest.mark.parametrize(
    ("family", "prompts", "ways"),
    [
        ("qwen2_vl", QWEN, 2),
        ("qwen2_vl", QWEN, 4),
        ("qwen3_vl_moe", QWEN, 4),  # six experts
        ("whisper", WHISPER, 4),
        ("llava", LLAVA, 2),
    ],
)
def test_tensor_parallel_is_token_exact(make_llm, one_device, family: str, prompts: list, ways: int) -> None:
    llm: LLM = make_llm(family, tensor_parallel_size=ways)
    assert output_ids(llm.generate(prompts, greedy(), use_tqdm=False)) == one_device[family]
    runner = llm.model.engines[0].runner
    kinds = {s.data.shape[1] for s in runner.state.kv_cache.k.addressable_shards}
    assert kinds == {runner.spec.num_kv_heads // ways}, "each device holds its own heads only"
    assert len(runner.state.kv_cache.k.devices()) == ways


@pytest.mark.usefixtures("one_decode_size")
def test_data_parallel_replicas_share_the_work(make_llm, one_device) -> None:
    llm: LLM = make_llm("qwen2_vl", data_parallel_size=2, tensor_parallel_size=2)
    assert output_ids(llm.generate(QWEN, greedy(), use_tqdm=False)) == one_device["qwen2_vl"]
    first, second = llm.model.engines
    assert first.stats.output_tokens > 0 and second.stats.output_tokens > 0
    assert not set(first.runner.state.kv_cache.k.devices()) & set(second.runner.state.kv_cache.k.devices())


def test_there_are_four_devices() -> None:
    assert len(jax.devices()) >= 4, "conftest asks for them"


def test_fit_assigns_query_heads_to_copies_of_their_keys() -> None:
    """Two kv heads of four queries each on four devices: every query still attends to its own keys."""
    d, k, g, h = 3, 2, 4, 5
    value = np.random.default_rng(0).standard_normal((d, k, g + 2, h)).astype(np.float32)
    axes = ("embed", "kv_heads", "group_kv", "head_dim")
    out = fit_to_mesh(value, ParamSpec((d, k, g + 2, h), axes), ParamSpec((d, 4, 2 + 2, h), axes))
    for head in range(4):
        source = head // 2
        queries = value[:, source, (head % 2) * 2 : (head % 2) * 2 + 2]
        np.testing.assert_array_equal(out[:, head, :2], queries)
        np.testing.assert_array_equal(out[:, head, 2:], value[:, source, g:])


def test_fit_pads_with_zeros() -> None:
    leaf = ParamSpec((6, 4), ("vocab", "embed"))
    out = fit_to_mesh(np.ones((6, 4), np.float32), leaf, ParamSpec((8, 4), leaf.axes))
    assert out[:6].all() and not out[6:].any()


def test_no_program_gathers_a_weight(make_llm) -> None:
    """The programs that the tests above compiled: what devices gather is as small as activations and logits."""
    for family in ("qwen2_vl", "whisper", "qwen3_vl_moe"):
        runner = make_llm(family, tensor_parallel_size=4).model.engines[0].runner
        weights = {leaf.shape for leaf in jax.tree.leaves(runner.params) if leaf.ndim > 1 and leaf.size > 2048}
        for key in (Decode(4, 4), Prefill(128)):
            exchanged = collectives(runner.program(key).as_text())
            gathered = {each.shape for each in (*exchanged.once, *exchanged.per_iteration) if each.kind == "all-gather"}
            assert not gathered & weights, (family, key)
