"""Opening checkpoints as users bring them, and the errors of what is none. Nothing is compiled."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmjax.converters.formats import quantization_method
from safetensors.numpy import load_file, save_file

from mmjax import LLM
from mmjax.cli.main import main
from mmjax.config import EngineArgs
from mmjax.entrypoints.load_model import _generation_config
from mmjax.loader.checkpoint import Checkpoint
from mmjax.loader.params import param_specs
from mmjax.loader.precision import stored_dtype
from mmjax.models import causal

Make = Callable[[str], Path]
WEIGHTS = "model.safetensors"
OLDER = {"_token_id": "_token_index", '"dtype"': '"torch_dtype"', '"num_experts"': '"num_local_experts"'}


@pytest.fixture
def model(tiny_dir: Make, tmp_path: Path) -> Path:
    """A copy of a tiny Qwen2-VL."""
    return Path(shutil.copytree(tiny_dir("qwen2_vl"), tmp_path / "model"))


def edit(directory: Path, change: dict[str, Any], name: str = "config.json") -> None:
    content = json.loads((directory / name).read_text()) | change
    (directory / name).write_text(json.dumps(content))


def values(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    _, specs = param_specs(checkpoint.family, checkpoint.model_config())
    readers = checkpoint.param_readers({path: spec.shape for path, spec in specs.items()})
    return ((path, read(())) for path, read in readers)


def layers(directory: Path, overrides: Any) -> int:
    config: Any = Checkpoint.open(str(directory), overrides=overrides).model_config(dummy=True)
    return int(config.spec.num_layers)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava", "qwen2_5_omni", "qwen3_moe", "ultravox"])
def test_num_hidden_layers_reaches_the_language_model(family: str, tiny_dir: Make) -> None:
    directory = tiny_dir(family)
    for overrides in ({"num_hidden_layers": 1}, {"text_config": {"num_hidden_layers": 1}}):
        assert layers(directory, overrides) == 1

    def change(config: Any) -> Any:
        config.get_text_config().num_hidden_layers = 1
        return config

    assert layers(directory, change) == 1


def test_overrides_that_nobody_reads_are_known(model: Path) -> None:
    checkpoint = Checkpoint.open(str(model), overrides={"num_hidden_layers": 1, "max_pos": 3, "rope_scaling": None})
    checkpoint.model_config(dummy=True)
    assert checkpoint.unread_overrides() == ["max_pos"]
    assert Checkpoint.open(str(model)).unread_overrides() == []


def test_an_engine_tells_of_overrides_that_change_nothing(tiny_dir: Make, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(
        str(tiny_dir("qwen3_vl")),
        hf_overrides={"num_hidden_layers": 1, "max_positon_embeddings": 9, "dtype": "bfloat16"},
        load_format="dummy",
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 20,
        max_model_len=64,
    )
    assert llm.model.spec.num_layers == 1
    told = [record.getMessage() for record in caplog.records if "hf_overrides" in record.getMessage()]
    assert told == ["hf_overrides: 'max_positon_embeddings' changes nothing: qwen3_vl does not read it"]


def test_a_stale_rope_theta_changes_no_frequency(tiny_dir: Make) -> None:
    """Where transformers 4 has saved a config of transformers 5; and a rope_scaling counts more than both."""
    text = json.loads((tiny_dir("qwen3_moe") / "config.json").read_text())
    text.pop("rope_scaling", None)
    rope = {"rope_type": "default", "rope_theta": 1e6}

    def frequencies(**changes: Any) -> tuple[float, ...]:
        return causal.Config.from_hf(text | changes, {}, tied=False).text.rope.inv_freq

    wanted = frequencies(rope_theta=1e6)
    assert frequencies(rope_theta=1e4, rope_parameters=rope) == wanted != frequencies(rope_theta=1e4)
    linear = {"rope_type": "linear", "factor": 2.0}
    halved = tuple(value / 2 for value in wanted)
    assert frequencies(rope_theta=1e4, rope_parameters=rope, rope_scaling=linear) == halved


def test_every_family_reads_both_names(model: Path, tiny_dir: Make) -> None:
    """A tiny config.json under its older names gives the same model as under its newer ones."""
    for family in ("qwen2_vl", "qwen3_vl_moe", "llava", "llava_onevision", "qwen2_audio", "ultravox", "qwen2_5_omni"):
        checkpoint = Checkpoint.open(str(tiny_dir(family)))
        text = json.dumps(checkpoint.config)  # canonical
        for new, old in OLDER.items():
            text = text.replace(new, old)
        renamed = model.parent / family
        shutil.copytree(tiny_dir(family), renamed)
        (renamed / "config.json").write_text(text)
        other = Checkpoint.open(str(renamed))
        assert other.config == checkpoint.config and other.model_config() == checkpoint.model_config()
        assert stored_dtype(json.loads(text)) == stored_dtype(checkpoint.config) == "float32"


@pytest.mark.parametrize(
    ("stored", "config", "wanted"),
    [
        ({"eos_token_id": None}, {"eos_token_id": 9}, (9,)),
        ({"eos_token_id": [7, 8], "temperature": None}, {"eos_token_id": 9}, (7, 8)),
        ({}, {"eos_token_id": None, "text_config": {"eos_token_id": [3]}}, (3,)),
        ({"eos_token_id": []}, {"eos_token_id": None}, ()),
    ],
)
def test_nulls_of_generation_config(
    stored: dict[str, Any], config: dict[str, Any], wanted: tuple[int, ...], tiny_dir: Make, tmp_path: Path
) -> None:
    """A null means that the model says nothing; end-of-sequence tokens are one or several."""
    directory = Path(shutil.copytree(tiny_dir("qwen3_vl"), tmp_path / "model"))
    (directory / "generation_config.json").write_text(json.dumps({"top_p": None, "top_k": 5} | stored))
    nested = json.loads((directory / "config.json").read_text())["text_config"] | config.get("text_config", {})
    if "text_config" not in config:
        nested.pop("eos_token_id", None)
    edit(directory, config | {"text_config": nested})
    checkpoint = Checkpoint.open(str(directory))
    defaults, eos_ids = _generation_config(EngineArgs(str(directory)), checkpoint, None)
    assert eos_ids == wanted and None not in defaults.values() and defaults["top_k"] == 5


# -- weights -----------------------------------------------------------------------------------------------------------


def test_wrapped_names_load_and_convert(model: Path) -> None:
    plain = dict(values(Checkpoint.open(str(model))))
    weights = load_file(model / WEIGHTS)
    save_file({f"base_model.model.{name}": value for name, value in weights.items()}, model / WEIGHTS)
    wrapped = dict(values(Checkpoint.open(str(model))))
    assert plain.keys() == wrapped.keys()
    assert all(np.array_equal(value, wrapped[path]) for path, value in plain.items())
    assert main(["convert", str(model), str(model.parent / "converted")]) == 0
    assert Checkpoint.open(str(model.parent / "converted")).converted


def test_an_index_that_misses_a_tensor_loads(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The head of a tied model, and a parameter that the model needs."""
    weights = load_file(model / WEIGHTS)
    plain = dict(values(Checkpoint.open(str(model))))
    (model / WEIGHTS).unlink()
    unlisted = {"lm_head.weight": weights["model.embed_tokens.weight"], "stray": np.zeros(3, np.float32)}
    save_file(weights | unlisted, model / "one.safetensors")
    places = {name: "one.safetensors" for name in weights if name != "model.norm.weight"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = dict(values(Checkpoint.open(str(model))))
    assert found.keys() == plain.keys()
    assert all(np.array_equal(value, found[path]) for path, value in plain.items())
    assert "does not list all tensors of its shards: 3" in caplog.text


# -- what cannot be loaded ---------------------------------------------------------------------------------------------


def lora(model: Path) -> None:
    (model / WEIGHTS).rename(model / "adapter_model.safetensors")
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "Q/base"}))


