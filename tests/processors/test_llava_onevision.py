"""LLaVA-OneVision: crops, margins, embeddings and the patches that they are made from."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from input_processors import read_files
from mmjax.multimodal.video import Video
from mmjax.processors.llava_onevision import Processor, resized_patches
from mmjax.types import RequestError

Make = Callable[[str], Path]


@pytest.fixture
def files(tiny_dir: Make) -> dict[str, dict[str, Any]]:
    return read_files(tiny_dir("llava_onevision"))


@pytest.fixture
def small(files: dict[str, dict[str, Any]]) -> Processor:
    return Processor(files["config.json"], files, None)


@pytest.fixture
def full(files: dict[str, dict[str, Any]]) -> Processor:
    """Of the published size: crops of 384, up to six by six."""
    files = copy.deepcopy(files)
    config, edges = files["config.json"], range(384, 2305, 384)
    config["vision_config"]["image_size"] = 384
    config["image_grid_pinpoints"] = [[height, width] for height in edges for width in edges]
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        files[name] |= {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": config["image_grid_pinpoints"]}
    return Processor(config, files, None)


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        ((384, 384), 729 + 27 * 28),
        ((876, 1300), 729 + 73 * 109),  # 3 by 4 crops, less lines of margin, just not scaled down
        ((2304, 2304), 729 + 81 * 82),  # 6 by 6 crops, scaled down to nine
        ((10, 4000), 729 + 1 * 163),
        ((1, 1), 729 + 27 * 28),
    ],
)
def test_token_counts_of_the_published_size(full: Processor, size: tuple[int, int], rows: int) -> None:
    assert full.num_embeds("image", size, {}) == rows
    assert full.num_embeds("image", size, {"vision_aspect_ratio": "pad"}) == 730


def test_token_count_of_a_video(full: Processor, small: Processor) -> None:
    assert full.num_embeds("video", (32, 480, 640), {}) == 32 * 196 + 1
    item = small.process_item("video", Video(np.zeros((3, 20, 30, 3), np.uint8), {}), {})
    assert (item.num_inputs, item.num_embeds) == (3, 3 * 4 + 1) and small.num_embeds("video", (3, 20, 30), {}) == 13
    np.testing.assert_array_equal(item.features["source_index"][-1], -1)


@pytest.mark.parametrize("size", [(1, 1), (56, 56), (100, 60), (60, 100), (210, 224), (224, 210), (20, 133), (3, 900)])
def test_embeds_and_crops_agree(small: Processor, size: tuple[int, int]) -> None:
    """Every embedding is made from patches of the item's own crops, with weights that sum to one; every row ends
    once."""
    item = small.process_item("image", np.zeros((*size, 3), np.uint8), {})
    source, weights = item.features["source_index"], item.features["source_weight"]
    assert item.num_embeds == small.num_embeds("image", size, {}) == len(source) == len(weights)
    assert source.max() < 16 * item.num_inputs == 16 * len(item.features["pixels"])
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_array_equal(source[:16, 0], range(16))
    ends = np.flatnonzero(source[:, 0] == -1)
    assert len(set(np.diff([15, *ends]))) <= 1 and (not len(ends) or ends[-1] == len(source) - 1)


def test_joined_crops_equal_the_image(small: Processor) -> None:
    """An image of exactly two by three crops: nothing is resized, and embeddings are in row order."""
    pixels = np.random.default_rng(0).integers(0, 256, (112, 168, 3), np.uint8)
    item = small.process_item("image", pixels, {})
    assert item.num_inputs == 7
    patches = item.features["pixels"].reshape(7, 3, 4, 14, 4, 14).transpose(0, 2, 4, 3, 5, 1).reshape(-1, 14, 14, 3)
    rows = item.features["source_index"][16:, 0].reshape(8, 13)
    assert (rows[:, -1] == -1).all()
    shown = patches[rows[:, :-1]].swapaxes(1, 2).reshape(112, 168, 3)
    np.testing.assert_array_equal(shown, pixels)


def test_padded_to_a_square_with_the_mean_color(small: Processor) -> None:
    item = small.process_item("image", np.zeros((56, 28, 3), np.uint8), {"vision_aspect_ratio": "pad"})
    assert (item.num_inputs, item.num_embeds) == (1, 17)
    pixels = item.features["pixels"][0]
    assert (pixels[:, :, :14] == 127).all() and (pixels[:, :, 14:42] == 0).all() and (pixels[:, :, 42:] == 127).all()


@pytest.mark.parametrize("aspect", ["anyres", "anyres_max_0", "anyres_max_-1", "square", 9, None])
def test_refusals(small: Processor, aspect: Any) -> None:
    with pytest.raises(RequestError, match="vision_aspect_ratio must be"):
        small.process_item("image", np.zeros((9, 9, 3), np.uint8), {"vision_aspect_ratio": aspect})


def test_crops_of_another_checkpoint(files: dict[str, dict[str, Any]]) -> None:
    files["preprocessor_config.json"]["size"] = {"height": 384, "width": 384}
    with pytest.raises(ValueError, match="different checkpoints"):
        Processor(files["config.json"], files, None)


def test_resizing_takes_the_centers_of_cells() -> None:
    sources = resized_patches(np.arange(12).reshape(3, 4), 3, 2)
    np.testing.assert_allclose(
        (sources.source_index * sources.source_weight).sum(axis=-1), [[0.5, 2.5], [4.5, 6.5], [8.5, 10.5]]
    )


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_pixels_and_counts_equal_transformers_at_odd_sizes(small: Processor, files: dict[str, dict[str, Any]]) -> None:
    from transformers import LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    options: dict[str, Any] = {
        "image_grid_pinpoints": files["config.json"]["image_grid_pinpoints"],
        "do_normalize": False,
    }
    options |= {"size": {"height": 56, "width": 56}, "image_mean": [0.5] * 3, "do_rescale": False}
    theirs = LlavaOnevisionImageProcessorPil(**options)
    count = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    count.image_processor, count.num_image_tokens, count.vision_aspect_ratio = theirs, 16, "anyres_max_9"
    rng = np.random.default_rng(3)
    for height, width in [(1, 1), (27, 29), (300, 31), (41, 640), (500, 700), (97, 97), *rng.integers(4, 500, (8, 2))]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        item = small.process_item("image", image, {})
        np.testing.assert_array_equal(item.features["pixels"], theirs([image])["pixel_values"][0])
        assert item.num_embeds == count._get_number_of_features(int(height), int(width), 56, 56)
        alone = small.process_item("image", image, {"vision_aspect_ratio": "pad"}).features["pixels"]
        np.testing.assert_array_equal(alone, theirs([[image, image]])["pixel_values"][0])
