"""Phi-3.5-vision and VLM2Vec: the reference checkpoint, long and short rope, crops across chunks and devices."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_inputs import greedy, output_ids
from input_processors import make_input_processor
from mmjax import LLM
from mmjax.nn.rope import Rope
from models.bare_model import Bare
from models.questions import QUESTIONS
from models.tables import answer_table, close, log_softmax, prompt_table
from models.test_recorded import RECORDED

FEATURES, LOGITS, VECTORS = 1e-4, 2e-4, 1e-5
NEW, BLOCK_SIZE = 16, 16
EMBEDDED = ("embed_text", "embed_image", "embed_image_text")


@pytest.fixture(scope="module")
def directory(shared: Path) -> Path:
    return shared / "reference/phi3v"


@functools.cache
def golden(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """(arrays, prompts as a caller writes them) of the stored cases."""
    arrays = dict(np.load(directory / "golden.npz"))
    prompts = {}
    for case, told in json.loads((directory / "golden.json").read_text())["cases"].items():
        images = [value for name, value in arrays.items() if name.startswith(f"{case}/raw_image")]
        prompts[case] = {"prompt": told["prompt"], "multi_modal_data": {"image": images} if images else {}}
    return arrays, prompts


# Up to 1024 tokens, the original length, the short factors are in force; an engine for more takes the long ones.
@pytest.mark.parametrize(
    ("longest", "cases"), [(1024, ("text", "image", "image_tall")), (2048, ("two_images_longrope",))]
)
def test_goldens_in_chunks_that_cut_images(longest: int, cases: tuple[str, ...], directory: Path) -> None:
    arrays, prompts = golden(directory)
    options = {"max_num_seqs": 3, "max_num_batched_tokens": 256, "max_logprobs": -1, "enforce_eager": True}
    llm = LLM(str(directory), max_model_len=longest, **options)
    params = greedy(NEW, logprobs=-1, prompt_logprobs=-1)
    outputs = llm.generate([prompts[case] for case in cases], params, use_tqdm=False)
    for case, output in zip(cases, outputs, strict=True):
        assert output.prompt_token_ids == arrays[f"{case}/input_ids"].tolist()
        assert output_ids([output]) == [arrays[f"{case}/gen_ids"].tolist()], case
        close(answer_table(output), log_softmax(arrays[f"{case}/gen_logits"]), LOGITS, case)
        kept = prompt_table(output)[int(arrays[f"{case}/logits_offset"]) :]
        close(kept, log_softmax(arrays[f"{case}/logits"])[:-1], LOGITS, case)


def test_image_features(directory: Path) -> None:
    """Of one image, and of two in one prompt."""
    arrays, prompts = golden(directory)
    renderer, model = make_input_processor("phi3_v", directory), Bare(directory, tokens=32, num_inputs=8)
    for case in ("image", "image_tall", "two_images_longrope"):
        rendered = renderer.process(renderer.parse(prompts[case]))
        assert rendered.token_ids.tolist() == arrays[f"{case}/input_ids"].tolist()
        embeds = model.encode([entry.item for entry in rendered.items])
        close(embeds, arrays[f"{case}/image_features"], FEATURES, case)


def test_vectors_of_vlm2vec(directory: Path) -> None:
    arrays, prompts = golden(directory)
    llm = LLM(
        str(directory),
        runner="pooling",
        max_model_len=1024,
        max_num_seqs=3,
        max_num_batched_tokens=256,
        enforce_eager=True,
    )
    for _ in range(2):  # the second time most of each prompt is in the prefix cache
        outputs = llm.embed([prompts[case] for case in EMBEDDED], use_tqdm=False)
        for case, output in zip(EMBEDDED, outputs, strict=True):
            assert output.prompt_token_ids == arrays[f"{case}/input_ids"].tolist()
            close(np.array(output.outputs.embedding), arrays[f"{case}/embedding"], VECTORS, case)
    assert outputs[1].num_cached_tokens == 768


@pytest.mark.usefixtures("one_decode_size")
def test_devices_chunks_and_prefixes_give_the_recorded_outputs(tiny_dir: Callable[[str], Path]) -> None:
    """All prompts at once, text among images; then again, when all but the last block of each is cached."""
    options = {"max_model_len": 384, "max_num_seqs": 4, "max_num_batched_tokens": 32, "num_decode_steps": 4}
    llm = LLM(str(tiny_dir("phi3_v")), **options, block_size=BLOCK_SIZE, tensor_parallel_size=2, enforce_eager=True)
    asked = [make() for make in QUESTIONS["phi3_v"].values()]
    wanted = [RECORDED["phi3_v"][case]["ids"] for case in QUESTIONS["phi3_v"]]
    assert output_ids(llm.generate(asked, greedy(12), use_tqdm=False)) == wanted
    again = llm.generate(asked, greedy(12), use_tqdm=False)
    assert output_ids(again) == wanted
    for output in again:
        assert output.num_cached_tokens == (len(output.prompt_token_ids or ()) - 1) // BLOCK_SIZE * BLOCK_SIZE
    expanded = [
        {**question, "prompt_token_ids": output.prompt_token_ids}
        for case, question, output in zip(QUESTIONS["phi3_v"], asked, again, strict=True)
        if case != "crossed_images"  # ids say where images stand, not which
    ]
    found = output_ids(llm.generate(expanded, greedy(12), use_tqdm=False))
    assert found == [answer for case, answer in zip(QUESTIONS["phi3_v"], wanted, strict=True) if case[:2] != "cr"]


def test_generic_placeholders_are_numbered(tiny_dir: Callable[[str], Path]) -> None:
    renderer = make_input_processor("phi3_v", tiny_dir("phi3_v"))
    question = QUESTIONS["phi3_v"]["two_images"]()
    usual = renderer.process(renderer.parse(question))
    words = question["prompt"].replace("<|image_1|>", "<image>").replace("<|image_2|>", "<image>")
    other = renderer.process(renderer.parse(question | {"prompt": words}))
    np.testing.assert_array_equal(usual.token_ids, other.token_ids)
    assert usual.spans == other.spans


def test_which_frequencies_apply() -> None:
    scaling: dict[str, object] = {
        "type": "su",
        "short_factor": [1.0, 2.0],
        "long_factor": [4.0, 8.0],
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
    }
    rope = Rope.from_hf(4, 10000.0, scaling)
    assert rope.attention_factor == pytest.approx(1.1902, abs=1e-4)
    np.testing.assert_allclose(rope.for_max_len(4096).inv_freq, [1, 0.01 / 2], rtol=1e-6)
    for long in (rope, rope.for_max_len(4097)):
        np.testing.assert_allclose(long.inv_freq, [1 / 4, 0.01 / 8], rtol=1e-6)
    assert Rope.from_hf(4, 10000.0, scaling | {"original_max_position_embeddings": 131072}).attention_factor == 1.0
