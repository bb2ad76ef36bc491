"""The sizes of published checkpoints: the numbers of their config.json, and the other files that models read.

`PUBLISHED` maps the name of a checkpoint to (config.json, other files). They are complete enough to trace a model, and
with what `published_sizes` adds, to run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]
Files = dict[str, Json]

TEXT_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "rope_theta",
)  # fmt: skip


def text(*numbers: float, eps: float = 1e-6, **rest: Any) -> Json:
    """The text part; numbers: of TEXT_KEYS."""
    return dict(zip(TEXT_KEYS, numbers, strict=True)) | {"rms_norm_eps": eps, "hidden_act": "silu"} | rest


def llama3(factor: float) -> Json:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


def longrope(pairs: int, original: int = 4096, **rest: Any) -> Json:
    """Phi-3's scaling; its divisors are made up."""
    factors = [1.0 + i / pairs for i in range(pairs)]
    scaling = {"type": "longrope", "short_factor": factors, "long_factor": [4 * factor for factor in factors]}
    return {"rope_scaling": scaling, "original_max_position_embeddings": original, **rest}


QWEN: Json = {"use_sliding_window": False}
TIED: Json = {"tie_word_embeddings": True}
LLAMA_1B = text(2048, 8192, 16, 32, 8, 128256, 131072, 5e5, eps=1e-5, head_dim=64, rope_scaling=llama3(32.0), **TIED)
LLAMA_8B = text(4096, 14336, 32, 32, 8, 128256, 131072, 5e5, eps=1e-5, rope_scaling=llama3(8.0), attention_bias=False)
LLAMA_70B = text(8192, 28672, 80, 64, 8, 128256, 131072, 5e5, eps=1e-5, rope_scaling=llama3(8.0), mlp_bias=False)
VICUNA_7B = text(4096, 11008, 32, 32, 32, 32064, 4096, 1e4, eps=1e-5)
MISTRAL_7B = text(4096, 14336, 32, 32, 8, 32000, 32768, 1e4, eps=1e-5, sliding_window=4096)
NEMO_12B = text(5120, 14336, 40, 32, 8, 131072, 1024000, 1e6, eps=1e-5, head_dim=128, sliding_window=None)
PHI3_MINI = text(3072, 8192, 32, 32, 32, 32064, 4096, 1e4, eps=1e-5, sliding_window=2047)
PHI3_LONG = text(3072, 8192, 32, 32, 32, 32064, 131072, 1e4, eps=1e-5, sliding_window=262144, **longrope(48))
QWEN2_05B = text(896, 4864, 24, 14, 2, 151936, 32768, 1e6, sliding_window=32768, max_window_layers=21, **QWEN, **TIED)
QWEN2_7B = text(3584, 18944, 28, 28, 4, 152064, 32768, 1e6, sliding_window=131072, max_window_layers=28, **QWEN)
QWEN2_72B = text(8192, 29568, 80, 64, 8, 152064, 32768, 1e6, sliding_window=131072, max_window_layers=80, **QWEN)
QWEN3_32B = text(5120, 25600, 64, 64, 8, 151936, 40960, 1e6, head_dim=128, sliding_window=None, **QWEN)

