"""The Omni families: on two devices, and with those goldens whose media transformers prepares otherwise.

It resizes clips with torchvision, which now and then differs from PIL by a grey level or two. And it pads sounds passed
together to the longest: the last frame of a shorter one then borders on silence instead of being mirrored, and a clip
shorter than a chunk is convolved with silence behind it. Here the model is given what transformers made.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_inputs import greedy, output_ids
from input_processors import make_input_processor, read_files
from mmjax import LLM
from mmjax.inputs.input_processor import HashedItem
from mmjax.processors.base import MediaItem
from models.bare_model import Bare
from models.questions import QUESTIONS
from models.tables import close
from models.test_goldens import APART, FEATURES, LOGITS, load
from models.test_recorded import RECORDED

CASES = [(family, case) for family, cases in APART.items() for case in cases if "omni" in family]


def as_stored(
    item: MediaItem, case: str, index: int, arrays: dict[str, np.ndarray], files: dict[str, Any]
) -> MediaItem:
    """The item with the pixels or frames of transformers' processor."""
    features = dict(item.features)
    if item.modality == "audio":
        mel = features["mel"]
        num_frames = int(features["audio_frames"].sum())
        stored = np.zeros((mel.shape[0] * mel.shape[1], mel.shape[2]), np.float32)
        stored[:num_frames] = arrays[f"{case}/input_features"][index].T[:num_frames]
        features |= {"mel": stored.reshape(mel.shape), "num_frames": np.full(len(mel), mel.shape[1], np.int32)}
    elif item.modality == "video":
        prepare, pixels = files["preprocessor_config.json"], arrays[f"{case}/pixel_values_videos"]
        mean, std = (np.asarray(prepare[f"image_{name}"], np.float32)[:, None] for name in ("mean", "std"))
        exact = (pixels.reshape(len(pixels), 3, -1) * std + mean) * 255
        grey = np.round(exact).astype(np.uint8).reshape(pixels.shape)
        np.testing.assert_allclose(grey.reshape(exact.shape), exact, atol=0.01)
        if "embed_order" in features:  # windows have moved them
            moved = np.empty_like(grey)
            moved[(features["embed_order"][:, None] + np.arange(4)).reshape(-1)] = grey
            grey = moved
        apart = np.abs(grey.astype(int) - features["pixels"])
        assert apart.max() <= 2 and apart.mean() < 0.01
        features["pixels"] = grey
    return dataclasses.replace(item, features=features)


@pytest.mark.parametrize(("family", "case"), CASES)
def test_stored_media_give_the_stored_logits(shared: Path, family: str, case: str) -> None:
    golden = load(shared / "reference" / family)
    arrays, files = golden.arrays, read_files(golden.directory)
    media: dict[str, list[np.ndarray]] = {}
    for name, value in arrays.items():
        if name.startswith(f"{case}/raw_"):
            media.setdefault(name.split("_")[-2], []).append(value)
    renderer = make_input_processor(family, golden.directory)
    rendered = renderer.process(renderer.parse({"prompt": golden.prompts_apart[case], "multi_modal_data": media}))
    assert rendered.token_ids.tolist() == golden.prompt_ids(case)
    np.testing.assert_array_equal(rendered.rope_positions, arrays[f"{case}/position_ids"])

    items = [
        HashedItem(entry.modality, entry.item_hash, as_stored(entry.item, case, span.item_index, arrays, files))
        for span, entry in zip(rendered.spans, rendered.items, strict=True)
    ]
    model = Bare(golden.directory, tokens=192, num_inputs={"vision": 560, "audio": 8})
    for kind in media:
        wanted = arrays[f"{case}/{kind}_features"]
        close(model.encode([entry.item for entry in items])[:, : wanted.shape[1]], wanted, FEATURES, kind)
    logits = model.logits(dataclasses.replace(rendered, items=items))
    close(logits, arrays[f"{case}/logits"], LOGITS, case)


def test_two_devices_and_cached_prefixes_give_the_recorded_outputs(tiny_dir: Callable[[str], Path]) -> None:
    """Sharded heads and experts. The second time, frames and audio come from the prefix cache; with other audio, the
    same frames do not."""
    options = {"max_model_len": 384, "max_num_seqs": 1, "max_num_batched_tokens": 128, "num_decode_steps": 4}
    llm = LLM(str(tiny_dir("qwen3_omni_moe")), tensor_parallel_size=2, enforce_eager=True, **options)
    question = QUESTIONS["qwen3_omni_moe"]["sound_of_video"]()
    for attempt in range(2):
        output = llm.generate(question, greedy(12), use_tqdm=False)[0]
        assert output_ids([output]) == [RECORDED["qwen3_omni_moe"]["sound_of_video"]["ids"]]
        assert bool(output.num_cached_tokens) == bool(attempt)
    media = question["multi_modal_data"]
    other = question | {"multi_modal_data": media | {"audio": [media["audio"][0][::-1]]}}
    fresh, again = (llm.generate(other, greedy(12), use_tqdm=False)[0] for _ in range(2))
    assert output_ids([fresh]) == output_ids([again]) and (fresh.num_cached_tokens or 0) < (
        again.num_cached_tokens or 0
    )
