"""Every published configuration is lowered for CPU, GPU and TPU, on a machine that may have none of the last two. Of
programs that differ in widths and depth only, one is lowered: widths are what XLA is for, heads what kernels refuse."""

import importlib

import pytest

from models.abstract_model import LOWERED, programs
from models.published_sizes import PUBLISHED

pytestmark = [
    pytest.mark.published,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
SEEN: set[tuple[str, str]] = set()


@pytest.fixture(autouse=True)
def no_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax looks for cuDNN when it traces a call of it; the Triton kernel needs nothing."""
    module = importlib.import_module("mmjax.kernels.segment_attention")
    monkeypatch.setattr(module, "supports", lambda *_: False)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("platform", LOWERED)
def test_lowered(platform: str, name: str) -> None:
    for _, program in programs(*PUBLISHED[name], platform):
        if (platform, program.key) not in SEEN:
            SEEN.add((platform, program.key))
            assert program.lower(platform)