CAUSAL: Mapping[str, tuple[str, Json]] = {
    "Llama-2-7b": ("Llama", text(4096, 11008, 32, 32, 32, 32000, 4096, 1e4, eps=1e-5)),
    "vicuna-7b-v1.5-16k": ("Llama", VICUNA_7B | {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "TinyLlama-1.1B": ("Llama", text(2048, 5632, 22, 32, 4, 32000, 2048, 1e4, eps=1e-5)),
    "Llama-3.2-1B": ("Llama", LLAMA_1B),
    "Llama-3.2-3B": (
        "Llama",
        text(3072, 8192, 28, 24, 8, 128256, 131072, 5e5, eps=1e-5, head_dim=128, rope_scaling=llama3(32.0), **TIED),
    ),
    "Llama-3.1-8B": ("Llama", LLAMA_8B),
    "Llama-3.3-70B": ("Llama", LLAMA_70B),
    "Mistral-7B-v0.1": ("Mistral", MISTRAL_7B),
    "Mistral-7B-Instruct-v0.3": ("Mistral", MISTRAL_7B | {"vocab_size": 32768, "sliding_window": None}),
    "Mistral-Nemo-12B": ("Mistral", NEMO_12B),
    "Mistral-Small-24B": (
        "Mistral",
        text(5120, 32768, 40, 32, 8, 131072, 32768, 1e8, eps=1e-5, head_dim=128, sliding_window=None),
    ),
    "Phi-3-mini-4k": ("Phi3", PHI3_MINI),
    "Phi-3.5-mini": ("Phi3", PHI3_LONG),
    "Phi-4": ("Phi3", text(5120, 17920, 40, 40, 10, 100352, 16384, 2.5e5, eps=1e-5, sliding_window=None)),
    "Phi-4-mini": (
        "Phi3",
        text(
            3072, 8192, 32, 24, 8, 200064, 131072, 1e4, eps=1e-5, sliding_window=262144, partial_rotary_factor=0.75,
            **longrope(48), **TIED,
        ),
    ),
    "Qwen2.5-0.5B": ("Qwen2", QWEN2_05B),
    "Qwen2.5-1.5B": ("Qwen2", text(1536, 8960, 28, 12, 2, 151936, 131072, 1e6, **QWEN, **TIED)),
    "Qwen2.5-3B": ("Qwen2", text(2048, 11008, 36, 16, 2, 151936, 32768, 1e6, **QWEN, **TIED)),
    "Qwen2.5-7B": (
        "Qwen2",
        QWEN2_7B | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    ),
    "Qwen2.5-14B": ("Qwen2", text(5120, 13824, 48, 40, 8, 152064, 131072, 1e6, **QWEN)),
    "Qwen2.5-32B": ("Qwen2", text(5120, 27648, 64, 40, 8, 152064, 131072, 1e6, **QWEN)),
    "Qwen2.5-72B": ("Qwen2", QWEN2_72B),
    "Qwen3-0.6B": ("Qwen3", text(1024, 3072, 28, 16, 8, 151936, 40960, 1e6, head_dim=128, **QWEN, **TIED)),
    "Qwen3-1.7B": ("Qwen3", text(2048, 6144, 28, 16, 8, 151936, 40960, 1e6, head_dim=128, **QWEN, **TIED)),
    "Qwen3-4B": ("Qwen3", text(2560, 9728, 36, 32, 8, 151936, 40960, 1e6, head_dim=128, **QWEN, **TIED)),
    "Qwen3-8B": ("Qwen3", text(4096, 12288, 36, 32, 8, 151936, 40960, 1e6, head_dim=128, **QWEN)),
    "Qwen3-14B": ("Qwen3", text(5120, 17408, 40, 40, 8, 151936, 40960, 1e6, head_dim=128, **QWEN)),
    "Qwen3-32B": ("Qwen3", QWEN3_32B),
    "Qwen3-30B-A3B": (
        "Qwen3Moe",
        text(
            2048, 6144, 48, 32, 4, 151936, 40960, 1e6, head_dim=128, num_experts=128, num_experts_per_tok=8,
            moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        ),
    ),
    "Qwen3-235B-A22B": (
        "Qwen3Moe",
        text(
            4096, 12288, 94, 64, 4, 151936, 40960, 1e6, head_dim=128, num_experts=128, num_experts_per_tok=8,
            moe_intermediate_size=1536, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        ),
    ),
}  # fmt: skip


CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def pixels(clip: bool = True, **rest: Any) -> Files:
    """preprocessor_config.json. clip: normalize as CLIP does, else to [-1, 1]."""
    mean, std = (CLIP_MEAN, CLIP_STD) if clip else ([0.5] * 3, [0.5] * 3)
    return {"preprocessor_config.json": {"image_mean": mean, "image_std": std, **rest}}


# -- LLaVA -------------------------------------------------------------------------------------------------------------

CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
SIGLIP_400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip


def llava(model_type: str, sizes: Json, tower: Json = CLIP_L, **rest: Any) -> tuple[Json, Files]:
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 32000, "projector_hidden_act": "gelu",
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vision_config": tower,
        "torch_dtype": "float16", "text_config": {"model_type": model_type, **sizes}, **rest,
    }  # fmt: skip
    square = {"height": tower["image_size"], "width": tower["image_size"]}
    if tower is CLIP_L:
        size = {"shortest_edge": tower["image_size"]}
        return config, pixels(image_processor_type="CLIPImageProcessor", size=size, crop_size=square)
    return config, pixels(clip=False, image_processor_type="SiglipImageProcessor", size=square)


def onevision(sizes: Json) -> tuple[Json, Files]:
    steps = [384 * n for n in range(1, 7)]
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"], "image_token_index": 151646,
        "video_token_index": 151647, "projector_hidden_act": "gelu", "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full", "vision_config": SIGLIP_400M,
        "image_grid_pinpoints": [[height, width] for height in steps for width in steps],
        "text_config": {"model_type": "qwen2", **sizes},
    }  # fmt: skip
    files = pixels(clip=False, size={"height": 384, "width": 384})
    files["video_preprocessor_config.json"] = files["preprocessor_config.json"]
    return config, files


