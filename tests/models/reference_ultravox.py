"""Ultravox made from parts of torch and transformers, window by window: transformers does not have it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmjax.inputs.input_processor import EngineInput
from mmjax.processors.whisper_chunks import CHUNK_STEPS, FRAMES_BEFORE

EPS = 1e-6
NOTHING = ("model_type", "architectures")


class Reference(nn.Module):
    """Takes the windows of `media`; calls its parts by their published names, so that the tensors fit."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        super().__init__()
        config = json.loads((directory / "config.json").read_text())
        text, audio = (
            {key: value for key, value in config[part].items() if key not in NOTHING}
            for part in ("text_config", "audio_config")
        )
        text_config = transformers.AutoConfig.for_model(config["text_config"]["model_type"], **text)
        self.language_model = transformers.AutoModelForCausalLM.from_config(text_config, attn_implementation="eager")
        self.audio_tower = WhisperEncoder(transformers.WhisperConfig(**audio, attn_implementation="eager"))
        self.stack, self.inside = config["stack_factor"], config["projector_ln_mid"]
        width, hidden, out = self.stack * audio["d_model"], config["hidden_size"], text["hidden_size"]
        names = {"ln_pre": width, "ln_mid" if self.inside else "ln_post": hidden // 2 if self.inside else out}
        self.multi_modal_projector = nn.ModuleDict(
            {name: nn.RMSNorm(size, EPS) for name, size in names.items()}
            | {"linear_1": nn.Linear(width, hidden, bias=False), "linear_2": nn.Linear(hidden // 2, out, bias=False)}
        )
        weights = load_file(directory / "model.safetensors")
        weights.setdefault("language_model.lm_head.weight", weights["language_model.model.embed_tokens.weight"])
        self.load_state_dict(weights)
        self.to(dtype).eval()
        self.marker, self.dtype = config["audio_token_index"], dtype

    def forward(self, input_ids: Any, use_cache: bool = False, **media: Any) -> Any:
        """logits [1, T, V]."""
        is_audio = input_ids == self.marker
        x = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_audio, 0)).clone()
        if media:
            windows = zip(media["mel"], media["frames"].tolist(), media["audio_steps"].tolist(), strict=True)
            x[is_audio] = torch.cat([self.window(mel[:, :frames], steps) for mel, frames, steps in windows])
        return SimpleNamespace(logits=self.language_model(inputs_embeds=x, use_cache=use_cache).logits)

    def window(self, mel: Any, audio_steps: int) -> Any:
        """[embeds, D] of mel [bins, frames], of whose steps this many are audio."""
        tower, parts, gelu = self.audio_tower, self.multi_modal_projector, nn.functional.gelu
        x = gelu(tower.conv2(gelu(tower.conv1(mel[None].to(self.dtype))))).transpose(1, 2)
        x = x + tower.embed_positions.weight[: x.shape[1]]
        mask = torch.zeros(1, 1, 1, x.shape[1], dtype=x.dtype)
        mask[..., audio_steps:] = torch.finfo(x.dtype).min
        for layer in tower.layers:
            out = layer(x, mask)
            x = out[0] if isinstance(out, tuple) else out
        x = tower.layer_norm(x)[0]
        num_embeds = -(-audio_steps // self.stack)
        x = nn.functional.pad(x, (0, 0, 0, -len(x) % self.stack)).reshape(-1, self.stack * x.shape[1])[:num_embeds]
        value, gate = parts["linear_1"](parts["ln_pre"](x)).chunk(2, dim=-1)
        x = nn.functional.silu(gate) * value
        return parts["linear_2"](parts["ln_mid"](x)) if self.inside else parts["ln_post"](parts["linear_2"](x))


def media(rendered: EngineInput) -> dict[str, np.ndarray]:
    """The windows of all clips: mel [n, bins, most frames], number of frames, number of steps that are audio."""
    found: list[tuple[np.ndarray, int, int]] = []
    for item in {entry.item_hash: entry.item for entry in rendered.items}.values():
        for number in range(int(item.features["window_ids"].max(initial=-1)) + 1):
            mine = item.features["window_ids"] == number
            mel = item.features["mel"][mine][:, FRAMES_BEFORE : FRAMES_BEFORE + 2 * CHUNK_STEPS]
            mel = mel.reshape(-1, mel.shape[-1]).T
            frames = int(item.features["num_frames"][mine][0])
            whole = np.zeros((len(mel), frames), np.float32)  # zeros after the frames of the last chunk
            whole[:, : min(frames, mel.shape[1])] = mel[:, :frames]
            found.append((whole, frames, int(item.features["audio_steps"][mine].sum())))
    if not found:
        return {}
    most = max(frames for _, frames, _ in found)
    return {
        "mel": np.stack([np.pad(mel, ((0, 0), (0, most - mel.shape[1]))) for mel, _, _ in found]),
        "frames": np.array([frames for _, frames, _ in found]),
        "audio_steps": np.array([audio_steps for _, _, audio_steps in found]),
    }
