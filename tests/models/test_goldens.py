"""The reference checkpoints against outputs of PyTorch: encoders, logits, greedy completions.

The answers are asked for in one batch, one by one, and in chunks that cut images, videos and text wherever they fall.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest

from engine_inputs import greedy, output_ids
from input_processors import load_processor, make_input_processor
from mmjax import LLM
from mmjax.types import RequestOutput
from models.bare_model import Bare
from models.tables import answer_table, close, log_softmax, prompt_table

FAMILIES = (
    "whisper",
    "whisper_turbo",
    "llava",
    "qwen2_vl",
    "llava_onevision",
    "minicpmv26",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen2_5_omni",
    "qwen3_omni_moe",
    "qwen2_audio",
    "ultravox",
)
BARE: dict[str, tuple[int, int | dict[str, int]]] = {  # tokens and encoder inputs of the largest case
    "whisper": (128, 1),
    "whisper_turbo": (64, 1),
    "llava": (128, 2),
    "qwen2_vl": (128, 168),
    "qwen2_5_vl": (128, 272),
    "qwen3_vl": (128, 88),
    "qwen3_vl_moe": (128, 88),
    "llava_onevision": (288, 17),
    "minicpmv26": (256, 704),
    "qwen2_5_omni": (192, {"vision": 176, "audio": 16}),
    "qwen3_omni_moe": (128, {"vision": 160, "audio": 8}),
    "qwen2_audio": (160, 4),
    "ultravox": (64, 5),
}
# Cases that transformers prepares otherwise: see test_omni.py and test_clips.py.
APART = {"qwen2_5_omni": ("video",), "qwen3_omni_moe": ("video", "two_audios"), "ultravox": ("two_audios",)}
FEATURES, LOGITS = 1e-4, 2e-4
# The stored logits are 1.5e-4 off what float64 gives; ours, to the other side, 1.0e-4 on a processor with AVX-512 and
# 1.8e-4 on one without. Nearly all of it comes from the tower: its rows are 2e-5 off, and torch's 1.6e-5.
NOISY = {"qwen2_5_vl": 4e-4}
KINDS = [("encoder_hidden", "audio"), *((f"{kind}_features", kind) for kind in ("image", "video", "audio"))]
NEW = 16  # tokens of each golden answer
MADE_WITH = "13.0.0"
PILLOW = "" if PIL.__version__ == MADE_WITH else f" (made with Pillow {MADE_WITH}; this is Pillow {PIL.__version__})"


class Golden:
    """The stored cases of one family: prompts as a caller writes them, and the expected outputs."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.family = directory, directory.name
        self.arrays = dict(np.load(directory / "golden.npz"))
        cases = json.loads((directory / "golden.json").read_text())["cases"]
        self.texts = {name: case["prompt"] for name, case in cases.items()}
        self.prompts_apart = {name: self.texts.pop(name) for name in APART.get(self.family, ())}
        self.kwargs: dict[str, dict[str, Any]] = {
            name: {"vision_aspect_ratio": "pad"} for name, case in cases.items() if case.get("nested_images")
        }
        self.kwargs |= {name: case["proc_kwargs"] for name, case in cases.items() if case.get("proc_kwargs")}
        self.rates = {name: case["video_fps"] for name, case in cases.items() if case.get("video_fps")}
        if self.family.startswith("qwen3_vl"):
            wrapped = [name for name in self.rates if not cases[name]["outer_wrapper_dropped"]]
            self.kwargs |= {name: {"keep_video_wrapper": True} for name in wrapped}

    def prompt(self, case: str) -> dict[str, Any]:
        """Text and raw media."""
        media: dict[str, list[np.ndarray]] = {}
        for name, value in self.arrays.items():
            if name.startswith(f"{case}/raw_"):
                kind = name.split("_")[-2]
                media.setdefault(kind, []).append(self.timed(case, value) if kind == "video" else value)
        kwargs = {"mm_processor_kwargs": self.kwargs[case]} if case in self.kwargs else {}
        return {"prompt": self.texts[case], "multi_modal_data": media, **kwargs}

    def timed(self, case: str, frames: np.ndarray) -> Any:
        """A clip with its metadata, where a case says how many frames a second has."""
        if case not in self.rates:
            return frames
        count = len(frames)
        known = {"fps": self.rates[case], "total_num_frames": count, "frames_indices": list(range(count))}
        return frames, known | {"duration": count / self.rates[case], "do_sample_frames": False}

    @property
    def prompts(self) -> list[dict[str, Any]]:
        return [self.prompt(case) for case in self.texts]

    def prompt_ids(self, case: str) -> list[int]:
        """The expanded prompt."""
        found: list[int] = self.arrays[f"{case}/{'decoder_' * self.family.startswith('whisper')}input_ids"].tolist()
        return found

    def check_prompt(self, case: str, output: RequestOutput) -> None:
        """The prompt's ids and, at each but the first, the whole distribution."""
        assert output.prompt_token_ids == self.prompt_ids(case)
        if len(self.prompt_ids(case)) > 1:
            close(prompt_table(output), log_softmax(self.arrays[f"{case}/logits"])[:-1], self.allowed, case + PILLOW)

    @property
    def allowed(self) -> float:
        return NOISY.get(self.family, LOGITS)

    def check_answer(self, case: str, output: RequestOutput) -> None:
        """The greedy ids and the whole distribution at each."""
        assert output_ids([output]) == [self.arrays[f"{case}/gen_ids"].tolist()], case + PILLOW
        close(answer_table(output), log_softmax(self.arrays[f"{case}/gen_logits"]), self.allowed, case)


