"""MiniCPM-V 2.6: grids, slices, positions, and prompts whose placeholders are text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from input_processors import load_processor
from mmjax.multimodal.video import Video
from mmjax.processors.minicpmv import Processor, Slicer
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

Make = Callable[[str], Path]
FULL = Slicer(slice_size=448, patch=14, position_grid=70)
PICTURE, CLIP = "(<image>./</image>)", "(<video>./</video>)"


@pytest.fixture
def loaded(tiny_dir: Make) -> tuple[Processor, Tokenizer]:
    processor, tokenizer = load_processor("minicpmv", tiny_dir("minicpmv"))
    assert isinstance(processor, Processor)
    return processor, tokenizer


def black(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("size", "most", "grid"),
    [
        ((448, 448), 9, None),
        ((449, 448), 9, (2, 1)),
        ((876, 1300), 9, (2, 3)),
        ((2000, 2000), 9, (3, 3)),
        ((4000, 400), 9, (9, 1)),
        ((876, 1300), 1, None),
        ((876, 1300), 4, (2, 2)),
        ((3000, 4000), 64, (6, 10)),
    ],
)
def test_grids(size: tuple[int, int], most: int, grid: tuple[int, int] | None) -> None:
    assert FULL.grid(*size, most) == grid


def test_slices_have_room_in_the_encoder() -> None:
    """For any size, the edges of a slice are multiples of the patch, and it has half to twice a square's patches."""
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(np.log(10), np.log(5000), (2000, 2))).astype(int).tolist():
        grid = FULL.grid(height, width, 9)
        views = [FULL._fit(height, width, grow=grid is None)]
        views += [FULL.cell(height, width, grid)] if grid else []
        for view in views:
            assert view[0] % 14 == view[1] % 14 == 0 and 512 <= view[0] * view[1] // 196 <= 2048


def test_too_thin() -> None:
    with pytest.raises(RequestError, match="too thin"):
        FULL.slices(Image.new("RGB", (20000, 2)), None)


def test_slices_are_the_image_cut_row_by_row(loaded: tuple[Processor, Tokenizer]) -> None:
    """An image that needs no resizing: two by three squares."""
    pixels = np.random.default_rng(1).integers(0, 256, (224, 336, 3), np.uint8)
    item = loaded[0].process_item("image", pixels, {})
    assert item.grid == (2, 3, 1) and item.num_embeds == 7 * 16 == loaded[0].num_embeds("image", (224, 336), {})
    first = int((item.features["segment_ids"] == 0).sum())
    patches = item.features["pixels"][first:].reshape(2, 3, 8, 8, 3, 14, 14)
    shown = patches.transpose(0, 2, 5, 1, 3, 6, 4).reshape(224, 336, 3)
    np.testing.assert_array_equal(shown, pixels)
    np.testing.assert_array_equal(item.features["patch_coords"][first : first + 9, 0], [0] * 8 + [1])
    np.testing.assert_array_equal(np.bincount(item.features["segment_ids"])[1:], 64)


def test_position_ids_spread_over_the_table() -> None:
    position_ids, coords = FULL.patch_coords(black(14 * 25, 14 * 70))
    assert position_ids.shape == (25 * 70,) and coords.tolist()[71] == [1, 1]
    np.testing.assert_array_equal(position_ids[:70], range(70))
    rows = position_ids[::70] // 70
    assert rows[0] == 0 and (np.diff(rows) >= 2).all() and rows[-1] == 67


@pytest.mark.parity
def test_position_ids_equal_torch() -> None:
    import torch

    bounds = torch.arange(1 / 70, 1.0, 1 / 70)
    for count in range(1, 2049):
        at = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / count), bounds, right=True)
        np.testing.assert_array_equal(FULL._bucket(count), at.numpy(), str(count))


def written(numbers: list[int | None], slices: list[tuple[int, int]]) -> list[str]:
    """The text that stands for images, each with its number and grid."""
    run = "<unk>" * 16
    found = []
    for number, (rows, columns) in zip(numbers, slices, strict=True):
        tag = "" if number is None else f"<image_id>{number}</image_id>"
        found.append(tag + f"<image>{run}</image>" + "\n".join([f"<slice>{run}</slice>" * columns] * rows))
    return found


