"""Every published configuration is read, traced on abstract arrays, and lowered for the CPU; see `abstract_model`."""

from typing import Any

import pytest

from mmjax.cli.bench.published_configs import PUBLISHED
from mmjax.config import EngineArgs
from mmjax.engine.memory import EngineMemory
from mmjax.loader.family import Family
from mmjax.models import FAMILIES
from models.abstract_model import lower_published, programs


def test_every_family_has_published_sizes() -> None:
    modules = {Family.of(config).name for config, _ in PUBLISHED.values()}
    assert modules == set(FAMILIES.values())


EMBEDS = {  # of the largest item
    "llava-1.5-7b": 576,
    "bakLlava-v1": 576,
    "llava-interleave-qwen-0.5b": 729,
    "llava-onevision-qwen2-0.5b": 729 + 9 * 729 * 121 // 100 + 6 * 27,
    "Qwen2-VL-7B": 16384,
    "Qwen3-VL-8B": 16384,
    "Qwen2-Audio-7B": 750,
    "MiniCPM-V-2_6": 640,
}
POSITIONS = {  # that sequences may have
    "vicuna-7b-v1.5-16k": 16384,  # linear scaling
    "Mistral-7B-v0.1": 32768,  # beyond its window
    "Phi-3-mini-4k": 4096,
    "Qwen2.5-7B": 131072,  # yarn
    "Llama-3.1-8B": 131072,
    "whisper-large-v3": 448,
}


def test_sizes_of_published_configurations() -> None:
    specs = {
        name: Family.of(config).config.from_hf(config, files, tied=False).spec
        for name, (config, files) in PUBLISHED.items()
    }
    assert {name: specs[name].max_item_embeds for name in EMBEDS} == EMBEDS
    assert {name: specs[name].max_positions for name in POSITIONS} == POSITIONS


BLOCK_SIZES = {  # on a TPU, for the default length
    "llava-1.5-7b": 64,
    "Qwen2.5-VL-7B": 128,
    "Qwen2.5-VL-3B": 128,
    "Qwen3-VL-30B-A3B": 256,
    "Mistral-Nemo-12B": 1024,
    "whisper-large-v3": 64,
}


class Device:
    """A device that says nothing of its memory."""

    def memory_stats(self) -> None:
        return None


def planned(name: str, **options: Any) -> EngineMemory:
    """The sizes of an engine on a TPU that has memory for a sequence of any length."""
    config, files = PUBLISHED[name]
    spec = Family.of(config).config.from_hf(config, files, tied=False).spec
    args = EngineArgs(model=name, kv_cache_memory_bytes=1 << 50, **options)
    return EngineMemory.plan(args, spec, "tpu", kv_dtype="bfloat16", tp_size=1, device=Device())


def test_block_tables_fit_into_the_scalar_memory_of_a_tpu() -> None:
    sizes = {name: planned(name).buckets for name in PUBLISHED}
    assert all(4 * b.seq_buckets[-1] * b.max_blocks_per_seq <= 512 * 1024 for b in sizes.values())
    assert {name: sizes[name].block_size for name in BLOCK_SIZES} == BLOCK_SIZES
    assert planned("Qwen3-VL-8B", max_model_len=32768).buckets.block_size == 64
    assert planned("Qwen3-VL-8B", max_num_seqs=16, block_size=64).buckets.block_size == 64
    with pytest.raises(ValueError, match=r"block_size 64, .* 128 sequences of 262144 tokens .* Set block_size to 256"):
        planned("Qwen3-VL-8B", block_size=64)


def test_images_that_are_no_whole_number_of_patches() -> None:
    """384 pixels in patches of 14."""
    encode = dict(programs(*PUBLISHED["llava-onevision-qwen2-0.5b"], "cpu"))["vision"]
    assert encode.trace("cpu").out_info.shape == (2 * (729 + 27), 896)


@pytest.mark.published
@pytest.mark.parametrize("name", PUBLISHED)
def test_traced(name: str) -> None:
    config, files = PUBLISHED[name]
    spec = Family.of(config).config.from_hf(config, files, tied=False).spec
    for kind, program in programs(config, files, "cpu"):
        found = program.trace("cpu").out_info
        if kind.startswith(("prefill", "decode")):
            assert found.shape[1] == spec.vocab_size
        elif kind != "cross":
            assert found.shape[1] == (spec.mm_embed_dim or spec.hidden_size)


@pytest.mark.published
@pytest.mark.parametrize("name", PUBLISHED)
def test_lowered(name: str) -> None:
    lower_published(name, "cpu")
