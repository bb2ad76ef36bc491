"""Phi-3.5-vision's crops, counts, text between tags, and refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from engine_inputs import random_pixels
from input_processors import load_processor, make_input_processor, read_files
from mmjax.models.phi3_v import global_views
from mmjax.processors import phi3_v
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

Make = Callable[[str], Path]


@pytest.fixture
def tiny(tiny_dir: Make) -> tuple[phi3_v.Processor, Tokenizer]:
    processor, tokenizer = load_processor("phi3_v", tiny_dir("phi3_v"))
    assert isinstance(processor, phi3_v.Processor)
    return processor, tokenizer


@pytest.fixture
def published(tiny_dir: Make) -> phi3_v.Processor:
    """As in the hub's files: config.json has only the name of the tower."""
    files = read_files(tiny_dir("phi3_v"))
    del files["config.json"]["img_processor"]["vision_config"]
    return phi3_v.Processor(files["config.json"], files, None)


@pytest.mark.parametrize(
    ("size", "kwargs", "rows"),
    [
        ((876, 1300), {}, 757),
        ((876, 1300), {"num_crops": 16}, 1921),
        ((336, 336), {"num_crops": 1}, 313),
        ((5000, 10), {}, 5 * 144 + 1 + 5 * 12),
        ((1, 4000), {}, 5 * 144 + 1 + 2 * 12),
    ],
)
def test_token_counts(published: phi3_v.Processor, size: tuple[int, int], kwargs: dict[str, Any], rows: int) -> None:
    assert published.image_id == 32044
    assert published.num_embeds("image", size, kwargs) == rows
    item = published.process_item("image", np.zeros((*size, 3), np.uint8), kwargs)
    assert item.num_embeds == rows == len(item.features["patch_index"])
    assert item.features["pixels"].shape == (item.num_inputs, 3, 336, 336)


