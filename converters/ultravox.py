"""Ultravox: the projector and, depending on the release, the encoder, the language model, both or neither. The config
names the checkpoints of the others: `text_model_id` a Llama's, `audio_model_id` a Whisper's.
"""

from __future__ import annotations

from mmjax.converters import decoder
from mmjax.converters import transforms as to
from mmjax.converters.table import Part, Rule, Table

from . import whisper_encoder

TABLE = decoder.any_text_model(
    Table(
        rules=(
            *decoder.RULES,
            *whisper_encoder.RULES,
            Rule("projector.ln_pre.weight", "projector.norm1"),
            Rule("projector.linear_1.weight", "projector.fc1", to.split_gate_up),
            Rule("projector.ln_mid.weight", "projector.norm2"),
            Rule("projector.ln_post.weight", "projector.norm2"),  # up to v0.4.1
            Rule("projector.linear_2.weight", "projector.fc2", to.transpose),
        ),
        ignore=decoder.IGNORE,
        prefixes=(
            ("language_model.model.", "text."),
            ("language_model.lm_head.", "lm_head."),
            ("audio_tower.", "audio."),
            ("multi_modal_projector.", "projector."),
        ),
        parts=(
            Part("text_model_id", "text_config", source_prefix="", prefix="language_model."),
            Part("audio_model_id", "audio_config", source_prefix="model.encoder.", prefix="audio_tower."),
        ),
    )
)