@functools.cache
def load(directory: Path) -> Golden:
    return Golden(directory)


@pytest.fixture(params=FAMILIES)
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    return load(shared / "reference" / request.param)


def test_encoder_features_and_raw_logits_of_the_bare_model(golden: Golden) -> None:
    renderer = make_input_processor(golden.family, golden.directory)
    tokens, num_inputs = BARE[golden.family]
    model = Bare(golden.directory, tokens=tokens, num_inputs=num_inputs)
    for case in golden.texts:
        rendered = renderer.process(renderer.parse(golden.prompt(case)))
        assert rendered.token_ids.tolist() == golden.prompt_ids(case)
        if f"{case}/position_ids" in golden.arrays:
            np.testing.assert_array_equal(rendered.rope_positions, golden.arrays[f"{case}/position_ids"], case)
            assert rendered.rope_delta == golden.arrays[f"{case}/rope_delta"]
        for name, kind in KINDS:
            if f"{case}/{name}" in golden.arrays:
                items = {entry.item_hash: entry.item for entry in rendered.items if entry.modality == kind}  # each once
                rows = model.encode(list(items.values()))
                wanted = golden.arrays[f"{case}/{name}"]
                wanted = wanted.reshape(-1, wanted.shape[-1])
                deepstack = [key for key in golden.arrays if key.startswith(f"{case}/{kind}_deepstack_")]
                wanted = np.concatenate([wanted, *(golden.arrays[key] for key in sorted(deepstack))], axis=1)
                rows = rows[:, : wanted.shape[1]] if kind == "audio" else rows  # audio has none
                close(rows, wanted, FEATURES, f"{case}/{name}")
        close(model.logits(rendered), golden.arrays[f"{case}/logits"], golden.allowed, case)


def test_all_cases_in_one_batch(golden: Golden, reference_llm: Callable[..., LLM]) -> None:
    params = greedy(NEW, logprobs=-1, prompt_logprobs=-1)
    outputs = reference_llm(golden.family).generate(golden.prompts, params, use_tqdm=False)
    for case, output in zip(golden.texts, outputs, strict=True):
        golden.check_prompt(case, output)
        golden.check_answer(case, output)


