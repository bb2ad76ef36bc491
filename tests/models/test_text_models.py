"""Multimodal families on other text models and image towers than the published ones, against transformers."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_inputs import random_pixels
from models import variants
from models.bare_model import Bare
from models.questions import SOUND, Question, chatml, llama3, llava, sound
from models.tables import close, log_softmax

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

NEW = 6
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "mistral": {"sliding_window": 20},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": {"head_dim": 24, "attention_bias": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
}
CLIP = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False}
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14,
    "image_size": 56,
}  # fmt: skip
LAYERS: dict[str, Any] = {"vision_feature_layer": [1, -1], "multimodal_projector_bias": False}
FULL: dict[str, Any] = {"vision_feature_select_strategy": "full"}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {  # family, text model, tower, rest of config.json
    "llava: Mistral, two layers of CLIP, no bias": ("llava", "mistral", CLIP, LAYERS),
    "llava: Qwen2, SigLIP": ("llava", "qwen2", SIGLIP, FULL | {"projector_hidden_act": "relu"}),
    "llava: Phi-3, SigLIP without its first patch": ("llava", "phi3", SIGLIP, {"vision_feature_layer": -1}),
    "llava: Qwen3, CLIP": ("llava", "qwen3", CLIP, FULL),
    "llava_onevision: Llama, two layers of SigLIP": ("llava_onevision", "llama", SIGLIP, LAYERS),
    "llava_onevision: Qwen3-MoE, CLIP": (
        "llava_onevision",
        "qwen3_moe",
        CLIP,
        {"vision_feature_select_strategy": "default"},
    ),
}


def build(name: str, source: Path, directory: Path) -> Path:
    """The tiny checkpoint of a family with another text model and tower, as transformers saves it."""
    import torch
    import transformers

    family, text, tower, rest = CASES[name]
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    vocab = config["text_config"]["vocab_size"]
    config |= {
        "text_config": {"model_type": text, "vocab_size": vocab, "pad_token_id": 0, **SIZES, **TEXT[text]},
        **rest,
    }
    config["vision_config"] = TOWER | tower
    if "siglip" in tower["model_type"] and family == "llava_onevision":  # as published, no whole number of patches
        config["vision_config"]["patch_size"] = 13
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    model = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.from_pretrained(directory))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.2 / np.prod(parameter.shape[1:]) ** 0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float(parameter.mean().round()), std=0.1)
    model.save_pretrained(directory)
    return directory


def compare(family: str, directory: Path, question: Question, num_inputs: int) -> None:
    """Logits of the prompt and of transformers' greedy completion, which ours would be too."""
    from models.published import Published

    reply = (model := Published(family, directory)).ask(question, NEW)
    prompt = model.input_processor.process(model.input_processor.parse(question))
    assert prompt.token_ids.tolist() == reply.prompt_ids
    tokens = np.array([*reply.prompt_ids, *reply.ids[:-1]], np.int32)
    positions = np.arange(len(tokens), dtype=np.int32)[None]
    bare = Bare(directory, tokens=-(-len(tokens) // 32) * 32, num_inputs=num_inputs)
    logits = bare.logits(dataclasses.replace(prompt, token_ids=tokens, rope_positions=positions))
    close(log_softmax(logits), log_softmax(reply.logits), 2e-4, directory.name)
    assert logits[len(reply.prompt_ids) - 1 :].argmax(-1).tolist() == reply.ids


@pytest.mark.parametrize("name", CASES)
def test_text_model_and_tower(name: str, tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    family = CASES[name][0]
    directory = build(name, tiny_dir(family), tmp_path / "model")
    image = random_pixels(3, 57, 83)
    question = llava("What?", image) if family == "llava" else chatml("<image>What?", image=[image])
    compare(family, directory, question, num_inputs=1 if family == "llava" else 5)


def test_ultravox_on_qwen2(tiny_dir: Callable[[str], Path], tmp_path: Path) -> None:
    def change(files: variants.Files, weights: variants.Weights) -> None:
        files["config.json"]["text_config"] |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        for name in [name for name in weights if name.startswith("language_model") and "self_attn" in name]:
            if "o_proj" not in name:
                variants.redraw(weights, name.replace(".weight", ".bias"), len(weights[name]))

    shutil.copytree(tiny_dir("ultravox"), tmp_path / "model")
    directory = variants.edit(tmp_path / "model", change)
    compare("ultravox", directory, llama3(SOUND, audio=[sound(9, 1.92)]), num_inputs=4)
