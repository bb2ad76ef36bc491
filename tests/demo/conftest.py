"""The model that ships, loaded once; tests that need it are skipped where its weights are not there."""

from pathlib import Path

import pytest

from mmjax import LLM
from mmjax.demo import DIRECTORY


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one folder from which the engine may read files."""
    return tmp_path_factory.mktemp("mmjax-demo")


@pytest.fixture(scope="session")
def demo(media: Path) -> LLM:
    if not (DIRECTORY / "model.safetensors").is_file():
        pytest.skip("the demo model's weights are not here: examples/train_demo makes them")
    return LLM(
        "demo",
        max_model_len=512,
        max_num_batched_tokens=256,
        max_num_seqs=4,
        enforce_eager=True,
        allowed_local_media_path=str(media),
    )
