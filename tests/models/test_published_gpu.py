"""Every published configuration is lowered for a GPU, on a machine that may have none; see `abstract_model`."""

import importlib

import pytest

from mmjax.cli.bench.published_configs import PUBLISHED
from models.abstract_model import lower_published


@pytest.mark.published
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", PUBLISHED)
def test_lowered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # jax looks for cuDNN when it traces a call of it; the Triton kernel needs nothing.
    segment_attention = importlib.import_module("mmjax.kernels.segment_attention")
    monkeypatch.setattr(segment_attention, "supports", lambda *_: False)
    lower_published(name, "gpu")
