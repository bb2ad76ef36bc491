"""The text part of config.json, of text-only and multimodal families alike, as a `DecoderConfig`.

What a key means, and what holds where it is missing, depends on the text model: TEXT_MODELS has what transformers'
class of each does. A value that the decoder does not support is an error that names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmjax.hf_config import canonical
from mmjax.nn.activations import activation_of
from mmjax.nn.decoder import DecoderConfig
from mmjax.nn.moe import MoeConfig
from mmjax.nn.rope import Rope

Text = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TextModel:
    """What config.json leaves to the class of a text model.

    defaults: of keys that may be missing. theta: the same for rope_theta, which has two places. qkv_bias: q, k and v
    have biases, and o has none, whatever attention_bias says. qk_norm: each head's queries and keys are normalized.
    norm_topk_prob: see `MoeConfig.from_hf`. mrope_interleaved: of its rotary sections.

    window: which layers have sliding_window where layer_types is missing: "all", those from max_window_layers on
    ("tail"), or none (""). use_window: use_sliding_window where it is missing.
    """

    defaults: Text
    theta: float = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_topk_prob: bool | None = None
    mrope_interleaved: bool = False
    window: str = ""
    use_window: bool = False


LLAMA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "vocab_size": 32000,
}  # fmt: skip
MISTRAL = LLAMA | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip
PHI3 = LLAMA | {
    "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "vocab_size": 32064,
}  # fmt: skip
QWEN2 = {
    "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "vocab_size": 151936,
    "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
QWEN2_VL = QWEN2 | {
    "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "vocab_size": 152064, "max_window_layers": 80,
}  # fmt: skip
QWEN3 = QWEN2 | {"head_dim": 128}
QWEN3_MOE = QWEN2 | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip
QWEN3_VL = QWEN3 | {"max_position_embeddings": 128000}

TEXT_MODELS: Mapping[str, TextModel] = {
    "llama": TextModel(LLAMA),
    "mistral": TextModel(MISTRAL, window="all", use_window=True),
    "phi3": TextModel(PHI3, window="all", use_window=True),
    "qwen2": TextModel(QWEN2, qkv_bias=True, window="tail"),
    "qwen3": TextModel(QWEN3, qk_norm=True, window="tail"),
    "qwen3_moe": TextModel(QWEN3_MOE, qk_norm=True, window="all"),
    "qwen2_vl": TextModel(QWEN2_VL, theta=1000000.0, qkv_bias=True, window="tail"),
    "qwen3_vl": TextModel(QWEN3_VL, theta=500000.0, qk_norm=True, norm_topk_prob=True, mrope_interleaved=True),
    "qwen3_omni_moe": TextModel(QWEN3_MOE, theta=1000000.0, qk_norm=True, mrope_interleaved=True),
}
ANY = ("llama", "mistral", "phi3", "qwen2", "qwen3", "qwen3_moe")
"""The model types of text models that multimodal ones are built on."""

ONLY: Text = {  # keys of which one value is supported
    "lm_head_bias": False,
    "shared_expert_intermediate_size": 0,
    "clip_qkv": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def decoder_config(text: Text, model_type: str, *, tied: bool, choice: Sequence[str] = ()) -> DecoderConfig:
    """The decoder of the text part of config.json.

    model_type: the key of TEXT_MODELS. choice: if the family may have one of several text models, their types; `text`
    then says which it is, and model_type which it is where `text` does not. tied: the head is the embedding. Raises
    ValueError for what is not supported.
    """
    name = text.get("model_type", model_type) if choice else model_type
    if choice and name not in choice:
        raise ValueError(f"text_config: model_type {name!r} is not supported; known: {', '.join(choice)}")
    model = TEXT_MODELS[name]
    text = model.defaults | canonical(text)
    for key, value in ONLY.items():
        if text.get(key, value) not in (value, None):
            raise ValueError(f"config.json: {key} {text[key]!r} is not supported")
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    rope = _rope(text, head_dim, model)
    positions = text["max_position_embeddings"]
    attention_bias = bool(text.get("attention_bias", False)) and not model.qkv_bias
    return DecoderConfig(
        hidden_size=text["hidden_size"],
        num_layers=text["num_hidden_layers"],
        num_kv_heads=kv_heads,
        q_per_kv=heads // kv_heads,
        head_dim=head_dim,
        intermediate_size=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        padded_vocab_size=text["vocab_size"],
        eps=text["rms_norm_eps"],
        rope=rope,
        bias=model.qkv_bias or attention_bias,
        tie_embeddings=tied,
        max_positions=max(positions, rope.max_positions),
        act=activation_of(text, "hidden_act", "silu"),
        o_bias=attention_bias,
        mlp_bias=bool(text.get("mlp_bias", False)),
        qk_norm=model.qk_norm,
        moe=MoeConfig.from_hf(text, norm_topk_prob=model.norm_topk_prob),
        windows=_windows(text, model),
    )


def _rope(text: Text, head_dim: int, model: TextModel) -> Rope:
    """From rope_parameters and partial_rotary_factor."""
    scaling = text.get("rope_parameters") or {}
    theta = scaling.get("rope_theta") or model.theta
    partial = text.get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1.0
    if scaling:
        limits = ("max_position_embeddings", "original_max_position_embeddings")
        scaling = {name: text[name] for name in limits if name in text} | scaling
        if model.mrope_interleaved:  # config.json does not say so
            scaling["mrope_interleaved"] = True
    return Rope.from_hf(int(head_dim * partial), theta, scaling)


def _windows(text: Text, model: TextModel) -> tuple[int | None, ...]:
    """The window of each layer, see `DecoderConfig`; () if none has one."""
    layers, window = text["num_hidden_layers"], text.get("sliding_window")
    if not text.get("use_sliding_window", model.use_window):
        window = None
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"config.json: sliding_window {window!r} is not supported: it counts tokens")
    types = text.get("layer_types")
    if types is None:
        first = 0 if model.window == "all" else text["max_window_layers"] if model.window == "tail" else layers
        types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    unknown = sorted({str(name) for name in types} - {"full_attention", "sliding_attention"})
    if unknown or len(types) < layers:
        raise ValueError(
            f"config.json: layer_types {unknown or types!r} is not supported: 'full_attention' or 'sliding_attention' "
            f"for each of the {layers} layers"
        )
    slides = [name == "sliding_attention" for name in types[:layers]]
    if any(slides) and window is None:
        raise ValueError(f"config.json: layer_types names 'sliding_attention', but sliding_window is {window!r}")
    return tuple(window if each else None for each in slides) if any(slides) else ()
