"""Options of the image processors' files: what each does, and what a family refuses by name."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from input_processors import read_files
from mmjax.hf_config import HfConfig
from mmjax.multimodal.video import Video
from mmjax.processors.base import Processor
from mmjax.processors.image_options import SquareImage, edges, resampling, resized
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError

Make = Callable[[str], Path]
EDGE = 56
NOISE = np.random.default_rng(5).integers(0, 256, (97, 141, 3), np.uint8)
FAMILIES = {
    "llava": "llava", "llava_onevision": "llava_onevision", "qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl", "qwen2_5_omni": "qwen2_5_omni", "qwen3_omni_moe": "qwen3_omni_moe", "phi3_v": "phi3_v",
    "minicpmv": "minicpmv",
}  # fmt: skip
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni", "qwen3_omni_moe")


def make(directory: Path, family: str, change: dict[str, Any], name: str = "preprocessor_config.json") -> Processor:
    files = read_files(directory)
    files[name] = files.get(name, {}) | change
    module = import_module(f"mmjax.processors.{family}")
    processor: Processor = module.Processor(files["config.json"], files, Tokenizer(directory))
    return processor


REFUSED: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("llava", "llava_onevision", *QWEN), {"resample": 9}),
    (("llava", "llava_onevision", *QWEN), {"resample": "sharp"}),
    (("phi3_v",), {"resample": 3}),
    (("minicpmv",), {"resample": 2}),
    (("phi3_v", "minicpmv"), {"do_resize": False}),
    (("llava_onevision", "phi3_v", "minicpmv", *QWEN), {"do_center_crop": True}),
    (("llava",), {"size": {"longest_edge": 56}}),
    (("llava",), {"size": "large"}),
    (("llava",), {"size": {"height": 28, "width": 28}, "do_center_crop": False}),
    (("llava",), {"do_pad": True, "pad_size": {"height": 99, "width": 99}}),
    (("phi3_v",), {"size": 32}),
    (QWEN, {"size": 336}),
    (QWEN, {"size": {"height": 56, "width": 56}}),
    (QWEN, {"patch_size": 7}),
    (QWEN, {"merge_size": 4}),
    (QWEN, {"temporal_patch_size": 1}),
    (("minicpmv",), {"patch_size": 7}),
    (("llava_onevision",), {"image_grid_pinpoints": [[56, 56]]}),
]


@pytest.mark.parametrize(("families", "change"), REFUSED)
def test_refused_by_name_and_value(families: tuple[str, ...], change: dict[str, Any], tiny_dir: Make) -> None:
    name, value = list(change.items())[-1] if "pad_size" in change else next(iter(change.items()))
    for family in families:
        with pytest.raises(ValueError) as caught:
            make(tiny_dir(family), FAMILIES[family], change)
        assert f"preprocessor_config.json: {name} {value!r} is not supported here" in str(caught.value), family


def test_options_that_are_null_or_usual_are_accepted(tiny_dir: Make) -> None:
    names = ("resample", "do_resize", "size", "crop_size", "do_pad", "pad_size", "do_center_crop", "do_convert_rgb")
    for family, module in FAMILIES.items():
        nulls = {name: None for name in names}
        assert make(tiny_dir(family), module, nulls).num_embeds("image", (60, 80), {}) > 0
        assert make(tiny_dir(family), module, {"do_convert_rgb": False}).num_embeds("image", (60, 80), {}) > 0


def test_videos_are_normalized_as_images(tiny_dir: Make) -> None:
    for family in ("qwen2_vl", "qwen3_vl", "llava_onevision"):
        with pytest.raises(
            ValueError, match=r"video_preprocessor_config\.json: image_std \[9, 9, 9\] is not supported"
        ):
            make(tiny_dir(family), family, {"image_std": [9, 9, 9]}, "video_preprocessor_config.json")


def test_resample_of_images_and_of_videos(tiny_dir: Make) -> None:
    """Each in its own file, by PIL's number or its name."""
    directory, image = tiny_dir("qwen2_vl"), np.tile(NOISE, (2, 2, 1))[:112, :168]
    bounds = {"min_pixels": 56**2, "max_pixels": 56 * 84}

    def pixels(options: dict[str, Any], media: Any, name: str = "preprocessor_config.json") -> np.ndarray:
        processor = make(directory, "qwen2_vl", options, name)
        modality = "video" if isinstance(media, Video) else "image"
        return processor.process_item(modality, media, bounds).features["pixels"]

    soft = pixels({}, Image.fromarray(image).resize((84, 56), Image.Resampling.BILINEAR))
    usual = pixels({}, image)
    assert (soft != usual).any()
    for value in (2, "bilinear"):
        np.testing.assert_array_equal(pixels({"resample": value}, image), soft)
    name = "video_preprocessor_config.json"
    np.testing.assert_array_equal(pixels({"resample": 2}, image, name), usual)
    np.testing.assert_array_equal(pixels({"resample": 2}, Video(image[None], {}), name), soft)


def test_images_that_are_not_resized(tiny_dir: Make) -> None:
    processor = make(tiny_dir("qwen2_vl"), "qwen2_vl", {"do_resize": False})
    assert processor.num_embeds("image", (56, 84), {}) == 6
    assert processor.num_embeds("image", (300, 400), {"do_resize": True}) > 100  # a request may ask for it
    with pytest.raises(RequestError, match="divisible by 28"):
        processor.num_embeds("image", (57, 84), {})
    square = make(tiny_dir("llava"), "llava", {"do_resize": False})
    item = square.process_item("image", NOISE, {})
    np.testing.assert_array_equal(item.features["pixels"][0], NOISE[20:76, 42:98].transpose(2, 0, 1))
    exact = make(tiny_dir("llava"), "llava", {"do_resize": False, "do_center_crop": False})
    assert exact.process_item("image", NOISE[:EDGE, :EDGE], {}).num_inputs == 1
    with pytest.raises(RequestError, match=r"141x97 does not fit.*56x56"):
        exact.process_item("image", NOISE, {})
    frames = make(
        tiny_dir("llava_onevision"), "llava_onevision", {"do_resize": False}, "video_preprocessor_config.json"
    )
    with pytest.raises(RequestError, match=r"must have 56x56 pixels, got 141x97"):
        frames.process_item("video", Video(NOISE[None], {}), {})
    assert frames.process_item("image", NOISE, {}).num_inputs > 1