def lora_alone(model: Path) -> None:
    lora(model)
    (model / "config.json").unlink()


def gguf(model: Path) -> None:
    (model / WEIGHTS).rename(model / "model-Q4_K_M.gguf")


def gguf_alone(model: Path) -> None:
    gguf(model)
    (model / "config.json").unlink()


def no_preprocessor(model: Path) -> None:
    (model / "preprocessor_config.json").unlink()


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (lora, r"LORA adapter \(adapter_config\.json\) of Q/base.*merge_and_unload"),
    (lora_alone, r"LORA adapter \(adapter_config\.json\) of Q/base.*merge_and_unload"),
    (gguf, "GGUF files; mmjax does not read GGUF"),
    (gguf_alone, "GGUF files; mmjax does not read GGUF"),
    (no_preprocessor, r"no preprocessor_config\.json.*save_pretrained"),
    (lambda model: edit(model, {"quantization_config": {"quant_method": "awq", "bits": 4}}), "awq, 4 bits"),
    (lambda model: edit(model, {"architectures": ["GemmaForCausalLM"]}), "GemmaForCausalLM is not supported.*Qwen2VL"),
    (lambda model: edit(model, {"architectures": None}), "none named; model_type 'qwen2_vl'.*Qwen2VL"),
    (
        lambda model: edit(model, {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}),
        r"no vision_config\..*architecture Qwen2_5_VLForConditionalGeneration, model_type 'qwen2_vl'",
    ),
]


@pytest.mark.parametrize(("spoil", "words"), BROKEN)
def test_errors_say_why(
    spoil: Callable[[Path], None], words: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(model)
    with pytest.raises(ValueError, match=words):
        list(values(Checkpoint.open(str(model))))
    assert main(["convert", str(model), str(model.parent / "converted")]) == 1
    assert capsys.readouterr().err.startswith("mmjax: ")


def test_a_gguf_file_is_no_model() -> None:
    with pytest.raises(ValueError, match="is a GGUF file; mmjax does not read GGUF"):
        Checkpoint.open("unsloth/model-Q4_K_M.gguf")


def test_an_adapter_beside_a_model_is_told(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    (model / "adapter_config.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert next(values(Checkpoint.open(str(model))))
    assert "adapter beside the model" in caplog.text


@pytest.mark.parametrize(
    ("config", "files", "wanted"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "fp8"),
        ({"text_config": {"quantization_config": {"quant_method": "bitsandbytes"}}}, {}, "bitsandbytes"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, {}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, {}, "4 bits"),
        ({"quantization_config": {"group_size": 64}}, {}, "an unnamed method"),
        ({}, {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}}, "modelopt, NVFP4"),
        ({"quantization_config": {}}, {}, None),
    ],
)
def test_names_of_quantization_methods(config: dict[str, Any], files: Any, wanted: str | None) -> None:
    found = quantization_method(config, files)
    assert (found and found[1]) == wanted


def test_weights_that_are_not_quantized_after_all(model: Path) -> None:
    edit(model, {"quantization_config": {"quant_method": "awq"}})
    assert next(values(Checkpoint.open(str(model), overrides={"quantization_config": None})))