QWEN_ON_SIGLIP = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_index": 151646}
LLAVA = {
    "llava-1.5-7b": llava("llama", {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}),
    "llava-1.5-13b": llava("llama", text(5120, 13824, 40, 40, 40, 32064, 4096, 1e4, eps=1e-5)),
    "bakLlava-v1": llava("mistral", MISTRAL_7B | {"vocab_size": 32064}),
    "llava-phi-3-mini": llava("phi3", PHI3_MINI),
    "llava-llama-3-8b": llava("llama", LLAMA_8B | {"vocab_size": 128320, "max_position_embeddings": 8192}),
    "llava-interleave-qwen-0.5b": llava(
        "qwen2", text(1024, 2816, 24, 16, 16, 152000, 32768, 1e6, **QWEN), SIGLIP_400M, **QWEN_ON_SIGLIP
    ),
    "llava-interleave-qwen-7b": llava(
        "qwen2", text(4096, 11008, 32, 32, 32, 152000, 32768, 1e6, **QWEN), SIGLIP_400M, **QWEN_ON_SIGLIP
    ),
    "llava-onevision-qwen2-0.5b": onevision(QWEN2_05B | {"vocab_size": 152000}),
    "llava-onevision-qwen2-7b": onevision(QWEN2_7B | {"vocab_size": 152128}),
    "llava-onevision-qwen2-72b": onevision(QWEN2_72B),
}

# -- Qwen --------------------------------------------------------------------------------------------------------------

VISION_IDS = {
    "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656,
}  # fmt: skip
OMNI_IDS = VISION_IDS | {
    "image_token_index": 151655, "video_token_index": 151656, "audio_token_index": 151646,
    "audio_start_token_id": 151647, "audio_end_token_id": 151648, "position_id_per_seconds": 25,
    "seconds_per_chunk": 2,
}  # fmt: skip
OMNI3_IDS = VISION_IDS | {
    "audio_token_id": 151675, "audio_start_token_id": 151669, "audio_end_token_id": 151670,
    "position_id_per_seconds": 13, "seconds_per_chunk": 2,
}  # fmt: skip
AREAS: Json = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
MROPE: Json = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "use_sliding_window": False}
MROPE3: Json = {"rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}}


def qwen2_vl(sizes: Json) -> tuple[Json, Files]:
    vision = {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "patch_size": 14,
        "hidden_size": sizes["hidden_size"], "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    names = {"architectures": ["Qwen2VLForConditionalGeneration"], **VISION_IDS}
    return {**names, "vision_config": vision, **sizes}, pixels(**AREAS)


def qwen25_tower(width: int, mlp: int) -> Json:
    return {
        "depth": 32, "hidden_size": 1280, "intermediate_size": mlp, "num_heads": 16, "out_hidden_size": width,
        "hidden_act": "silu", "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
    }  # fmt: skip


def qwen25_vl(sizes: Json, mlp: int = 3420) -> tuple[Json, Files]:
    vision = qwen25_tower(sizes["hidden_size"], mlp)
    names = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], **VISION_IDS}
    return {**names, "vision_config": vision, **sizes}, pixels(**AREAS)


