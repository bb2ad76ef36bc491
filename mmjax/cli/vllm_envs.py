"""`vllm.envs`: the environment variables that scripts read."""

from __future__ import annotations

from mmjax.config import vllm_variable

VLLM_USE_V1 = True


def __getattr__(name: str) -> str:
    if not name.startswith("VLLM_"):
        raise AttributeError(name)
    return vllm_variable(name)