@pytest.mark.parametrize(
    ("value", "square", "wanted"),
    [
        (56, False, {"shortest_edge": 56}),
        (56, True, {"height": 56, "width": 56}),
        ([40, 30], False, {"height": 40, "width": 30}),
        ({"shortest_edge": 56, "longest_edge": None}, False, {"shortest_edge": 56}),
        ({"max_height": 5, "max_width": 6}, True, {"max_height": 5, "max_width": 6}),
        (None, True, {}),
    ],
)
def test_spellings_of_a_size(value: Any, square: bool, wanted: dict[str, int]) -> None:
    assert edges(HfConfig({"size": value}), "size", square=square) == wanted


@pytest.mark.parametrize(
    "value", [0, -3, True, "56", [1, 2, 3], {"height": 5}, {"width": 2.5, "height": 2}, {"edge": 1}]
)
def test_sizes_that_are_none(value: Any) -> None:
    with pytest.raises(ValueError, match=r"size .* is not supported here"):
        edges(HfConfig({"size": value}, "preprocessor_config.json"), "size", square=False)


def test_thin_images_and_bounds() -> None:
    assert resized({"shortest_edge": 56, "longest_edge": 112}, 10, 4000) == (1, 112)
    with pytest.raises(RequestError, match="aspect ratio must be at most 1000"):
        resized({"shortest_edge": 56}, 1, 1001)


# -- beside transformers -----------------------------------------------------------------------------------------------

SIZES = [(56, 56), (1, 1), (27, 29), (300, 31), (41, 640), (97, 141), (20, 56)]
SQUARE: list[tuple[str, dict[str, Any]]] = [
    ("CLIP", {"size": 56}),
    ("CLIP", {"size": {"shortest_edge": 70}, "resample": 2}),
    ("CLIP", {"size": {"shortest_edge": 40}, "resample": 1}),  # smaller than the crop: padded with black
    ("CLIP", {"size": {"height": 70, "width": 90}, "resample": 0}),
    ("CLIP", {"size": {"shortest_edge": 56, "longest_edge": 80}, "resample": 4}),
    ("CLIP", {"size": {"max_height": 64, "max_width": 100}, "resample": 5}),
    ("CLIP", {"size": [60, 70], "crop_size": 56}),
    ("CLIP", {"do_resize": False}),
    ("CLIP", {"size": {"height": 56, "width": 56}, "do_center_crop": False}),
    ("Siglip", {"size": {"height": 56, "width": 56}}),
    ("Llava", {"do_pad": True, "size": {"shortest_edge": 56}}),
    ("Llava", {"do_pad": False, "size": {"shortest_edge": 56}}),
]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "options"), SQUARE)
def test_square_images_equal_transformers(kind: str, options: dict[str, Any]) -> None:
    import transformers

    mean = [0.48145466, 0.4578275, 0.40821073]
    options = {"crop_size": {"height": EDGE, "width": EDGE}, "image_mean": mean} | options
    module = import_module(f"transformers.models.{kind.lower()}.image_processing_pil_{kind.lower()}")
    theirs = getattr(module, f"{kind}ImageProcessorPil")(do_rescale=False, do_normalize=False, **options)
    ours = SquareImage.from_options(HfConfig(options | {"image_processor_type": f"{kind}ImageProcessor"}), EDGE)
    saved = HfConfig(theirs.to_dict() | {"image_processor_type": f"{kind}ImageProcessor"})
    again = SquareImage.from_options(saved, EDGE)
    rng = np.random.default_rng(1)
    for height, width in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        wanted = np.asarray(theirs(image)["pixel_values"])[0].transpose(1, 2, 0)
        np.testing.assert_array_equal(ours(image), wanted, str((height, width)))
        np.testing.assert_array_equal(again(image), wanted)
    assert transformers.__version__ >= "5"


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{"resample": 2}, {"resample": 1}, {"size": {"shortest_edge": 56**2, "longest_edge": 9000}}]
)
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_crops_and_patches_equal_transformers(family: str, options: dict[str, Any], tiny_dir: Make) -> None:
    import transformers

    if family == "llava_onevision" and "size" in options:
        options = {"size": {"height": EDGE, "width": EDGE}, "resample": 0}
    theirs = transformers.AutoImageProcessor.from_pretrained(tiny_dir(family), backend="pil", **options)
    ours = make(tiny_dir(family), family, {"min_pixels": None, "max_pixels": None} | theirs.to_dict())
    theirs.do_rescale = theirs.do_normalize = False
    rng = np.random.default_rng(2)
    for height, width in SIZES[2:]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        wanted = np.asarray(theirs(image, return_tensors="np")["pixel_values"])
        pixels = ours.process_item("image", image, {}).features["pixels"]
        np.testing.assert_array_equal(pixels, wanted.reshape(-1, *pixels.shape[1:]))


def test_names_of_filters() -> None:
    assert resampling(HfConfig({"resample": "nearest"})) == resampling(HfConfig({"resample": 0})) == 0
    assert resampling(HfConfig({})) == Image.Resampling.BICUBIC