def test_each_case_alone(golden: Golden, reference_llm: Callable[..., LLM]) -> None:
    llm = reference_llm(golden.family)
    for case in golden.texts:
        llm.reset_mm_cache()
        output = llm.generate(golden.prompt(case), greedy(1, prompt_logprobs=-1), use_tqdm=False)[0]
        golden.check_prompt(case, output)
        assert output_ids([output])[0][0] == golden.arrays[f"{case}/gen_ids"][0]


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "llava_onevision",
        "minicpmv26",
        "qwen2_5_omni",
        "qwen3_omni_moe",
        "qwen2_audio",
        "ultravox",
    ],
)
def test_chunks_of_32_tokens_end_inside_images(
    family: str, shared: Path, reference_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load(shared / "reference" / family)
    llm = reference_llm(family)
    llm.reset_mm_cache()
    [engine] = llm.model.engines
    small = dataclasses.replace(engine.scheduler.config, max_num_batched_tokens=32)  # in the same, padded, programs
    monkeypatch.setattr(engine.scheduler, "config", small)
    outputs = llm.generate(golden.prompts, greedy(NEW, logprobs=-1, prompt_logprobs=-1), use_tqdm=False)
    for case, output in zip(golden.texts, outputs, strict=True):
        golden.check_prompt(case, output)
        golden.check_answer(case, output)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_goldens_have_an_image_across_token_32(family: str, shared: Path) -> None:
    """Otherwise no image would be cut by chunks of 32 tokens."""
    golden = load(shared / "reference" / family)
    processor, tokenizer = load_processor(family, golden.directory)
    marker = tokenizer.id_of(processor.placeholder_token["image"])
    assert any(golden.prompt_ids(case)[31:33] == [marker, marker] for case in golden.texts)


@pytest.mark.parametrize(
    "family",
    [
        "llava",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "llava_onevision",
        "minicpmv26",
        "qwen2_5_omni",
        "qwen3_omni_moe",
        "qwen2_audio",
        "ultravox",
    ],
)
def test_expanded_token_ids_are_the_same_prompt(family: str, shared: Path, reference_llm: Callable[..., LLM]) -> None:
    golden, llm = load(shared / "reference" / family), reference_llm(family)
    prompts = [
        {"prompt_token_ids": golden.prompt_ids(case)} | {k: v for k, v in golden.prompt(case).items() if k != "prompt"}
        for case in golden.texts
    ]
    outputs = llm.generate(prompts, greedy(NEW), use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [golden.prompt_ids(case) for case in golden.texts]
    assert output_ids(outputs) == [golden.arrays[f"{case}/gen_ids"].tolist() for case in golden.texts]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl_moe"])
def test_a_second_time_from_the_caches(family: str, shared: Path, reference_llm: Callable[..., LLM]) -> None:
    """The prefix cache finds blocks of a prompt that ends inside an item, with its DeepStack embeddings added."""
    golden, llm = load(shared / "reference" / family), reference_llm(family)
    first = llm.generate(golden.prompts, greedy(NEW), use_tqdm=False)
    again = llm.generate(golden.prompts, greedy(NEW), use_tqdm=False)
    assert all((output.num_cached_tokens or 0) >= 16 for output in again)
    assert (
        output_ids(again) == output_ids(first) == [golden.arrays[f"{case}/gen_ids"].tolist() for case in golden.texts]
    )


def test_embeds_of_all_levels_instead_of_media(shared: Path, reference_llm: Callable[..., LLM]) -> None:
    """Embeddings are those of the last layer and of the inner layers, side by side."""
    golden, llm = load(shared / "reference/qwen3_vl_moe"), reference_llm("qwen3_vl_moe")
    for case, kind in (("image", "image"), ("video_v457_prompt", "video")):
        names = [f"{case}/{kind}_features", *(f"{case}/{kind}_deepstack_{level}" for level in range(3))]
        rows = np.concatenate([golden.arrays[name] for name in names], axis=1)
        embeds = {f"{kind}_embeds": rows, f"{kind}_grid_thw": golden.arrays[f"{case}/{kind}_grid_thw"]}
        asked = {"prompt": golden.texts[case], "multi_modal_data": {kind: embeds}}
        output = llm.generate(asked, greedy(NEW, logprobs=-1, prompt_logprobs=-1), use_tqdm=False)[0]
        golden.check_prompt(case, output)
        golden.check_answer(case, output)
