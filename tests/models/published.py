"""The same questions put to transformers: its models load the same directory, its processors prepare what they can.

    PYTHONPATH=tests python -m models.published > tests/models/recorded.json

writes down what transformers answers about the tiny checkpoints, for tests that run without torch.
"""

import dataclasses
import importlib
import json
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers

from input_processors import make_input_processor, read_files
from mmjax.hf_config import audio_options, canonical, image_options
from mmjax.processors.base import MediaItem

MODELS = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
PLACED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")  # by the rule below
FPS = {"qwen2_5_omni": 2.0, "qwen3_omni_moe": 1.0}  # of the families on a clock: the frame rate of clips that name none
RATE = 16000


@dataclasses.dataclass
class Reply:
    """A greedy completion. prompt_ids: expanded. logits: f32[T + n - 1, V], of the prompt and every token but the
    last."""

    prompt_ids: list[int]
    ids: list[int]
    logits: np.ndarray

    @property
    def answer_logits(self) -> np.ndarray:
        """f32[n, V], from which each token of the answer was chosen."""
        return self.logits[-len(self.ids) :]

    @property
    def gap(self) -> float:
        """The narrowest lead of a chosen token over its best rival: below the tolerance ids prove nothing."""
        best = np.sort(self.answer_logits, axis=-1)
        return float((best[:, -1] - best[:, -2]).min())


