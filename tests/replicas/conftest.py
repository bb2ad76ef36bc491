"""A Ray cluster of this machine, for all tests of a process."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ray_job


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Ray, started. Each of its CPUs is a process that imports Ray at the start; our actors ask for none."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home directory
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("MMJAX_PROGRESS", "0")
        tests = str(Path(ray_job.__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join([tests, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
        ray = pytest.importorskip("ray")
        ray.init(
            num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20, _temp_dir=folder
        )
        yield ray
        ray.shutdown()
