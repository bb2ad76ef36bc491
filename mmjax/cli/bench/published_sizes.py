"""Sizes of published models, for `--model-config NAME`: the small files of a checkpoint, without weights or network.

The values are those of each model's config.json. The tokenizer is made here: it has as many tokens as the published one
and its special tokens at their ids, but all other tokens are made up, and text becomes one token per byte.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

Json = dict[str, Any]
Files = dict[str, Json]

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
QWEN_FIRST_SPECIAL = 151643
QWEN_SPECIAL = (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start",
    "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
)  # fmt: skip
QWEN_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WHISPER_WINDOW_S = 30


def write_model(name: str, directory: Path) -> None:
    """Write the small files of a published model into a directory. ValueError for a name that is not in MODELS."""
    if name not in MODELS:
        raise ValueError(f"--model-config {name!r} is not known; known are: {', '.join(MODELS)}")
    files, tokenizer = MODELS[name]()
    for file, content in files.items():
        (directory / file).write_text(json.dumps(content, indent=1), encoding="utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))


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


# -- Qwen ----------------------------------------------------------------------------------------------------------


def _qwen_ids() -> dict[str, int]:
    return {name: QWEN_FIRST_SPECIAL + i for i, name in enumerate(QWEN_SPECIAL)}


def _qwen_media_ids() -> Json:
    ids = _qwen_ids()
    names = ("vision_start", "vision_end", "vision", "image", "video")
    return {f"{name}_token_id": ids[name if "_" in name else f"{name}_pad"] for name in names}


def _qwen(config: Json, preprocessor: Json, video: Json | None = None) -> tuple[Files, Tokenizer]:
    ids = _qwen_ids()
    special = {index: f"<|{name}|>" for name, index in ids.items()}
    files: Files = {
        "config.json": config,
        "preprocessor_config.json": preprocessor,
        "generation_config.json": {"eos_token_id": [ids["im_end"], ids["endoftext"]], "pad_token_id": ids["endoftext"]},
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    }
    if video is not None:
        files["video_preprocessor_config.json"] = video
    return files, make_tokenizer(QWEN_FIRST_SPECIAL + len(QWEN_SPECIAL), special)


def _qwen_decoder(width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> Json:
    return {
        "hidden_act": "silu", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-6,
    }  # fmt: skip


def _qwen2(decoder: Json, vision: Json, *, architecture: str, tied: bool, max_len: int) -> tuple[Files, Tokenizer]:
    """Qwen2-VL and Qwen2.5-VL. Models whose head is not their embedding have 128 more rows in it."""
    ids = _qwen_ids()
    config = {
        "architectures": [f"{architecture}ForConditionalGeneration"], "torch_dtype": "bfloat16",
        "bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"], **_qwen_media_ids(), **decoder,
        "max_position_embeddings": max_len, "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": tied,
        "use_sliding_window": False, "vocab_size": 151936 if tied else 152064,
        "vision_config": {
            "depth": 32, "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "temporal_patch_size": 2, **vision,
        },
    }  # fmt: skip
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14,
        "temporal_patch_size": 2, "merge_size": 2, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    }  # fmt: skip
    return _qwen(config, preprocessor)


def _qwen2_vl(*decoder: int, tied: bool = False) -> tuple[Files, Tokenizer]:
    vision = {"embed_dim": 1280, "hidden_size": decoder[0], "mlp_ratio": 4}
    return _qwen2(_qwen_decoder(*decoder), vision, architecture="Qwen2VL", tied=tied, max_len=32768)


def _qwen2_5_vl(*decoder: int, tied: bool = False, tower_mlp: int = 3420) -> tuple[Files, Tokenizer]:
    vision = {
        "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": tower_mlp, "out_hidden_size": decoder[0],
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
    }  # fmt: skip
    return _qwen2(_qwen_decoder(*decoder), vision, architecture="Qwen2_5_VL", tied=tied, max_len=128000)


def _qwen3_vl(
    *decoder: int, tied: bool = False, small_tower: bool = False, experts: Json | None = None
) -> tuple[Files, Tokenizer]:
    """experts: the options of a mixture of experts."""
    ids = _qwen_ids()
    routed = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, **experts} if experts else {}
    tower = (
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
        if small_tower
        else {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    )
    model_type = "qwen3_vl_moe" if experts else "qwen3_vl"
    config = {
        "architectures": [f"Qwen3VL{'Moe' if experts else ''}ForConditionalGeneration"], "model_type": model_type,
        **_qwen_media_ids(), "tie_word_embeddings": tied,
        "text_config": {
            "model_type": f"{model_type}_text", "dtype": "bfloat16", "attention_bias": False, "head_dim": 128,
            "bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"], **_qwen_decoder(*decoder), **routed,
            "max_position_embeddings": 262144, "rope_theta": 5000000.0, "tie_word_embeddings": tied,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "vocab_size": 151936,
        },
        "vision_config": {
            "model_type": model_type, "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "num_heads": 16,
            "num_position_embeddings": 2304, "out_hidden_size": decoder[0], "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2, **tower,
        },
    }  # fmt: skip
    eyes = {
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    image = eyes | {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    }
    video = eyes | {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    }
    return _qwen(config, image, video)


# -- LLaVA ---------------------------------------------------------------------------------------------------------


def _llava(width: int, mlp: int, layers: int, heads: int) -> tuple[Files, Tokenizer]:
    """LLaVA-1.5: a Vicuna behind CLIP ViT-L/14 at 336 pixels."""
    text = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064,
    }  # fmt: skip
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": "float16",
        "image_seq_length": 576, "image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu",
        "text_config": text, "tie_word_embeddings": False, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
            "vocab_size": 32000,
        },
    }  # fmt: skip
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "resample": 3,
        "crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    }  # fmt: skip
    files: Files = {
        "config.json": config,
        "preprocessor_config.json": preprocessor,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001},
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    }
    special = {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<image>", 32001: "<pad>"}
    return files, make_tokenizer(32002, special, bos="<s>")


# -- Whisper -------------------------------------------------------------------------------------------------------


def _whisper(
    width: int, heads: int, encoder_layers: int, decoder_layers: int, *, mels: int = 80, languages: int = 99
) -> tuple[Files, Tokenizer]:
    """The multilingual models. Of their languages, only English has its name here."""
    end, first_language = 50257, 50259
    tasks = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
    task_ids = {name: first_language + languages + i for i, name in enumerate(tasks)}
    special = {end: "<|endoftext|>", end + 1: "<|startoftranscript|>", first_language: "<|en|>"}
    special |= {index: f"<|{name}|>" for name, index in task_ids.items()}
    first_time = task_ids["notimestamps"] + 1
    size = first_time + 50 * WHISPER_WINDOW_S + 1
    special |= {index: f"<|{(index - first_time) * 0.02:.2f}|>" for index in range(first_time, size)}
    config = {
        "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "torch_dtype": "float16",
        "activation_function": "gelu", "bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
        "decoder_start_token_id": end + 1, "d_model": width, "decoder_attention_heads": heads,
        "decoder_ffn_dim": 4 * width, "decoder_layers": decoder_layers, "encoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width, "encoder_layers": encoder_layers, "num_hidden_layers": encoder_layers,
        "is_encoder_decoder": True, "max_source_positions": 50 * WHISPER_WINDOW_S, "max_target_positions": 448,
        "num_mel_bins": mels, "scale_embedding": False, "vocab_size": size,
    }  # fmt: skip
    preprocessor = {
        "feature_extractor_type": "WhisperFeatureExtractor", "chunk_length": WHISPER_WINDOW_S, "feature_size": mels,
        "hop_length": 160, "n_fft": 400, "n_samples": 16000 * WHISPER_WINDOW_S, "sampling_rate": 16000,
        "nb_max_frames": 100 * WHISPER_WINDOW_S, "padding_value": 0.0,
    }  # fmt: skip
    generation = {
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": end + 1,
        "begin_suppress_tokens": [220, end], "suppress_tokens": [], "is_multilingual": True,
        "lang_to_id": {"<|en|>": first_language}, "max_initial_timestamp_index": 50,
        "task_to_id": {name: task_ids[name] for name in ("transcribe", "translate")},
        "no_timestamps_token_id": task_ids["notimestamps"], "prev_sot_token_id": task_ids["startofprev"],
    }  # fmt: skip
    files: Files = {
        "config.json": config,
        "preprocessor_config.json": preprocessor,
        "generation_config.json": generation,
        "tokenizer_config.json": dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>"),
    }
    return files, make_tokenizer(size, special)


ROUTED: Json = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
MODELS: Mapping[str, Callable[[], tuple[Files, Tokenizer]]] = {
    # width, feed-forward, layers, heads, KV heads
    "qwen2-vl-2b": partial(_qwen2_vl, 1536, 8960, 28, 12, 2, tied=True),
    "qwen2-vl-7b": partial(_qwen2_vl, 3584, 18944, 28, 28, 4),
    "qwen2.5-vl-3b": partial(_qwen2_5_vl, 2048, 11008, 36, 16, 2, tied=True),
    "qwen2.5-vl-7b": partial(_qwen2_5_vl, 3584, 18944, 28, 28, 4),
    "qwen2.5-vl-32b": partial(_qwen2_5_vl, 5120, 27648, 64, 40, 8, tower_mlp=3456),
    "qwen3-vl-2b": partial(_qwen3_vl, 2048, 6144, 28, 16, 8, tied=True, small_tower=True),
    "qwen3-vl-4b": partial(_qwen3_vl, 2560, 9728, 36, 32, 8, tied=True, small_tower=True),
    "qwen3-vl-8b": partial(_qwen3_vl, 4096, 12288, 36, 32, 8),
    "qwen3-vl-30b-a3b": partial(_qwen3_vl, 2048, 6144, 48, 32, 4, experts=ROUTED),
    # width, feed-forward, layers, heads
    "llava-1.5-7b": partial(_llava, 4096, 11008, 32, 32),
    "llava-1.5-13b": partial(_llava, 5120, 13824, 40, 40),
    # width, heads, layers of the encoder and of the decoder
    "whisper-tiny": partial(_whisper, 384, 6, 4, 4),
    "whisper-small": partial(_whisper, 768, 12, 12, 12),
    "whisper-large-v3": partial(_whisper, 1280, 20, 32, 32, mels=128, languages=100),
    "whisper-large-v3-turbo": partial(_whisper, 1280, 20, 32, 4, mels=128, languages=100),
}
