"""MiniCPM-V 2.6 made from parts of torch and transformers, slice by slice: transformers does not have it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from mmjax.inputs.input_processor import EngineInput

EPS = 1e-6


class Reference(nn.Module):
    """Takes the output of our processor. Its parts have their published names, so that the tensors fit."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        super().__init__()
        config = json.loads((directory / "config.json").read_text())
        vision, width, self.dtype = config["vision_config"], config["hidden_size"], dtype
        text = {key: value for key, value in config.items() if key not in ("vision_config", "model_type")}
        self.llm = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**text, attn_implementation="eager"))
        tower = transformers.SiglipVisionConfig(**vision, attn_implementation="eager")
        self.vpm = nn.ModuleDict({"embeddings": nn.Module(), "encoder": nn.Module()})
        embeddings = self.vpm["embeddings"]
        embeddings.patch_embedding = nn.Conv2d(3, tower.hidden_size, tower.patch_size, tower.patch_size)
        embeddings.position_embedding = nn.Embedding((tower.image_size // tower.patch_size) ** 2, tower.hidden_size)
        layers = [SiglipEncoderLayer(tower) for _ in range(tower.num_hidden_layers)]
        self.vpm["encoder"].layers = nn.ModuleList(layers)
        self.vpm["post_layernorm"] = nn.LayerNorm(tower.hidden_size, EPS)
        self.resampler = nn.Module()
        self.resampler.query = nn.Parameter(torch.empty(config["query_num"], width))
        self.resampler.proj = nn.Parameter(torch.empty(width, width))
        self.resampler.kv_proj = nn.Linear(tower.hidden_size, width, bias=False)
        self.resampler.attn = nn.MultiheadAttention(width, width // 128)
        for name in ("ln_q", "ln_kv", "ln_post"):
            setattr(self.resampler, name, nn.LayerNorm(width, EPS))
        self.load_state_dict(load_file(directory / "model.safetensors"))
        self.to(dtype).eval()
        self.patch, self.filler = tower.patch_size, json.loads((directory / "tokenizer.json").read_text())
        self.filler = next(token["id"] for token in self.filler["added_tokens"] if token["content"] == "<unk>")

    def forward(self, input_ids: Any, use_cache: bool = False, **media: Any) -> Any:
        """logits [1, T, V]."""
        x = self.llm.get_input_embeddings()(input_ids).clone()
        if media:
            x[input_ids == self.filler] = self.embeds(**media)
        return SimpleNamespace(logits=self.llm(inputs_embeds=x, use_cache=use_cache).logits)

    def embeds(self, pixels: Any, position_ids: Any, patch_coords: Any, segment_ids: Any) -> Any:
        """[slices * queries, D]."""
        return torch.cat(
            [
                self.slice(pixels[at], position_ids[at], patch_coords[at])
                for at in (segment_ids == s for s in segment_ids.unique())
            ]
        )

    def slice(self, pixels: Any, position_ids: Any, patch_coords: Any) -> Any:
        """[queries, D] of the patches of one slice."""
        embeddings, resampler = self.vpm["embeddings"], self.resampler
        pixels = ((pixels.float() / 255 - 0.5) / 0.5).reshape(-1, 3, self.patch, self.patch).to(self.dtype)
        x = embeddings.patch_embedding(pixels).flatten(1) + embeddings.position_embedding(position_ids)
        for layer in self.vpm["encoder"].layers:
            out = layer(x[None], attention_mask=None)
            x = (out[0] if isinstance(out, tuple) else out)[0]
        value = resampler.ln_kv(resampler.kv_proj(self.vpm["post_layernorm"](x)))
        rate = 1 / 10000 ** (torch.arange(value.shape[1] // 4) / (value.shape[1] // 4))
        angles = [patch_coords[:, axis, None] * rate for axis in (1, 0)]
        waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
        query = resampler.ln_q(resampler.query)
        found = resampler.attn(query, value + waves.to(self.dtype), value, need_weights=False)[0]
        return resampler.ln_post(found) @ resampler.proj


def media(rendered: EngineInput) -> dict[str, np.ndarray]:
    """Features of all items in the order of the prompt, with the slices numbered through."""
    out: dict[str, list[np.ndarray]] = {}
    slices = 0
    for item in {entry.item_hash: entry.item for entry in rendered.items}.values():
        for name, value in item.features.items():
            out.setdefault(name, []).append(value + slices if name == "segment_ids" else value)
        slices += int(item.features["segment_ids"][-1]) + 1
    return {name: np.concatenate(parts) for name, parts in out.items()}
