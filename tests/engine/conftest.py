"""One small engine per family for all tests in this folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine_inputs import SMALL
from mmjax import LLM


@pytest.fixture(scope="session")
def make_llm(tiny_dir: Callable[[str], Path]) -> Callable[..., LLM]:
    """`make_llm(family, **kwargs)`: a small engine that compiles on demand."""

    def make(family: str, **kwargs: Any) -> LLM:
        return LLM(str(tiny_dir(family)), **(SMALL | {"enforce_eager": True} | kwargs))

    return make


@pytest.fixture(scope="session")
def shared_llm(make_llm: Callable[..., LLM]) -> Callable[[str], LLM]:
    """`shared_llm(family)`: the engine that tests share. Each test must leave it idle."""
    made: dict[str, LLM] = {}
    limits = {"whisper": {"max_model_len": 64}}  # as in tests/vllm_docs
    return lambda family: made.get(family) or made.setdefault(family, make_llm(family, **limits.get(family, {})))


@pytest.fixture
def qwen(shared_llm: Callable[[str], LLM]) -> LLM:
    """The shared Qwen2-VL, its caches empty."""
    llm = shared_llm("qwen2_vl")
    llm.reset_mm_cache()
    assert llm.reset_prefix_cache(), "an earlier test left pages in use"
    return llm
