"""Arguments of `mmjax.ray`, which are checked without Ray where they can be."""

import sys
from typing import Any

import pytest

from mmjax.config import EngineArgs
from mmjax.ray import EngineProcessorConfig, build_openai_app, build_processor, deployment, serve
from mmjax.ray.resources import actor_options, num_seqs


@pytest.mark.parametrize(
    "call",
    [
        lambda: deployment("demo"),
        lambda: build_openai_app({"model": "demo"}),
        lambda: build_processor(EngineProcessorConfig("demo"))(None),
        lambda: build_processor(EngineProcessorConfig("demo")).write(None, "out", id_column="id"),
    ],
)
def test_without_ray(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'mmjax\[ray\]'"):
        call()


def test_flags_are_divided() -> None:
    flags = {"served_model_name": "shapes", "allowed_origins": ["https://a.example"], "api_key": ("one", "two")}
    server, engine = serve.split_flags({**flags, "max_queue": 7, "max_model_len": "4k", "tensor_parallel_size": 2})
    assert engine == {"max_model_len": "4k", "tensor_parallel_size": 2}
    settings = serve.settings("demo", server)
    assert (settings.names, settings.keys, settings.max_queue) == (("shapes",), ("one", "two"), 7)
    assert settings.origins == ("https://a.example",) and settings.origin_methods == ("*",)


@pytest.mark.parametrize("name", ["port", "ssl_keyfile", "drain_timeout"])
def test_flags_of_the_proxy_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: Ray's proxy listens here"):
        serve.split_flags({name: 1})


def test_which_model() -> None:
    with pytest.raises(ValueError, match="which model"):
        build_openai_app({"max_model_len": 512})


@pytest.mark.parametrize(
    ("keywords", "accelerator_type", "wanted", "options", "batch"),
    [
        ({}, None, {}, {}, 32),
        ({"tensor_parallel_size": 2}, "H100", {}, {"num_gpus": 2, "accelerator_type": "H100"}, 256),
        (
            {"tensor_parallel_size": 4, "max_num_seqs": 9},
            "TPU-V6E",
            {"num_cpus": 8},
            {"resources": {"TPU": 4}, "accelerator_type": "TPU-V6E", "num_cpus": 8},
            9,
        ),
        ({"data_parallel_size": 2}, None, {"resources": {"TPU": 2}}, {"resources": {"TPU": 2}}, 128),
    ],
)
def test_devices(keywords: Any, accelerator_type: Any, wanted: Any, options: Any, batch: int) -> None:
    args = EngineArgs("demo", **keywords)
    assert actor_options(args, accelerator_type, wanted) == options
    assert num_seqs(args, options) == batch


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"task_type": "classify"}, "task_type must be 'generate' or 'embed'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"concurrency": (3, 2)}, r"n or \(m, n\)"),
        ({"engine_kwargs": {"max_num_seqs": 0}}, "max_num_seqs must be at least 1"),
    ],
)
def test_settings_of_a_processor(keywords: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineProcessorConfig("demo", **keywords)
