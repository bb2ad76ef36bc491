"""Sizes, counts, layouts and refusals of the families' processors."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from input_processors import load_processor, make_input_processor, read_files
from mmjax.mel import LogMel
from mmjax.multimodal.video import Video
from mmjax.nn.audio.mel import log_mel
from mmjax.processors import llava, qwen2_vl, whisper
from mmjax.processors.base import Processor
from mmjax.types import RequestError

Make = Callable[[str], Path]
NOISE = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)


@pytest.fixture
def qwen(tiny_dir: Make) -> Processor:
    return load_processor("qwen2_vl", tiny_dir("qwen2_vl"))[0]


@pytest.mark.parametrize(
    ("kwargs", "num_embeds", "num_inputs"),
    [
        ({}, 1426, 5704),
        ({"min_pixels": 64**2, "max_pixels": 512**2}, 330, 1320),
        ({"size": {"shortest_edge": 64**2, "longest_edge": 512**2}}, 330, 1320),
    ],
)
def test_qwen_token_counts_of_a_1300x876_image(
    qwen: Processor, kwargs: dict[str, Any], num_embeds: int, num_inputs: int
) -> None:
    item = qwen.process_item("image", np.zeros((876, 1300, 3), np.uint8), kwargs)
    assert (item.num_embeds, item.num_inputs, item.features["pixels"].shape) == (
        num_embeds,
        num_inputs,
        (num_inputs, 1176),
    )
    assert qwen.num_embeds("image", (876, 1300), kwargs) == num_embeds


def test_published_counts_of_a_prompt(tiny_dir: Make) -> None:
    """n images take n times the tokens of one, whether the sizes come with the engine or with the prompt."""
    image, small = Image.new("RGB", (1300, 876)), {"min_pixels": 64**2, "max_pixels": 512**2}
    for at_start, with_prompt, num_embeds in (({}, {}, 1426), (small, {}, 330), ({}, small, 330)):
        renderer = make_input_processor(
            "qwen2_vl", tiny_dir("qwen2_vl"), mm_processor_kwargs=at_start, max_model_len=8192
        )
        for count in (1, 3):
            prompt: dict[str, Any] = {
                "prompt": "<|vision_start|><|image_pad|><|vision_end|>" * count,
                "multi_modal_data": {"image": [image] * count},
                "mm_processor_kwargs": with_prompt,
            }
            made = renderer.process(renderer.parse(prompt))
            assert len(made.token_ids) == count * (num_embeds + 2)


def test_qwen_layout_of_pixels_coords_and_segments(qwen: Processor) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (5, 56, 84, 3), np.uint8)
    item = qwen.process_item("video", Video(frames, {}), {})
    assert item.grid == (3, 2, 3) and item.num_embeds == 18 and qwen.num_embeds("video", (5, 56, 84), {}) == 18
    pixels = item.features["pixels"].reshape(-1, 3, 2, 14, 14)
    for patch_index in range(item.num_inputs):
        segment, (h, w) = item.features["segment_ids"][patch_index], item.features["patch_coords"][patch_index]
        for half in range(2):
            frame = frames[min(2 * segment + half, 4)]  # the odd last frame is shown twice
            patch = frame[14 * h : 14 * h + 14, 14 * w : 14 * w + 14]
            np.testing.assert_array_equal(pixels[patch_index, :, half].transpose(1, 2, 0), patch)
    coords = item.features["patch_coords"].reshape(-1, 4, 2)
    np.testing.assert_array_equal(coords - coords[:, :1], [[[0, 0], [0, 1], [1, 0], [1, 1]]] * 18)


def test_qwen_positions_of_text_are_ordinary(qwen: Processor) -> None:
    positions, delta = qwen.rope_positions([5, 6, 7], [], {})
    np.testing.assert_array_equal(positions, [[0, 1, 2]] * 3)
    assert delta == 0 and positions.dtype == np.int32


def test_llava_refuses_extreme_aspect_ratios(tiny_dir: Callable[[str], Path]) -> None:
    llava = load_processor("llava", tiny_dir("llava"))[0]
    for size in ((1, 1001), (1001, 1)):
        with pytest.raises(RequestError, match="aspect ratio must be at most 1000"):
            llava.process_item("image", np.zeros((*size, 3), np.uint8), {})


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 3), (20, 4000), (4000, 20), (55, 57)])
def test_qwen_odd_sizes(qwen: Processor, size: tuple[int, int]) -> None:
    item = qwen.process_item("image", np.zeros((*size, 3), np.uint8), {})
    assert item.num_inputs == 4 * item.num_embeds and item.num_inputs * 196 >= 3136
    assert item.num_embeds == qwen.num_embeds("image", size, {})


@pytest.mark.parametrize(
    ("size", "kwargs", "words"),
    [
        ((10, 4000), {}, "aspect ratio must be smaller than 200"),
        ((56, 56), {"min_pixels": 0}, "min_pixels must be a positive integer"),
        ((56, 56), {"max_pixels": "many"}, "max_pixels must be a positive integer"),
        ((56, 56), {"max_pixels": True}, "max_pixels must be a positive integer"),
        ((56, 56), {"min_pixels": 9000, "max_pixels": 4000}, "min_pixels (9000) is above max_pixels (4000)"),
        ((56, 56), {"size": 336}, "size must be a dictionary"),
        ((56, 57), {"do_resize": False}, "divisible by 28"),
    ],
)
def test_qwen_refusals(qwen: Processor, size: tuple[int, int], kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        qwen.process_item("image", np.zeros((*size, 3), np.uint8), kwargs)
    assert words in str(caught.value)


def test_qwen_sizes_come_from_either_spelling(tiny_dir: Make) -> None:
    files = read_files(tiny_dir("qwen2_vl"))
    for prepare in ({"size": {"shortest_edge": 4096, "longest_edge": 8192}}, {"min_pixels": 4096, "max_pixels": 8192}):
        files["preprocessor_config.json"] = prepare
        assert qwen2_vl.Processor(files["config.json"], files, None).pixel_bounds == dict.fromkeys(
            ("image", "video"), (4096, 8192)
        )
    files["video_preprocessor_config.json"] = {"min_pixels": 5000, "max_pixels": 6000}
    assert qwen2_vl.Processor(files["config.json"], files, None).pixel_bounds["video"] == (5000, 6000)


def test_llava_num_embeds_does_not_depend_on_the_image(tiny_dir: Make) -> None:
    processor, _ = load_processor("llava", tiny_dir("llava"))
    for size in ((1, 1), (3, 3), (400, 30), (30, 400), (56, 56)):
        item = processor.process_item("image", np.full((*size, 3), 7, np.uint8), {})
        assert item.num_embeds == 16 == processor.num_embeds("image", size, {})
        assert item.features["pixels"].shape == (1, 3, 56, 56)
        assert (item.features["pixels"] == 7).all()  # nothing is padded


def test_llava_published_size_and_class_token(tiny_dir: Make) -> None:
    files = read_files(tiny_dir("llava"))
    config = files["config.json"]
    config["vision_config"]["image_size"] = 336
    files["preprocessor_config.json"] = {"size": 336, "crop_size": 336}  # the spelling of old repositories
    assert llava.Processor(config, files, None).embeds_per_image == 576
    config["vision_feature_select_strategy"] = "full"
    assert llava.Processor(config, files, None).embeds_per_image == 577
    files["preprocessor_config.json"] = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    with pytest.raises(ValueError, match="different checkpoints"):
        llava.Processor(config, files, None)


def test_whisper_of_silence_noise_and_long_audio(tiny_dir: Make, caplog: pytest.LogCaptureFixture) -> None:
    processor, _ = load_processor("whisper", tiny_dir("whisper"))
    assert isinstance(processor, whisper.Processor)
    window = processor.mel.samples
    short = processor.process_item("audio", np.ones(10, np.float32), {}).features["samples"]
    assert short.shape == (1, window) and short.dtype == np.float32 and short.sum() == short[0, :10].sum() == 10
    noise = np.random.default_rng(2).standard_normal(2 * window).astype(np.float32)
    with caplog.at_level(logging.WARNING):
        long = processor.process_item("audio", noise, {}).features["samples"]
    assert "is cut to the model's window" in caplog.text
    np.testing.assert_array_equal(long, noise[None, :window])


@pytest.mark.parametrize("samples", [1, 159, 160, 201, 4000, 16000, 63_900, 64_000])
def test_mel_equals_a_plain_transform(samples: int) -> None:
    """The host's fast path (only frames with audio, float32) and the device's, against the definition: pad, window,
    transform all, in float64."""
    mel = LogMel(rate=16000, window=400, hop=160, bins=80, samples=64_000)
    audio = (np.random.default_rng(samples).standard_normal(samples) * 0.1).astype(np.float32)
    padded = np.pad(np.pad(audio.astype(np.float64), (0, 64_000 - samples)), 200, mode="reflect")
    frames = np.stack([padded[160 * i : 160 * i + 400] for i in range(400)])
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.abs(np.fft.rfft(frames * taper)) ** 2
    log = np.log10(np.maximum(power @ mel.filters.T.astype(np.float64), 1e-10)).T
    expected = (np.maximum(log, log.max() - 8) + 4) / 4
    np.testing.assert_allclose(mel(audio), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(mel.zero_padded(audio), expected[:, : -(-samples // 160)], rtol=0, atol=1e-4)
    windows = np.stack([np.pad(audio, (0, 64_000 - samples)), np.zeros(64_000, np.float32)])
    on_device = np.asarray(log_mel(jnp.asarray(windows), mel))
    np.testing.assert_allclose(on_device[0].T, expected, rtol=0, atol=1e-4)
    assert np.ptp(on_device[1]) < 1e-6  # silence


@pytest.mark.parametrize("samples", [201, 4000, 16000, 63_900])
def test_mel_of_a_clip_alone_is_mirrored_at_its_end(samples: int) -> None:
    mel = LogMel(rate=16000, window=400, hop=160, bins=80, samples=64_000)
    audio = (np.random.default_rng(samples).standard_normal(samples) * 0.1).astype(np.float32)
    padded = np.concatenate([audio[200:0:-1], audio, audio[-2:-202:-1]]).astype(np.float64)
    frames = np.stack([padded[160 * i : 160 * i + 400] for i in range(samples // 160)])
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    log = np.log10(np.maximum(np.abs(np.fft.rfft(frames * taper)) ** 2 @ mel.filters.T.astype(np.float64), 1e-10)).T
    np.testing.assert_allclose(mel.reflect_padded(audio), (np.maximum(log, log.max() - 8) + 4) / 4, rtol=0, atol=1e-4)


def test_whisper_prompts(tiny_dir: Make) -> None:
    processor, tokenizer = load_processor("whisper", tiny_dir("whisper"))
    items = {"audio": [processor.process_item("audio", np.zeros(10, np.float32), {})]}
    start = tokenizer.id_of("<|startoftranscript|>")
    assert start is not None and processor.expand_prompt([], items).token_ids == [start]
    assert processor.expand_prompt([start, 3], items).token_ids == [start, 3]
    assert processor.expand_prompt([3], items).token_ids == [start, 3]
    assert (
        len(processor.expand_prompt([], items).encoder_token_ids)
        == read_files(tiny_dir("whisper"))["config.json"]["max_source_positions"]
    )
    with pytest.raises(RequestError, match="Expected 1 audio item"):
        processor.expand_prompt([start], {})


def test_whisper_files_of_two_checkpoints(tiny_dir: Make) -> None:
    files = read_files(tiny_dir("whisper"))
    files["preprocessor_config.json"]["chunk_length"] += 1
    with pytest.raises(ValueError, match="different checkpoints"):
        whisper.Processor(files["config.json"], files, None)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_pixels_equal_transformers_at_odd_sizes(tiny_dir: Make) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    qwen, _ = load_processor("qwen2_vl", tiny_dir("qwen2_vl"))
    square, _ = load_processor("llava", tiny_dir("llava"))
    theirs_qwen = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 3136, "longest_edge": 200_000}, do_rescale=False, do_normalize=False
    )
    theirs_clip = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_rescale=False, do_normalize=False
    )
    rng = np.random.default_rng(3)
    for height, width in [(1, 1), (27, 29), (300, 31), (41, 640), (500, 700), (97, 97), *rng.integers(2, 500, (20, 2))]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        mine = qwen.process_item("image", image, {"max_pixels": 200_000}).features["pixels"]
        np.testing.assert_array_equal(mine, theirs_qwen(image)["pixel_values"])
        mine = square.process_item("image", image, {}).features["pixels"]
        np.testing.assert_array_equal(mine, theirs_clip(image)["pixel_values"])
