"""Phi-3.5-vision made from parts of torch and transformers, image by image: transformers does not have it.

Its rope takes the short factors, as an engine does whose sequences stay within the original length.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from mmjax.inputs.input_processor import EngineInput

IMAGE = "model.vision_embed_tokens."
TOWER = IMAGE + "img_processor.vision_model."


class Reference(nn.Module):
    """Takes the output of our processor for images."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        super().__init__()
        config = json.loads((directory / "config.json").read_text())
        prepare = json.loads((directory / "preprocessor_config.json").read_text())
        weights = load_file(directory / "model.safetensors")
        text = {key: value for key, value in config.items() if key not in ("model_type", "img_processor", "embd_layer")}
        factors = text["rope_scaling"]["short_factor"]
        text["rope_parameters"] = {
            "rope_type": "longrope", "rope_theta": text.pop("rope_theta"), "short_factor": factors,
            "long_factor": factors, "original_max_position_embeddings": text["original_max_position_embeddings"],
        }  # fmt: skip
        del text["rope_scaling"]
        self.text = transformers.Phi3ForCausalLM(transformers.Phi3Config(**text, attn_implementation="eager"))
        self.text.load_state_dict({name: value for name, value in weights.items() if not name.startswith(IMAGE)})
        sizes = transformers.CLIPVisionConfig(**config["img_processor"]["vision_config"], attn_implementation="eager")
        self.tower = transformers.CLIPVisionModel(sizes)
        inside = "vision_model." if next(iter(self.tower.state_dict())).startswith("vision_model.") else ""
        found = {inside + name.removeprefix(TOWER): weights[name] for name in weights if name.startswith(TOWER)}
        self.tower.load_state_dict(found)
        self.newline, self.divider = (weights[IMAGE + name].reshape(1, -1).to(dtype) for name in ("sub_GN", "glb_GN"))
        self.project = nn.Sequential(
            nn.Linear(self.newline.shape[1], text["hidden_size"]), nn.GELU(), nn.Linear(*[text["hidden_size"]] * 2)
        )
        start = IMAGE + "img_projection."
        self.project.load_state_dict({n.removeprefix(start): v for n, v in weights.items() if n.startswith(start)})
        self.mean, self.std = (torch.tensor(prepare[f"image_{name}"])[:, None, None] for name in ("mean", "std"))
        added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
        self.filler = next(token["id"] for token in added if token["content"] == "<|image|>")
        self.dtype = dtype
        self.to(dtype).eval()

    def forward(self, input_ids: Any, use_cache: bool = False, **media: Any) -> Any:
        """logits [1, T, V]."""
        x = self.text.get_input_embeddings()(input_ids).clone()
        if media:
            crops = media["pixels"].split((media["grid"].prod(dim=1) + 1).tolist())
            rows = [self.rows(each[1:], *grid) for each, grid in zip(crops, media["grid"].tolist(), strict=True)]
            x[input_ids == self.filler] = torch.cat(rows)
        return SimpleNamespace(logits=self.text(inputs_embeds=x, use_cache=use_cache).logits)

    def rows(self, crops: Any, down: int, across: int) -> Any:
        """[embeds, D] of an image's crops [down * across, 3, S, S]."""
        crops = (crops.float() / 255 - self.mean) / self.std
        side = crops.shape[-1]
        canvas = torch.cat([torch.cat(list(line), dim=2) for line in crops.unflatten(0, (down, across))], dim=1)
        whole = nn.functional.interpolate(canvas[None], size=(side, side), mode="bicubic", align_corners=False)
        seen = self.tower(torch.cat([whole, crops]).to(self.dtype), output_hidden_states=True).hidden_states[-2][:, 1:]
        parts = [self.lines(seen[1:], down, across), self.divider, self.lines(seen[:1], 1, 1)]
        return self.project(torch.cat(parts))

    def lines(self, seen: Any, down: int, across: int) -> Any:
        """Squares of four patches [rows * (squares of a row + 1), 4C], a separator after each row."""
        edge = round(seen.shape[1] ** 0.5)
        x = seen.unflatten(1, (edge, edge)).unflatten(0, (down, across))
        x = torch.cat([torch.cat(list(line), dim=1) for line in x])  # [down * edge, across * edge, C]
        x = torch.cat([x[i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=-1)
        return torch.cat([torch.cat([line, self.newline]) for line in x])


def media(rendered: EngineInput) -> dict[str, np.ndarray]:
    """The inputs of all images in the order of the prompt, and the grid of each."""
    items = [entry.item for entry in rendered.items]
    if not items:
        return {}
    pixels = np.concatenate([item.features["pixels"] for item in items])
    return {"pixels": pixels, "grid": np.array([item.grid for item in items])}
