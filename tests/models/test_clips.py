"""Families that encode clips in chunks: on two devices, cut into chunks, packed with others; and the packed clips of
Ultravox.

The published processor of Ultravox pads clips that are passed together to the longest, which changes what the model
makes of the shorter ones a little, so that a clip's embeddings depend on the others. Ours encodes each alone. Here the
model is given what the published processor made.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_inputs import greedy, output_ids
from input_processors import make_input_processor
from mmjax import LLM
from mmjax.inputs.input_processor import HashedItem
from mmjax.processors import whisper_chunks
from mmjax.processors.base import MediaItem
from mmjax.spec import conv_length
from models.bare_model import Bare
from models.questions import QUESTIONS, sound
from models.tables import close
from models.test_goldens import APART, FEATURES, LOGITS, NEW, load
from models.test_recorded import RECORDED

FAMILIES = ("qwen2_audio", "ultravox")


def as_stored(item: MediaItem, mel: np.ndarray) -> MediaItem:
    """The item with the frames that the published processor made of it, silence after the audio included."""
    audio_steps = int(item.features["audio_steps"].sum())
    features = whisper_chunks.split_window(
        mel, audio_steps, min(-(-audio_steps // 8) * 8, conv_length(mel.shape[1])), 0
    )
    num_steps = np.full(item.num_embeds, 8, np.int32)
    num_steps[-1] = min(8, int(features["output_steps"].sum()) - 8 * (item.num_embeds - 1))
    return dataclasses.replace(
        item, features=features | {"step_index": item.features["step_index"], "num_steps": num_steps}
    )


def test_packed_clips_match_the_published_processor(shared: Path) -> None:
    golden = load(shared / "reference/ultravox")
    [case] = APART["ultravox"]
    audio = [golden.arrays[f"{case}/raw_audio_{index}"] for index in range(2)]
    prompt = {"prompt": golden.prompts_apart[case], "multi_modal_data": {"audio": audio}}
    renderer = make_input_processor("ultravox", golden.directory)
    rendered = renderer.process(renderer.parse(prompt))
    assert rendered.token_ids.tolist() == golden.prompt_ids(case)

    stored = golden.arrays[f"{case}/audio_values"]
    items = [
        HashedItem(entry.modality, entry.item_hash, as_stored(entry.item, mel))
        for entry, mel in zip(rendered.items, stored, strict=True)
    ]
    model = Bare(golden.directory, tokens=64, num_inputs=2)
    wanted = golden.arrays[f"{case}/audio_features"]
    close(model.encode([entry.item for entry in items]), wanted, FEATURES, case)
    close(model.logits(dataclasses.replace(rendered, items=items)), golden.arrays[f"{case}/logits"], LOGITS, case)
    longest = rendered.items[0].item
    close(model.encode([longest]), wanted[: longest.num_embeds], FEATURES, "the longest, alone")


def test_stored_embeds_instead_of_clips(shared: Path, reference_llm: Callable[..., LLM]) -> None:
    """Embeddings instead of clips, for the same case; and a clip and embeddings in one prompt."""
    golden = load(shared / "reference/ultravox")
    [case] = APART["ultravox"]
    arrays, llm = golden.arrays, reference_llm("ultravox", enable_mm_embeds=True)
    counts = arrays[f"{case}/audio_token_len"]
    rows = np.split(arrays[f"{case}/audio_features"], np.cumsum(counts)[:-1])
    prompt = {"prompt": golden.prompts_apart[case], "multi_modal_data": {"audio": list(rows)}}
    output = llm.generate(prompt, greedy(NEW, logprobs=-1), use_tqdm=False)[0]
    golden.check_answer(case, output)
    assert output.prompt_token_ids == golden.prompt_ids(case)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_devices_chunks_and_prefixes_give_the_recorded_outputs(
    family: str, tiny_dir: Callable[[str], Path]
) -> None:
    """Prompts are cut into chunks of 32 tokens, inside clips; the second time, prefixes come from the cache."""
    llm = LLM(
        str(tiny_dir(family)),
        tensor_parallel_size=2,
        max_model_len=384,
        block_size=16,
        max_num_seqs=1,
        max_num_batched_tokens=32,
        enforce_eager=True,
    )
    cases = ("text", "sounds")
    asked = [QUESTIONS[family][case]() for case in cases]
    wanted = [RECORDED[family][case]["ids"] for case in cases]
    first = llm.generate(asked, greedy(12), use_tqdm=False)
    encoded = llm.counters()["encoded_items"]
    llm.model.input_processor.cache.clear()
    again = llm.generate(asked, greedy(12), use_tqdm=False)
    assert output_ids(first) == output_ids(again) == wanted
    lengths = [len(RECORDED[family][case]["prompt_ids"]) for case in cases]
    assert [output.num_cached_tokens for output in again] == [(n - 1) // 16 * 16 for n in lengths]
    assert llm.counters()["encoded_items"] <= encoded + 1, "clips that end in a block's last tokens are encoded again"


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_items_equal_single_items(family: str, tiny_dir: Callable[[str], Path]) -> None:
    """Whatever clips are packed with a clip, and wherever it is in the batch."""
    renderer = make_input_processor(family, tiny_dir(family))
    items: list[MediaItem] = [
        renderer.processor.process_item("audio", sound(seed, seconds), {})  # type: ignore[union-attr]
        for seed, seconds in ((1, 0.9), (2, 0.03), (3, 1.92), (4, 3.3), (5, 0.03))
    ]
    model = Bare(tiny_dir(family), tokens=32, num_inputs=12)
    alone: list[Any] = [model.encode([item]) for item in items]
    close(model.encode(items), np.concatenate(alone), 2e-5, family)
    close(model.encode(items[::-1]), np.concatenate(alone[::-1]), 2e-5, family)
