"""The Qwen vision towers: on several devices, packed, and against windows written out by hand."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from engine_inputs import random_pixels
from input_processors import load_processor
from mmjax import sharding
from mmjax.batch import nest
from mmjax.loader.checkpoint import Checkpoint
from mmjax.loader.params import load_params
from mmjax.loader.precision import Precision
from mmjax.multimodal.video import Video
from models.bare_model import Bare

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_padding_and_devices_change_nothing(family: str, tiny_dir: Callable[[str], Path]) -> None:
    """Items of odd sizes, packed together or alone, on one device or on three, which pads the heads."""
    processor, _ = load_processor(family, tiny_dir(family))
    items = [
        processor.process_item("image", random_pixels(1, 90, 201), {}),
        processor.process_item(
            "video", Video(np.stack([random_pixels(s, 70, 64) for s in range(5)]), {"fps": 2.0}), {}
        ),
        processor.process_item("image", random_pixels(2, 64, 28), {}),
    ]
    bare = Bare(tiny_dir(family), tokens=32, num_inputs=256)
    together = bare.encode(items)
    alone = np.concatenate([bare.encode([item]) for item in items])
    np.testing.assert_allclose(together, alone, atol=2e-5)

    checkpoint = Checkpoint.open(str(tiny_dir(family)))
    mesh = sharding.mesh(jax.devices()[:3])
    graph, config, params = load_params(checkpoint, checkpoint.model_config(), mesh, Precision("float32", "float32"))
    (encoder,) = config.spec.encoders.values()
    with jax.set_mesh(mesh):
        run = jax.jit(lambda params, f: nnx.merge(graph, params).encode("vision", f))
        rows = run(nest(params), bare._pack(encoder, 256, items))
    np.testing.assert_allclose(rows[: len(alone)], alone, atol=2e-5)


def test_a_pixel_affects_its_window_until_a_layer_attends_to_the_frame(tiny_dir: Callable[[str], Path]) -> None:
    """Without a layer that attends to whole frames, a change reaches its own window and no other."""
    checkpoint = Checkpoint.open(str(tiny_dir("qwen2_5_vl")))
    checkpoint.config["vision_config"]["fullatt_block_indexes"] = []
    mesh = sharding.mesh(jax.devices()[:1])
    graph, config, params = load_params(checkpoint, checkpoint.model_config(), mesh, Precision("float32", "float32"))
    processor, _ = load_processor("qwen2_5_vl", checkpoint.directory)
    encode = jax.jit(lambda params, f: nnx.merge(graph, params).encode("vision", f))
    (encoder,) = config.spec.encoders.values()
    assert {field.name for field in encoder.fields} == {
        "pixels",
        "patch_coords",
        "segment_ids",
        "window_ids",
        "embed_order",
    }

    frame = random_pixels(3, 140, 196)  # 5 x 7 rows, windows of 2 x 2
    rows = []
    for value in (frame[70, 100, 0], 255 - frame[70, 100, 0]):  # in row (2, 3) of the grid, window (1, 1)
        frame[70, 100, 0] = value
        rows.append(np.asarray(encode(nest(params), processor.process_item("image", frame, {}).features)))
    changed = (np.abs(rows[0] - rows[1]).max(axis=1) > 0).reshape(5, 7)
    expected = np.zeros((5, 7), bool)
    expected[2:4, 2:4] = True
    np.testing.assert_array_equal(changed, expected)
