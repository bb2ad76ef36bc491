"""A host reads only the regions of the parameters that its devices need: of every family."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mmjax.converters.orbax import convert_checkpoint
from mmjax.converters.safetensors import StoredTensor

from mmjax import sharding
from mmjax.loader.checkpoint import Checkpoint
from mmjax.loader.params import fit_region_to_mesh, fit_to_mesh, param_specs

FAMILIES = (
    "llava", "llava_onevision", "minicpmv", "phi3_v", "qwen2_5_omni", "qwen2_5_vl", "qwen2_audio", "qwen2_vl",
    "qwen3_moe", "qwen3_omni_moe", "qwen3_vl", "qwen3_vl_moe", "ultravox", "whisper",
)  # fmt: skip
Region = tuple[slice, ...]


def regions(shape: tuple[int, ...], axes: tuple[str, ...], size: int) -> list[Region]:
    """What each of `size` devices needs of a parameter."""
    names = [sharding.RULES[axis] for axis in axes]
    whole = tuple(slice(0, n) for n in shape)
    if sharding.MODEL not in names:
        return [whole]
    axis = names.index(sharding.MODEL)
    part = shape[axis] // size
    return [(*whole[:axis], slice(i * part, (i + 1) * part), *whole[axis + 1 :]) for i in range(size)]


class Counter:
    """Counts the bytes that safetensors files are read for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes, read = 0, StoredTensor.read

        def counted(tensor: StoredTensor, region: Region = ()) -> np.ndarray:
            value = read(tensor, region)
            self.bytes += value.nbytes
            return value

        patch.setattr(StoredTensor, "read", counted)


@pytest.mark.parametrize("family", FAMILIES)
def test_regions_are_those_of_the_whole(
    family: str, tiny_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(str(tiny_dir(family)))
    config = checkpoint.model_config()
    _, stored = param_specs(checkpoint.family, config)
    readers = dict(checkpoint.param_readers({path: spec.shape for path, spec in stored.items()}))
    values = {path: read(()) for path, read in readers.items()}
    counter = Counter(monkeypatch)
    for size in (2, 4):
        _, specs = param_specs(checkpoint.family, config.for_tp(size))
        for path, read in readers.items():
            whole = fit_to_mesh(values[path], stored[path], specs[path])
            for region in regions(whole.shape, specs[path].axes, size):
                before = counter.bytes
                found = fit_region_to_mesh(read, stored[path], specs[path], region)
                assert found.dtype == whole.dtype
                np.testing.assert_array_equal(found, whole[region], err_msg=f"{path} {region}")
                if stored[path].shape == specs[path].shape:  # heads that are repeated are read with all their queries
                    assert counter.bytes - before <= found.nbytes, f"{path} {region}: more is read than the device has"


def test_regions_of_a_converted_checkpoint(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(tiny_dir("qwen3_moe")))
    _, stored = param_specs(checkpoint.family, checkpoint.model_config())
    shapes = {path: spec.shape for path, spec in stored.items()}
    convert_checkpoint(checkpoint.directory, tmp_path / "model", table=checkpoint.family.table, shapes=shapes)
    converted = Checkpoint.open(str(tmp_path / "model"))
    for path, read in converted.param_readers(shapes):
        whole = read(())
        for region in regions(whole.shape, stored[path].axes, 2):
            np.testing.assert_array_equal(
                fit_region_to_mesh(read, stored[path], stored[path], region), whole[region], err_msg=path
            )
