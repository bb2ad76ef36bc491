"""Whole models as transformers saves them: tensors, config, tokenizer, processor and chat template."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers.processing_utils import ProcessorMixin
from transformers.utils import PushToHubMixin

if TYPE_CHECKING:
    from models.published import Published

PROCESSORS = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
    "llava": "LlavaProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "whisper": "WhisperProcessor",
    "qwen2_audio": "Qwen2AudioProcessor",
    "qwen2_5_omni": "Qwen2_5OmniProcessor",
    "qwen3_omni_moe": "Qwen3OmniMoeProcessor",
}
# what an older preprocessor_config.json may still say beside a processor_config.json: nobody should read it
STALE = {"size": 1, "image_mean": [9.0, 9.0, 9.0], "image_std": [9.0, 9.0, 9.0], "sampling_rate": 1, "n_fft": 2}


class VideoOptions(PushToHubMixin):
    """Stands for the video processors of transformers, which need torchvision; only their options are saved."""

    _auto_class = None
    model_input_names = ("pixel_values_videos",)

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)

    def to_dict(self) -> dict[str, Any]:
        return self.options

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """The processor saves all options in one file."""


def processor(family: str, directory: Path) -> Any:
    """transformers' processor of a checkpoint; of a language model alone its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    if family not in PROCESSORS:
        return tokenizer
    published: type[ProcessorMixin] = getattr(transformers, PROCESSORS[family])
    accepted = inspect.signature(published.__init__).parameters
    files = {file.name: json.loads(file.read_text()) for file in directory.glob("*config.json")}
    parts: dict[str, Any] = {"tokenizer": tokenizer}
    if "image_processor" in accepted:
        parts["image_processor"] = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    if "feature_extractor" in accepted:
        parts["feature_extractor"] = transformers.AutoFeatureExtractor.from_pretrained(directory)
    if "video_processor" in accepted:
        options = files.get("video_preprocessor_config.json", files["preprocessor_config.json"])
        parts["video_processor"] = VideoOptions(parts["image_processor"].to_dict() | options)
    own = files.get("processor_config.json", {})
    parts |= {name: value for name, value in own.items() if name in accepted and name not in parts}
    any_class = {"check_argument_for_proper_class": lambda self, name, argument: type(argument)}
    return type(published.__name__, (published,), any_class)(**parts)


def save(model: "Published", source: Path, directory: Path) -> Path:
    """The same checkpoint as transformers saves it, beside an older preprocessor_config.json."""
    model.model.save_pretrained(directory)
    processor(model.family, source).save_pretrained(directory)
    if model.family in PROCESSORS:
        (directory / "preprocessor_config.json").write_text(json.dumps(STALE))
    return directory


def prompt_ids(family: str, prepare: Any, question: Mapping[str, Any]) -> list[int]:
    """The token ids that a processor of transformers makes of a question without videos."""
    media = {name: items for name, items in (question.get("multi_modal_data") or {}).items() if len(items)}
    if family == "whisper" or family not in PROCESSORS:
        tokenizer = getattr(prepare, "tokenizer", prepare)
        found: list[int] = tokenizer(question["prompt"], add_special_tokens=False)["input_ids"]
        return found
    given: dict[str, Any] = {"images": media["image"]} if "image" in media else {}
    if "audio" in media:
        given |= {"audio": media["audio"], "audio_kwargs": {"sampling_rate": 16000}}
    rows = prepare(text=[question["prompt"]], **given)["input_ids"]
    return [int(token) for token in rows[0]]
