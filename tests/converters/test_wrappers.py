"""Names of tensors with a wrapper around the model, and adapters."""

import pytest
from mmjax.converters.qwen2_vl import TABLE
from mmjax.converters.safetensors import CheckpointError
from mmjax.converters.wrappers import unwrapped

NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "visual.blocks.0.norm1.weight")


@pytest.mark.parametrize(
    "wrapper",
    [
        "",
        "module.",
        "_orig_mod.",
        "base_model.",
        "base_model.model.",
        "module._orig_mod.",
        "model.",
        "_forward_module.",
    ],
)
def test_wrappers_go(wrapper: str) -> None:
    assert unwrapped({wrapper + name: name for name in NAMES}, TABLE) == {name: name for name in NAMES}


def test_wrappers_within_a_name_go() -> None:
    name = "model._fsdp_wrapped_module.layers.0._orig_mod._checkpoint_wrapped_module.mlp.down_proj.weight"
    assert list(unwrapped({name: 0}, TABLE)) == ["model.layers.0.mlp.down_proj.weight"]


def test_a_name_that_the_table_does_not_know_stays() -> None:
    """So that the error is about the checkpoint's own name."""
    tensors = {name: name for name in (*NAMES, "model.extra", "base_model.extra")}
    assert unwrapped(tensors, TABLE) == tensors


def test_two_wrappers_of_one_tensor_and_adapters_are_refused() -> None:
    with pytest.raises(CheckpointError, match="two tensors are named"):
        unwrapped({name: 0 for name in (NAMES[0], f"_orig_mod.{NAMES[0]}")}, TABLE)
    for name in ("q_proj.lora_A.default.weight", "q_proj.base_layer.weight"):
        with pytest.raises(CheckpointError, match=r"not merged.*merge_and_unload"):
            unwrapped({f"base_model.model.model.layers.0.self_attn.{name}": 0}, TABLE)
