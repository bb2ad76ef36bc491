"""The demo model's tokenizer and configuration files: `python examples/train_demo/tokens.py` writes them.

A byte-level BPE as Qwen's, trained on questions and answers, so that every word of the tasks is one token and anything
else is still text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import lessons  # noqa: E402

from mmjax.demo import DIRECTORY, ask, scenes  # noqa: E402

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>"),
    *("<|IMAGE|>", "<|VIDEO|>"),
)
NAMED = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
SYSTEM = "You are a helpful assistant."
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] in ('video', 'video_url') %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif part['type'] in ('audio', 'audio_url', 'input_audio') %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 768  # rows of the embedding: the tokenizer's, rounded up
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
UNIT = 28 * 28
PIXELS = (24 * UNIT, 36 * UNIT)  # area of a picture or of a frame after resizing: 24 to 36 tokens


def corpus() -> list[str]:
    """Sentences of every task, many times over."""
    rng = np.random.default_rng([3, 1])
    lines: list[str] = []
    for _ in range(2500):
        pair = [scenes.draw_scene(rng) for _ in range(2)]
        for group in (pair[:1], pair):
            lines += [text for asked in lessons.about_picture(rng, group, 3) for text in (asked.question, asked.answer)]
        moved = ask.about_clip(rng, scenes.draw_clip(rng, 4))
        lines += [moved.question, moved.answer]
        for said in (ask.WORDS[int(rng.integers(len(ask.WORDS)))], " ".join(ask.DIGITS)):
            lines += [text for asked in ask.about_speech(rng, said) for text in (asked.question, asked.answer)]
    lines += [f"{question} {answer}" for question, answer in ask.TALK.items()] * 40
    lines += ["system\n" + SYSTEM + "\nuser\nassistant\n"] * 200
    lines += [" ".join(ask.WORDS), " ".join(ask.DIGITS), " ".join(f"{color} " for color in scenes.COLORS)] * 50
    return lines + [line.lower() for line in lines[:20000]]


def tokenizer() -> Tokenizer:
    out = Tokenizer(models.BPE())
    out.normalizer = normalizers.NFC()
    out.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    out.decoder = decoders.ByteLevel()
    out.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    out.train_from_iterator(corpus(), trainer)
    out.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return out


def config(token: Any) -> dict[str, Any]:
    """config.json in the published layout. `token`: name to id."""
    width = 256
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": False,
        "enable_talker": False,
        "torch_dtype": "float32",
        "thinker_config": {
            "architectures": ["Qwen2OmniNaViTThinkerForConditionalGeneration"],
            "model_type": "qwen2_5_omni_thinker",
            "audio_token_index": token("<|AUDIO|>"),
            "image_token_index": token("<|IMAGE|>"),
            "video_token_index": token("<|VIDEO|>"),
            "audio_start_token_id": token("<|audio_bos|>"),
            "audio_end_token_id": token("<|audio_eos|>"),
            "vision_start_token_id": token("<|vision_bos|>"),
            "vision_end_token_id": token("<|vision_eos|>"),
            "vision_token_id": token("<|vision_pad|>"),
            "bos_token_id": token("<|im_start|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "user_token_id": token("user"),
            "ignore_index": -100,
            "init_std": 0.02,
            "position_id_per_seconds": 25,
            "seconds_per_chunk": 2,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "audio_config": audio_config(width),
            "text_config": text_config(width),
            "vision_config": vision_config(width),
        },
    }


def text_config(width: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_omni_text",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": 512,
        "max_position_embeddings": 2048,
        "max_window_layers": 4,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10.0,  # with 1e6 rows and columns turn queries by less than 0.2 rad: places cannot be told apart
        "rope_scaling": {"mrope_section": [8, 12, 12], "rope_type": "default", "type": "default"},
        "sliding_window": 2048,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
    }


def vision_config(width: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_omni_vision_encoder",
        "depth": 4,
        "embed_dim": 128,
        "fullatt_block_indexes": [1, 3],
        "hidden_act": "silu",
        "hidden_size": 128,
        "in_channels": 3,
        "in_chans": 3,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": width,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 25,
        "window_size": 112,
    }


def audio_config(width: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_omni_audio_encoder",
        "num_mel_bins": 128,
        "encoder_layers": 4,
        "num_hidden_layers": 4,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": 512,
        "d_model": 192,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "scale_embedding": False,
        "max_source_positions": 1500,
        "n_window": 100,
        "output_dim": width,
    }


PICTURES = {
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "min_pixels": PIXELS[0],
    "max_pixels": PIXELS[1],
    "merge_size": 2,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "processor_class": "Qwen2_5OmniProcessor",
}
SOUNDS = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "chunk_length": 30,
    "n_samples": 480000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "sampling_rate": 16000,
    "dither": 0.0,
    "return_attention_mask": True,
}


def write(directory: Path) -> None:
    """Everything of the checkpoint but its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    made.save(str(directory / "tokenizer.json"))
    assert made.get_vocab_size() <= VOCABULARY, made.get_vocab_size()
    (first,) = made.encode(SPECIAL[0]).ids
    added = {
        str(first + index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, token in enumerate(SPECIAL)
    }
    files: dict[str, dict[str, Any]] = {
        "config.json": config(made.token_to_id),
        "generation_config.json": {
            "eos_token_id": [made.token_to_id("<|im_end|>"), made.token_to_id("<|endoftext|>")],
            "pad_token_id": made.token_to_id("<|endoftext|>"),
            "do_sample": False,
            "temperature": 0.0,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": added,
            "additional_special_tokens": list(SPECIAL[1:]),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 2048,
            "split_special_tokens": False,
            "unk_token": None,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            **NAMED,
            "chat_template": TEMPLATE,
        },
        "chat_template.json": {"chat_template": TEMPLATE},
        "preprocessor_config.json": {**SOUNDS, "image_processor_type": "Qwen2VLImageProcessor", **PICTURES},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor", **PICTURES},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else DIRECTORY)