def test_prompts_are_tokenised_as_if_they_had_been_written_out(loaded: tuple[Processor, Tokenizer]) -> None:
    """What stands beside a placeholder may have been one token with its brackets: here ")\\n", ")." and ".(" are."""
    processor, tokenizer = loaded
    images = [processor.process_item("image", black(60, 60), {}), processor.process_item("image", black(224, 336), {})]
    video = processor.process_item("video", Video(np.zeros((2, 50, 70, 3), np.uint8), {}), {})
    one, two = written([0, 1], [(0, 0), (2, 3)])
    frames = "".join(written([None, None], [(0, 0)] * 2))
    text = "<|im_start|>a.{}\n{}). (({}))<|im_end|>\u00e9 {}"
    prompt = tokenizer.encode(text.format(PICTURE, CLIP, PICTURE, "(<image>)"), False)
    expanded = processor.expand_prompt(prompt, {"image": images, "video": [video]})
    assert expanded.token_ids == tokenizer.encode(text.format(one, frames, two, "(<image>)"), False)
    kinds = [(span.modality, span.item_index, span.embed_offset) for span in expanded.spans]
    assert kinds[:3] == [("image", 0, 0), ("video", 0, 0), ("video", 0, 16)]
    assert kinds[3:] == [("image", 1, 16 * view) for view in range(7)]
    filler = tokenizer.id_of("<unk>")
    for span in expanded.spans:
        assert expanded.token_ids[span.start : span.start + span.length] == [filler] * 16
    again = processor.expand_prompt(expanded.token_ids, {"image": images, "video": [video]})
    assert again == expanded


def test_numbers_may_be_left_out(loaded: tuple[Processor, Tokenizer]) -> None:
    processor, tokenizer = loaded
    item = processor.process_item("image", black(112, 226), {"use_image_id": False, "max_slice_nums": 2})
    expanded = processor.expand_prompt(tokenizer.encode(PICTURE, False), {"image": [item]})
    assert expanded.token_ids == tokenizer.encode(written([None], [(1, 2)])[0], False)
    assert processor.expand_prompt(expanded.token_ids, {"image": [item]}) == expanded


def test_tokens_beside_a_cut_are_unchanged(loaded: tuple[Processor, Tokenizer]) -> None:
    """Token ids need not be what the tokenizer would make of their text, nor be text at all."""
    processor, tokenizer = loaded
    odd = [tokenizer.id_of("h"), tokenizer.id_of("e"), tokenizer.id_of("\u00a1")]
    prompt = [*odd, tokenizer.id_of("<|im_end|>"), *tokenizer.encode(PICTURE, False)]
    expanded = processor.expand_prompt(prompt, {"image": [processor.process_item("image", black(60, 60), {})]})
    assert expanded.token_ids[:4] == prompt[:4] and tokenizer.encode("he", False) != odd[:2]


@pytest.mark.parametrize(
    ("text", "images", "videos"),
    [("none", 1, 0), (PICTURE, 0, 0), (PICTURE, 2, 0), (PICTURE + CLIP, 1, 0), (written([0], [(0, 0)])[0], 0, 0)],
)
def test_placeholders_and_items_must_match(
    loaded: tuple[Processor, Tokenizer], text: str, images: int, videos: int
) -> None:
    processor, tokenizer = loaded
    items = {"image": [processor.process_item("image", black(60, 60), {})] * images, "video": [] * videos}
    with pytest.raises(RequestError, match="placeholders"):
        processor.expand_prompt(tokenizer.encode(text, False), items)


@pytest.mark.parametrize("value", [0, -1, True, "nine"])
def test_refusals(loaded: tuple[Processor, Tokenizer], value: Any) -> None:
    with pytest.raises(RequestError, match="max_slice_nums must be a positive integer"):
        loaded[0].process_item("image", black(60, 60), {"max_slice_nums": value})
