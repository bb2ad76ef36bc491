"""Every published configuration is lowered for a TPU, on a machine that may have none; see `abstract_model`."""

import pytest

from mmjax.cli.bench.published_configs import PUBLISHED
from models.abstract_model import lower_published


@pytest.mark.published
@pytest.mark.parametrize("name", PUBLISHED)
def test_lowered(name: str) -> None:
    lower_published(name, "tpu")