def qwen3_tower(width: int, small: bool) -> Json:
    return {
        "depth": 24 if small else 27, "hidden_size": 1024 if small else 1152, "num_heads": 16, "in_channels": 3,
        "intermediate_size": 4096 if small else 4304, "out_hidden_size": width, "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": [5, 11, 17] if small else [8, 16, 24], "num_position_embeddings": 2304,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip


def qwen3_vl(sizes: Json, small: bool = False) -> tuple[Json, Files]:
    name = "Qwen3VLMoeForConditionalGeneration" if "num_experts" in sizes else "Qwen3VLForConditionalGeneration"
    vision = qwen3_tower(sizes["hidden_size"], small)
    patches = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    files = pixels(clip=False, size={"longest_edge": 16777216, "shortest_edge": 65536}, **patches)
    video = {"size": {"longest_edge": 25165824, "shortest_edge": 4096}}
    files["video_preprocessor_config.json"] = files["preprocessor_config.json"] | video
    names = {"architectures": [name], **VISION_IDS, "tie_word_embeddings": sizes.get("tie_word_embeddings", False)}
    return {**names, "vision_config": vision, "text_config": {**sizes, **MROPE3}}, files


def moe(width: int, mlp: int, layers: int, heads: int, inner: int, vocab: int = 151936) -> Json:
    sizes = text(width, mlp, layers, heads, 4, vocab, 262144, 5e6, head_dim=128)
    routed = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": inner, "norm_topk_prob": True}
    return sizes | routed | {"decoder_sparse_step": 1, "mlp_only_layers": []}


SOUND: Json = {
    "chunk_length": 300, "sampling_rate": 16000, "hop_length": 160, "feature_size": 128, "n_fft": 400,
    "n_samples": 4800000,
}  # fmt: skip
WHISPER_L = {
    "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "num_mel_bins": 128,
    "max_source_positions": 1500, "activation_function": "gelu", "scale_embedding": False,
}  # fmt: skip
WHISPER_M = WHISPER_L | {
    "d_model": 1024, "encoder_layers": 24, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096, "num_mel_bins": 80,
}  # fmt: skip


def omni(sizes: Json, vision: Json, **audio: Any) -> tuple[Json, Files]:
    audio = {**WHISPER_L, "output_dim": sizes["hidden_size"], "n_window": 100, **audio}
    vision = vision | {"tokens_per_second": 25}
    thinker = {"text_config": sizes, "vision_config": vision, "audio_config": audio, **OMNI_IDS}
    return {"architectures": ["Qwen2_5OmniModel"], "thinker_config": thinker}, pixels(**AREAS, **SOUND)


def omni3(sizes: Json, vision: Json, **audio: Any) -> tuple[Json, Files]:
    audio = {**WHISPER_L, "output_dim": sizes["hidden_size"], "n_window": 50, "n_window_infer": 800, **audio}
    thinker = {"text_config": sizes, "vision_config": vision, "audio_config": audio, **OMNI3_IDS}
    files = pixels(clip=False, **AREAS | {"patch_size": 16}, **SOUND)
    return {"architectures": ["Qwen3OmniMoeForConditionalGeneration"], "thinker_config": thinker}, files


QWEN_VL = {
    "Qwen2-VL-2B": qwen2_vl(text(1536, 8960, 28, 12, 2, 151936, 32768, 1e6, **MROPE, **TIED)),
    "Qwen2-VL-7B": qwen2_vl(QWEN2_7B | MROPE),
    "Qwen2-VL-72B": qwen2_vl(QWEN2_72B | MROPE),
    "Qwen2.5-VL-3B": qwen25_vl(text(2048, 11008, 36, 16, 2, 151936, 128000, 1e6, **MROPE, **TIED)),
    "Qwen2.5-VL-7B": qwen25_vl(QWEN2_7B | MROPE | {"max_position_embeddings": 128000}),
    "Qwen2.5-VL-32B": qwen25_vl(text(5120, 27648, 64, 40, 8, 152064, 128000, 1e6, **MROPE), 3456),
    "Qwen2.5-VL-72B": qwen25_vl(QWEN2_72B | MROPE | {"max_position_embeddings": 128000}, 3456),
    "Qwen3-VL-2B": qwen3_vl(text(2048, 6144, 28, 16, 8, 151936, 262144, 5e6, head_dim=128, **TIED), small=True),
    "Qwen3-VL-4B": qwen3_vl(text(2560, 9728, 36, 32, 8, 151936, 262144, 5e6, head_dim=128, **TIED), small=True),
    "Qwen3-VL-8B": qwen3_vl(text(4096, 12288, 36, 32, 8, 151936, 262144, 5e6, head_dim=128)),
    "Qwen3-VL-32B": qwen3_vl(text(5120, 25600, 64, 64, 8, 151936, 262144, 5e6, head_dim=128)),
    "Qwen3-VL-30B-A3B": qwen3_vl(moe(2048, 6144, 48, 32, 768)),
    "Qwen3-VL-235B-A22B": qwen3_vl(moe(4096, 12288, 94, 64, 1536)),
    "Qwen2.5-Omni-3B": omni(
        text(2048, 11008, 36, 16, 2, 151936, 32768, 1e6, **MROPE), qwen25_tower(2048, 3420)
    ),
    "Qwen2.5-Omni-7B": omni(QWEN2_7B | MROPE, qwen25_tower(3584, 3420)),
    "Qwen3-Omni-30B-A3B": omni3(
        moe(2048, 768, 48, 32, 768, vocab=152064) | MROPE3 | {"max_position_embeddings": 65536, "rope_theta": 1e6},
        qwen3_tower(2048, small=False),
        downsample_hidden_size=480,
    ),
}  # fmt: skip

# -- audio -------------------------------------------------------------------------------------------------------------


WINDOW = {
    "feature_extractor_type": "WhisperFeatureExtractor", "chunk_length": 30, "sampling_rate": 16000, "hop_length": 160,
    "n_fft": 400, "n_samples": 480000, "nb_max_frames": 3000, "padding_value": 0.0,
}  # fmt: skip


def whisper(width: int, layers: int, heads: int, vocab: int, decoder: int = 0, bins: int = 80) -> tuple[Json, Files]:
    """vocab 51864 is English only; above, 99 languages, and one more at 51866."""
    mlp, decoder = 4 * width, decoder or layers
    end = 50256 if vocab == 51864 else 50257
    return {
        "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper", "torch_dtype": "float16",
        "is_encoder_decoder": True, "d_model": width, "encoder_layers": layers, "decoder_layers": decoder,
        "num_hidden_layers": layers, "encoder_attention_heads": heads, "decoder_attention_heads": heads,
        "encoder_ffn_dim": mlp, "decoder_ffn_dim": mlp, "num_mel_bins": bins, "vocab_size": vocab,
        "max_source_positions": 1500, "max_target_positions": 448, "activation_function": "gelu",
        "scale_embedding": False, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
        "decoder_start_token_id": end + 1,
    }, {"preprocessor_config.json": WINDOW | {"feature_size": bins}}  # fmt: skip


def ultravox(model_type: str, sizes: Json, audio: Json = WHISPER_L, *, mid: bool = True) -> tuple[Json, Files]:
    return {
        "architectures": ["UltravoxModel"], "audio_config": audio, "stack_factor": 8, "hidden_size": 4096,
        "projector_act": "swiglu", "projector_ln_mid": mid, "audio_token_index": sizes["vocab_size"],
        "text_config": {"model_type": model_type, **sizes},
    }, {"preprocessor_config.json": WINDOW | {"feature_size": audio["num_mel_bins"]}}  # fmt: skip


AUDIO = {
    "whisper-tiny.en": whisper(384, 4, 6, 51864),
    "whisper-tiny": whisper(384, 4, 6, 51865),
    "whisper-base": whisper(512, 6, 8, 51865),
    "whisper-small": whisper(768, 12, 12, 51865),
    "whisper-medium": whisper(1024, 24, 16, 51865),
    "whisper-large-v2": whisper(1280, 32, 20, 51865),
    "whisper-large-v3": whisper(1280, 32, 20, 51866, bins=128),
    "whisper-large-v3-turbo": whisper(1280, 32, 20, 51866, decoder=4, bins=128),
    "distil-large-v3": whisper(1280, 32, 20, 51866, decoder=2, bins=128),
    "Qwen2-Audio-7B": (
        {
            "architectures": ["Qwen2AudioForConditionalGeneration"], "audio_config": WHISPER_L,
            "audio_token_index": 151646,
            "text_config": {
                "model_type": "qwen2", "intermediate_size": 11008, "max_position_embeddings": 8192,
                "vocab_size": 156032, "rms_norm_eps": 1e-5, "rope_theta": 10000, "sliding_window": 32768,
                "use_mrope": False,
            },
        },
        {"preprocessor_config.json": WINDOW | {"feature_size": 128}},
    ),
    "ultravox-v0_3": ultravox("llama", LLAMA_8B, WHISPER_M, mid=False),
    "ultravox-v0_4_1-mistral-nemo": ultravox("mistral", NEMO_12B, mid=False),
    "ultravox-v0_5-llama-3_2-1b": ultravox("llama", LLAMA_1B),
    "ultravox-v0_5-llama-3_1-8b": ultravox("llama", LLAMA_8B),
    "ultravox-v0_5-llama-3_3-70b": ultravox("llama", LLAMA_70B),
    "ultravox-v0_6-qwen-3-32b": ultravox("qwen3", QWEN3_32B),
}  # fmt: skip

# -- others ------------------------------------------------------------------------------------------------------------


def phi3_v(window: int, crops: int) -> tuple[Json, Files]:
    layout = {"hd_transform_order": "sub_glb", "use_hd_transform": True, "with_learnable_separator": True}
    return {
        "architectures": ["Phi3VForCausalLM"], "embd_layer": layout,
        "img_processor": {"model_name": "openai/clip-vit-large-patch14-336", "num_img_tokens": 144},
        **PHI3_LONG, "sliding_window": window,
    }, pixels(num_crops=crops)  # fmt: skip


OTHER = {
    "Phi-3-vision-128k": phi3_v(131072, 16),
    "Phi-3.5-vision": phi3_v(262144, 4),
    "VLM2Vec-Full": phi3_v(262144, 4),
    "MiniCPM-V-2_6": (
        {
            "architectures": ["MiniCPMV"], "version": 2.6, "query_num": 64, "drop_vision_last_layer": False,
            "vision_config": SIGLIP_400M | {"num_hidden_layers": 27, "image_size": 980}, **QWEN2_7B,
            "vocab_size": 151666,
        },
        {"preprocessor_config.json": {
            "norm_mean": [0.5] * 3, "norm_std": [0.5] * 3, "scale_resolution": 448, "max_slice_nums": 9,
            "patch_size": 14, "use_image_id": True, "slice_mode": True, "image_feature_size": 64, "version": 2.6,
            "im_start": "<image>", "im_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>",
            "unk": "<unk>", "im_id_start": "<image_id>", "im_id_end": "</image_id>",
        }},
    ),
}  # fmt: skip

PUBLISHED: Mapping[str, tuple[Json, Files]] = {
    **QWEN_VL,
    **LLAVA,
    **AUDIO,
    **OTHER,
    **{name: ({"architectures": [f"{kind}ForCausalLM"], **sizes}, {}) for name, (kind, sizes) in CAUSAL.items()},
}
