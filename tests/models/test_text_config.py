"""What the text part of config.json may say, and what is refused by name."""

import math
from typing import Any

import numpy as np
import pytest

from mmjax.nn.rope import Rope
from mmjax.nn.text_config import ANY, decoder_config

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
TYPES = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
WINDOWS: dict[str, tuple[str, dict[str, Any], tuple[int | None, ...]]] = {
    "Mistral: every layer": ("mistral", {"sliding_window": 32}, (32,) * 4),
    "Mistral: as its class fills in": ("mistral", {}, (4096,) * 4),
    "Mistral: null": ("mistral", {"sliding_window": None}, ()),
    "Phi-3: every layer": ("phi3", {"sliding_window": 32}, (32,) * 4),
    "Qwen2: not used": ("qwen2", {"sliding_window": 32, "max_window_layers": 0}, ()),
    "Qwen2: the last layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3},
        (None, None, None, 32),
    ),
    "Qwen2: fewer layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4}, ()),
    "Qwen3: layer by layer": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 32, "layer_types": TYPES},
        (None, 32, None, 32),
    ),
    "Qwen3-MoE: every layer": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 32}, (32,) * 4),
    "Llama: never": ("llama", {"sliding_window": 32}, ()),
    "Llama: layer by layer": ("mistral", {"sliding_window": 32, "layer_types": TYPES * 2}, (None, 32, None, 32)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str) -> None:
    model_type, said, windows = WINDOWS[name]
    config = decoder_config(SIZES | said, model_type, tied=False)
    assert config.windows == windows
    assert config.for_max_len(32).windows == (), "no sequence is longer than the window"
    assert config.for_max_len(5000).windows == windows


WRONG: dict[str, dict[str, Any]] = {
    "hidden_act 'laplace' is not supported; known: quick_gelu": {"hidden_act": "laplace"},
    "sliding_window 0 is not supported": {"sliding_window": 0},
    "sliding_window '4k' is not supported": {"sliding_window": "4k"},
    r"layer_types \['chunked_attention'\] is not supported": {"layer_types": ["chunked_attention"] * 4},
    "layer_types .* for each of the 4 layers": {"layer_types": ["full_attention"]},
    "layer_types names 'sliding_attention', but sliding_window is None": {"layer_types": TYPES, "sliding_window": None},
    "rope type 'proportional' is not supported": {"rope_parameters": {"rope_type": "proportional"}},
    "lm_head_bias True is not supported": {"lm_head_bias": True},
    "num_attention_heads 6 is no multiple of num_key_value_heads 4": {"num_key_value_heads": 4},
    "text_config: model_type 'gemma2' is not supported; known: llama": {"model_type": "gemma2"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_not_supported_is_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_config(SIZES | WRONG[message], "mistral", tied=False, choice=ANY)


def test_what_a_class_fills_in() -> None:
    llama, qwen = (decoder_config({}, name, tied=False) for name in ("llama", "qwen2"))
    assert (llama.num_layers, llama.num_kv_heads, llama.max_positions, llama.bias) == (32, 32, 2048, False)
    assert (qwen.intermediate_size, qwen.vocab_size, qwen.bias, qwen.o_bias) == (22016, 151936, True, False)
    biased = decoder_config(SIZES | {"attention_bias": True, "mlp_bias": True}, "llama", tied=False)
    assert (biased.bias, biased.o_bias, biased.mlp_bias) == (True, True, True)
    assert decoder_config(SIZES | {"attention_bias": True}, "qwen2", tied=False).o_bias is False
    moe = decoder_config({"num_experts": 4}, "qwen3_moe", tied=False)
    assert moe.head_dim == 64 and moe.moe is not None, "its class has no head size of its own, unlike Qwen3's"


def test_scaled_rope_extends_the_positions() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 256}
    lengths = {
        "linear": 1024,
        "dynamic": 1024,
        "yarn": 1024,
        "default": 512,
    }
    for name, length in lengths.items():
        text = SIZES | {"rope_scaling": {"rope_type": name, **scaling}}
        assert decoder_config(text, "llama", tied=False).max_positions == length, name


def test_dynamic_rope_is_that_of_the_longest_sequence() -> None:
    """transformers changes it as a sequence grows, for which cached keys would have to be computed again."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 512}
    rope, plain = Rope.from_hf(8, 10000.0, scaling), Rope.from_hf(8, 10000.0, None)
    assert rope.for_max_len(512).inv_freq == plain.inv_freq
    theta = 10000.0 * (2.0 * 1024 / 512 - 1) ** (8 / 6)
    np.testing.assert_allclose(rope.for_max_len(1024).inv_freq, Rope.from_hf(8, theta, None).inv_freq)


def test_yarn_keeps_fast_pairs_and_slows_the_others() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "mrope_section": [2, 3, 3]}
    rope, plain = Rope.from_hf(16, 10000.0, scaling), Rope.from_hf(16, 10000.0, None)
    ratio = np.array(plain.inv_freq) / rope.inv_freq
    assert ratio[0] == 1 and ratio[-1] == 4 and (np.diff(ratio) >= 0).all()
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1) and rope.num_axes == 3
    assert Rope.from_hf(16, 1e4, scaling | {"attention_factor": 1.5}).attention_factor == 1.5