class Published:
    """transformers' model of a directory: eager attention, no cache, positions by the published rule."""

    def __init__(self, family: str, directory: Path, dtype: str = "float32", **options: Any) -> None:
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.family = family
        self.files = read_files(directory)
        self.input_processor = make_input_processor(family, directory, **options)
        if family not in MODELS:
            self.model = _elsewhere(family).Reference(directory, getattr(torch, dtype))
            return
        load = getattr(transformers, MODELS[family]).from_pretrained
        self.model = load(directory, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
        if family == "qwen3_moe":
            return  # a language model
        if family in ("whisper", "qwen2_audio"):
            self.prepare = transformers.WhisperFeatureExtractor.from_pretrained(directory)
        else:
            self.prepare = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
        if "feature_extractor_type" in audio_options(self.files):
            self.feature_extractor = transformers.WhisperFeatureExtractor.from_pretrained(directory)

    def ask(self, question: Mapping[str, Any], steps: int, stop: int | None = None) -> Reply:
        """Greedy for `steps` tokens or up to the token `stop`. Every step recomputes the whole sequence."""
        rendered = self.input_processor.process(self.input_processor.parse(question))
        media = {
            name: torch.from_numpy(value).to(self.model.dtype if value.dtype == np.float32 else torch.int64)
            for name, value in self.media(question).items()
        }
        tokens = rendered.token_ids.tolist()
        found: list[int] = []
        with torch.no_grad():
            if self.family == "whisper":
                media = {"encoder_outputs": self.model.get_encoder()(**media)}
            while len(found) < steps and (not found or found[-1] != stop):
                logits = self._logits(tokens + found, media)
                found.append(int(logits[-1].argmax()))
        return Reply(tokens, found, logits.numpy())

    def _logits(self, tokens: list[int], media: Mapping[str, Any]) -> Any:
        """f32[T, V] of a prompt and the tokens generated so far."""
        ids, extra = torch.tensor([tokens]), dict(media)
        if self.family in PLACED and media:
            extra["position_ids"] = torch.from_numpy(self._positions(tokens, media))
        if self.family in FPS:
            extra["attention_mask"] = torch.ones_like(ids)  # it places its media by itself
        extra["decoder_input_ids" if self.family == "whisper" else "input_ids"] = ids
        return self.model(use_cache=False, **extra).logits[0].float()

    def media(self, question: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The arrays of a question's media by transformers' names, prepared by its processors.

        Clips are prepared by ours: the published processor of videos needs torchvision.
        """
        given = question.get("multi_modal_data") or {}
        if self.family not in MODELS:
            found: dict[str, np.ndarray] = _elsewhere(self.family).media(
                self.input_processor.process(self.input_processor.parse(question))
            )
            return found
        if self.family == "whisper":
            return dict(self.prepare(given["audio"], sampling_rate=RATE, return_tensors="np"))
        out: dict[str, np.ndarray] = {}
        if given.get("image"):
            kwargs = {} if self.family in FPS else question.get("mm_processor_kwargs", {})
            out |= self.prepare(images=given["image"], return_tensors="np", **kwargs)
        if given.get("video"):
            rendered = self.input_processor.process(self.input_processor.parse(question))
            items = list(
                {entry.item_hash: entry.item for entry in rendered.items if entry.modality == "video"}.values()
            )
            clips = [normalize(item, self.files) for item in items]
            if self.family == "llava_onevision":  # videos of equal length only
                return out | {"pixel_values_videos": np.stack(clips)}
            out["pixel_values_videos"] = np.concatenate(clips)
            out["video_grid_thw"] = np.asarray([(t, 2 * h, 2 * w) for t, h, w in (item.grid for item in items)])
            if self.family in FPS:
                out["video_second_per_grid"] = np.full(len(items), 2 / FPS[self.family], np.float32)
        if given.get("audio"):
            out |= self._hear(given["audio"], question.get("mm_processor_kwargs"))
        return {name: np.asarray(value) for name, value in out.items()}

    def _hear(self, clips: Sequence[np.ndarray], kwargs: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
        """The frames of all clips, each computed alone, and the mask of frames that are audio."""
        padding = "do_not_pad" if self.family == "qwen3_omni_moe" else "max_length"
        options = {"sampling_rate": RATE, "padding": padding, "truncation": padding == "max_length"}
        extracted = [
            self.feature_extractor(clip, return_attention_mask=True, return_tensors="np", **options) for clip in clips
        ]
        longest = max(one["input_features"].shape[2] for one in extracted)

        def together(name: str) -> np.ndarray:
            parts = [one[name][0] for one in extracted]
            return np.stack([np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, longest - x.shape[-1])]) for x in parts])

        out = {"input_features": together("input_features"), "feature_attention_mask": together("attention_mask")}
        if kwargs is not None:
            out["use_audio_in_video"] = np.asarray(kwargs.get("use_audio_in_video", False))
        return out

    def _positions(self, ids: Sequence[int], media: Mapping[str, Any]) -> np.ndarray:
        """i64[3, 1, T]: text counts on from the largest position so far, which transformers 5 forgets after clips."""
        config = canonical(self.files["config.json"])
        sizes = {kind: media[f"{kind}_grid_thw"].tolist() for kind in ("image", "video") if f"{kind}_grid_thw" in media}
        if self.family.startswith("qwen3") and "video" in sizes:  # frame by frame, each with its time in words before
            sizes["video"] = [(1, h, w) for t, h, w in sizes["video"] for _ in range(t)]
        grids = {config[f"{kind}_token_id"]: iter(size) for kind, size in sizes.items()}
        columns: list[np.ndarray] = []
        free = done = 0
        while done < len(ids):
            if ids[done] in grids:
                t, h, w = next(grids[ids[done]])
                # Clips are taken to have 2 frames a second: Qwen2.5-VL counts 2 for the second that a pair lasts.
                times = range(0, 2 * t, 2) if self.family == "qwen2_5_vl" else range(t)
                block = np.stack(np.meshgrid(times, range(h // 2), range(w // 2), indexing="ij")).reshape(3, -1)
            else:
                block = np.zeros((3, 1), np.int64)
            columns.append(block + free)
            free, done = int(columns[-1].max()) + 1, done + block.shape[1]
        return np.concatenate(columns, axis=1)[:, None].astype(np.int64)


def _elsewhere(family: str) -> Any:
    """The module of a family that transformers does not have."""
    return importlib.import_module(f"models.reference_{family}")


def normalize(item: MediaItem, files: Mapping[str, dict[str, Any]]) -> np.ndarray:
    """f32 pixels of an item: scaled to 0..1, minus the mean, divided by the deviation of each channel."""
    prepare = image_options(files)
    mean, std = (np.asarray(prepare[f"image_{name}"], np.float32)[:, None] for name in ("mean", "std"))
    pixels = item.features["pixels"]
    if "embed_order" in item.features:  # windows have moved the patches of each row
        first = item.features["embed_order"]
        pixels = pixels[(first[:, None] + np.arange(len(pixels) // len(first))).reshape(-1)]
    flat = pixels.reshape(len(pixels), 3, -1).astype(np.float32)
    return ((flat / 255 - mean) / std).reshape(pixels.shape).astype(np.float32)


def record(family: str, directory: Path, steps: int = 12) -> dict[str, Any]:
    """What `recorded.json` holds of a family: expanded prompt, greedy ids, and the log-probability of each."""
    from models.questions import QUESTIONS
    from models.tables import log_softmax

    model, out = Published(family, directory), {}
    for case, make in QUESTIONS[family].items():
        reply = model.ask(make(), steps)
        chosen = log_softmax(reply.answer_logits)[np.arange(steps), reply.ids]
        out[case] = {
            "prompt_ids": reply.prompt_ids,
            "ids": reply.ids,
            "logprobs": [round(float(value), 5) for value in chosen],
            "gap": round(reply.gap, 3),
        }
    return out


def main() -> None:
    import tiny
    from models.questions import QUESTIONS

    found = {}
    for family in QUESTIONS:
        with tempfile.TemporaryDirectory() as folder:
            found[family] = record(family, tiny.make(family, Path(folder)))
    lines = json.dumps(found, indent=1)
    print(re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", lines))  # a list is one line


if __name__ == "__main__":
    main()