@pytest.mark.parametrize("size", [(60, 100), (100, 60), (56, 56), (1, 1), (3, 400), (131, 57)])
def test_joined_crops_equal_the_image_on_white(tiny: tuple[phi3_v.Processor, Tokenizer], size: tuple[int, int]) -> None:
    processor, _ = tiny
    pixels = np.random.default_rng(0).integers(0, 200, (*size, 3), np.uint8)
    item = processor.process_item("image", pixels, {})
    (rows, columns), side = item.grid, 56
    canvas = item.features["pixels"][1:].reshape(rows, columns, 3, side, side)
    canvas = canvas.transpose(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
    white = (canvas == 255).all(axis=2)
    lines, along = np.flatnonzero(~white.all(axis=1)), np.flatnonzero(~white.all(axis=0))
    inside = canvas[lines[0] : lines[-1] + 1, along[0] : along[-1] + 1]
    image, (height, width) = Image.fromarray(pixels), inside.shape[:2]
    if size[0] > size[1]:
        turned = image.transpose(Image.Transpose.TRANSPOSE).resize((height, width), Image.Resampling.BILINEAR)
        wanted = np.asarray(turned).transpose(1, 0, 2)
    else:
        wanted = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(inside, wanted)
    assert max(height, width) % side == 0 and (item.features["pixels"][0] == 0).all()
    above, before = lines[0], along[0]
    assert abs(2 * above + height - rows * side) <= 1 and abs(2 * before + width - columns * side) <= 1


def test_embeds_are_ordered_row_by_row_with_separators(tiny: tuple[phi3_v.Processor, Tokenizer]) -> None:
    processor, _ = tiny
    item = processor.process_item("image", np.zeros((50, 112, 3), np.uint8), {"num_crops": 2})
    assert item.grid == (1, 2)
    newline, divider = -1, -2
    wanted = [4, 5, 8, 9, newline, 6, 7, 10, 11, newline, divider, 0, 1, newline, 2, 3, newline]
    assert item.features["patch_index"].tolist() == wanted
    processor.global_first = True  # the order of Phi-3-vision
    assert processor._patch_index(1, 2).tolist() == [*wanted[11:], divider, *wanted[:10]]


def test_the_global_view_equals_torchs_resize(tiny: tuple[phi3_v.Processor, Tokenizer]) -> None:
    """Two, three and one crops along an edge: for odd numbers every n-th pixel, else 4 x 4 of them."""
    processor, _ = tiny
    pixels = np.random.default_rng(1).integers(0, 256, (100, 150, 3), np.uint8)
    item = processor.process_item("image", pixels, {"num_crops": 6})
    assert item.grid == (2, 3)
    coords, index = (item.features[name] for name in ("crop_coords", "view_index"))
    out = np.asarray(jax.jit(global_views)(item.features["pixels"].astype(np.float32), coords, index))
    np.testing.assert_array_equal(out[1:], item.features["pixels"][1:])
    canvas = item.features["pixels"][1:].reshape(2, 3, 3, 56, 56).transpose(2, 0, 3, 1, 4).reshape(3, 112, 168)
    columns = canvas[:, :, 1::3].astype(np.float64)
    taps = (2 * np.arange(56)[:, None] + np.arange(-1, 3)).clip(0, 111)
    wanted = (columns[:, taps] * np.array([-3, 19, 19, -3])[:, None] / 32).sum(axis=2)
    np.testing.assert_allclose(out[0], wanted, atol=1e-3)


def test_text_between_tags_is_tokenised_by_itself(tiny_dir: Make, tiny: tuple[phi3_v.Processor, Tokenizer]) -> None:
    processor, tokenizer = tiny
    text = "<|image_1|>A<|image_2|> B"
    alone = [tokenizer.encode(part) for part in ("", "A", " B")]
    tokens = processor.tokenize(text, tokenizer.encode)
    assert tokens == [*alone[0], -2, *alone[1], -3, *alone[2]]
    items = [processor.process_item("image", np.zeros(size, np.uint8), {}) for size in ((56, 56, 3), (20, 90, 3))]
    expanded = processor.expand_prompt(tokens, {"image": items})
    assert [span.item_index for span in expanded.spans] == [0, 1]
    assert len(expanded.token_ids) == sum(map(len, alone)) + items[0].num_embeds + items[1].num_embeds
    renderer = make_input_processor("phi3_v", tiny_dir("phi3_v"))
    for prompt, starts in ((text, 3), ("AB", 0)):  # as a chat asks for it, whose template prints special tokens
        media = {"multi_modal_data": {"image": [random_pixels(1), random_pixels(2)]}} if starts else {}
        rendered = renderer.process(renderer.parse({"prompt": prompt, **media}), {"add_special_tokens": False})
        assert (rendered.token_ids == tokenizer.bos_id).sum() == starts


@pytest.mark.parametrize(
    ("prompt", "count", "words"),
    [
        ("<|image_1|>", 2, "Expected there to be 2 prompt placeholders corresponding to 2 image items"),
        ("<|image_1|><|image_1|>", 2, "each number once, but instead found <|image_1|>, <|image_1|>."),
        ("<|image_0|>", 1, "numbered from 1 and each number once, but instead found <|image_0|>."),
        ("<|image_2|>", 1, "but instead found <|image_2|>."),
        ("<|image_1|>", 0, "remove '<|image_1|>'"),
        ("<|image_1|><|image|>", 1, "found 2 placeholder tokens"),
        ("none", 1, "found 0 placeholder tokens"),
    ],
)
def test_tags_that_do_not_fit_the_images(tiny_dir: Make, prompt: str, count: int, words: str) -> None:
    renderer = make_input_processor("phi3_v", tiny_dir("phi3_v"))
    media = {"multi_modal_data": {"image": [np.zeros((8, 8, 3), np.uint8)] * count}} if count else {}
    with pytest.raises(RequestError) as caught:
        renderer.process(renderer.parse({"prompt": prompt, **media}))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("crops", "words"), [(0, "positive integer"), ("4", "positive integer"), (129, "num_crops must be at most 128")]
)
def test_numbers_of_crops_that_are_refused(tiny: tuple[phi3_v.Processor, Tokenizer], crops: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        tiny[0].process_item("image", np.zeros((8, 8, 3), np.uint8), {"num_crops": crops})
