"""Sizes of published models, for `--model-config NAME`: the small files of a checkpoint, without weights or network.

The values are those of each model's config.json (`published_configs`). The tokenizer is made here: it has as many
tokens as the published one and its special tokens at their ids, but all other tokens are made up, and text becomes one
token per byte.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from mmjax.cli.bench.published_configs import PUBLISHED, Files, Json

QWEN_FIRST_SPECIAL = 151643
QWEN_CHAT = ("endoftext", "im_start", "im_end")
QWEN_BOXES = ("object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end")
QWEN_VISION = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
QWEN_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
OMNI = ("AUDIO", "audio_bos", "audio_eos", "box_end", "quad_start", "quad_end")
OMNI_VISION = ("vision_bos", "vision_eos", "vision_pad", "IMAGE", "VIDEO")
MINICPM = (  # their ids are not verified; only the tokenizer says them
    "image", "/image", "ref", "/ref", "box", "/box", "quad", "/quad", "point", "/point", "slice", "/slice", "image_id",
    "/image_id", "unk",
)  # fmt: skip
PHI3 = {
    32000: "endoftext", 32001: "assistant", 32006: "system", 32007: "end", 32010: "user", 32044: "image",
}  # fmt: skip
LLAMA3 = {
    128000: "begin_of_text", 128001: "end_of_text", 128006: "start_header_id", 128007: "end_header_id",
    128008: "eom_id", 128009: "eot_id",
}  # fmt: skip
LLAMA2 = {0: "<unk>", 1: "<s>", 2: "</s>"}
WHISPER_WINDOW_S = 30

MODELS: Mapping[str, str] = {name.lower(): name for name in PUBLISHED}
"""The names that `--model-config` takes, and those of PUBLISHED."""


def write_model(name: str, directory: Path) -> None:
    """Write the small files of a published model into a directory. ValueError for a name that is not in MODELS."""
    if name.lower() not in MODELS:
        raise ValueError(f"--model-config {name!r} is not known; known are: {', '.join(MODELS)}")
    files, tokenizer = model_files(MODELS[name.lower()])
    for file, content in files.items():
        (directory / file).write_text(json.dumps(content, indent=1), encoding="utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))


def model_files(name: str) -> tuple[Files, Tokenizer]:
    """The files of a model of PUBLISHED, by their names, and its tokenizer."""
    config, others = PUBLISHED[name]
    if config["architectures"][0].startswith("Whisper"):
        special, end, start = _whisper_tokens(config), "<|endoftext|>", None
        generation = _whisper_generation(config, special)
    else:
        special, end, start = _special_tokens(config)
        ids = {token: index for index, token in special.items()}
        generation = {"eos_token_id": ids[end], "bos_token_id": ids[start or end], "pad_token_id": ids[end]}
    files: Files = {
        "config.json": {"torch_dtype": "bfloat16", **config},
        **others,
        "generation_config.json": generation,
        "tokenizer_config.json": {"bos_token": start or end, "eos_token": end, "pad_token": end},
    }
    return files, make_tokenizer(max(special) + 1, special, bos=start)


def make_tokenizer(size: int, special: Mapping[int, str], *, bos: str | None = None) -> Tokenizer:
    """A byte-level tokenizer of `size` tokens, with special tokens at the given ids. bos: put before every text."""
    rest = itertools.chain(
        sorted(pre_tokenizers.ByteLevel.alphabet()),
        ("Ġ" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4)),
    )
    vocabulary = {special[index] if index in special else next(rest): index for index in range(size)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if bos is not None:
        ids = {token: index for index, token in special.items()}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    return tokenizer


def _special_tokens(config: Json) -> tuple[dict[int, str], str, str | None]:
    """(special tokens by id, the one that ends a text, the one that begins it)."""
    text = config.get("text_config", config)
    match config["architectures"][0].removesuffix("ForConditionalGeneration").removesuffix("ForCausalLM"):
        case "Qwen2_5OmniModel":
            return _after_text(QWEN_CHAT + OMNI + OMNI_VISION), "<|im_end|>", None
        case "Qwen3OmniMoe":
            extra = {151669: "<|audio_start|>", 151670: "<|audio_end|>", 151675: "<|audio_pad|>"}
            return _after_text(QWEN_CHAT + QWEN_BOXES + QWEN_VISION) | extra, "<|im_end|>", None
        case "Qwen2Audio":
            return _after_text((*QWEN_CHAT, "AUDIO", "audio_bos", "audio_eos")), "<|im_end|>", None
        case "MiniCPMV":
            chat = _after_text(QWEN_CHAT)
            return chat | {max(chat) + 1 + i: f"<{name}>" for i, name in enumerate(MINICPM)}, "<|im_end|>", None
        case "LlavaOnevision":
            return _after_text(QWEN_CHAT) | {151646: "<image>", 151647: "<video>"}, "<|im_end|>", None
        case "Llava":
            image = config["image_token_index"]
            return LLAMA2 | {image: "<image>", image + 1: "<pad>"}, "</s>", "<s>"
        case "Phi3V" | "Phi3":
            return LLAMA2 | {index: f"<|{token}|>" for index, token in PHI3.items()}, "<|endoftext|>", "<s>"
        case "UltravoxModel":
            known = LLAMA3 if text["vocab_size"] == 128256 else {0: "begin_of_text", 1: "eot_id"}
            special = {index: f"<|{token}|>" for index, token in known.items()}
            return special | {config["audio_token_index"]: "<|audio|>"}, "<|eot_id|>", None
        case name if name.startswith("Qwen"):
            return _after_text(QWEN_CHAT + QWEN_BOXES + QWEN_VISION), "<|im_end|>", None
    return LLAMA2 | {text["vocab_size"] - 1: "<pad>"}, "</s>", "<s>"


def _after_text(names: tuple[str, ...]) -> dict[int, str]:
    """Special tokens behind the text of Qwen's vocabulary."""
    return {QWEN_FIRST_SPECIAL + i: f"<|{name}|>" for i, name in enumerate(names)}


# -- Whisper -------------------------------------------------------------------------------------------------------

WHISPER_ENGLISH_SIZE = 51864
WHISPER_TASKS = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")


def _whisper_tokens(config: Json) -> dict[int, str]:
    """Special tokens by id. Of the languages, only English has its name here."""
    end, size = config["eos_token_id"], config["vocab_size"]
    first_time = size - 50 * WHISPER_WINDOW_S - 1
    special = {end: "<|endoftext|>", end + 1: "<|startoftranscript|>", end + 2: "<|en|>"}
    special |= {first_time - len(WHISPER_TASKS) + i: f"<|{name}|>" for i, name in enumerate(WHISPER_TASKS)}
    return special | {index: f"<|{(index - first_time) * 0.02:.2f}|>" for index in range(first_time, size)}


def _whisper_generation(config: Json, special: Mapping[int, str]) -> Json:
    """generation_config.json."""
    ids = {token: index for index, token in special.items()}
    end = config["eos_token_id"]
    generation = {
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": end + 1,
        "begin_suppress_tokens": [220, end], "suppress_tokens": [], "max_initial_timestamp_index": 50,
        "no_timestamps_token_id": ids["<|notimestamps|>"], "prev_sot_token_id": ids["<|startofprev|>"],
    }  # fmt: skip
    if config["vocab_size"] == WHISPER_ENGLISH_SIZE:
        return generation | {"is_multilingual": False}
    tasks = {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")}
    return generation | {"is_multilingual": True, "lang_to_id": {"<|en|>": ids["<|en|>"]}, "task_to_id": tasks}
