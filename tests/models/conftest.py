"""Engines for the tests of this folder: as few as possible, each of which compiles programs on demand."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from mmjax import LLM

# Each has one bucket of prompt tokens, and cuts prompts where it is full, be it inside an image.
SMALL = {
    "block_size": 16,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "num_decode_steps": 4,
    "enforce_eager": True,
}
SIZES: dict[str, dict[str, Any]] = {
    "whisper": {"max_num_seqs": 2, "max_num_batched_tokens": 32},
    "whisper_turbo": {"max_num_seqs": 2, "max_num_batched_tokens": 32},
    "llava": {"max_model_len": 256, "max_num_batched_tokens": 32},
    "qwen2_vl": {"max_model_len": 256},
    "qwen2_5_vl": {"max_model_len": 256},
    "qwen3_vl": {"max_model_len": 256},
    "qwen3_vl_moe": {"max_model_len": 256, "enable_mm_embeds": True},
    "qwen2_5_omni": {"max_model_len": 256},
    "qwen3_omni_moe": {"max_model_len": 256},
    "llava_onevision": {"max_model_len": 320, "max_num_seqs": 2},
    "minicpmv26": {"max_model_len": 320, "max_num_seqs": 2},
    "qwen2_audio": {"max_model_len": 256},
    "ultravox": {"max_model_len": 256},
}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of one family stand together within their file, so that its engines can go before the next one's
    come."""

    def family(item: pytest.Item) -> tuple[str, str]:
        callspec = getattr(item, "callspec", None)
        params = callspec.params if callspec else {}
        return item.location[0], str(params.get("golden", params.get("family", "")))

    mine = [at for at, item in enumerate(items) if Path(__file__).parent in item.path.parents]
    for at, item in zip(mine, sorted((items[at] for at in mine), key=family), strict=True):
        items[at] = item


@pytest.fixture(scope="module")
def reference_llm(shared: Path) -> Iterator[Callable[..., LLM]]:
    """`reference_llm(family, **kwargs)`: an engine for a reference checkpoint, made once per family and kwargs, and let
    go when a test asks for another family's."""
    made: dict[tuple[str, str], LLM] = {}

    def get(family: str, **kwargs: Any) -> LLM:
        if any(other != family for other, _ in made):
            made.clear()
            gc.collect()
            jax.clear_caches()
        key = family, repr(sorted(kwargs.items()))
        if key not in made:
            options = SMALL | {"max_logprobs": -1, "dtype": "float32"} | SIZES[family] | kwargs
            made[key] = LLM(str(shared / "reference" / family), **options)
        return made[key]

    yield get
    made.clear()


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars() -> Iterator[None]:
    """No progress bars in the test log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMJAX_PROGRESS", "0")
        yield
