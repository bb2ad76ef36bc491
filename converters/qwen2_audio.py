"""Qwen2-Audio: published names, and the names of transformers since 4.52."""

from __future__ import annotations

from mmjax.converters import decoder
from mmjax.converters.table import Table, linear

from . import whisper_encoder

TABLE = decoder.any_text_model(
    Table(
        rules=(*decoder.RULES, *whisper_encoder.RULES, *linear("projector.linear", "project")),
        ignore=decoder.IGNORE,
        prefixes=(
            ("model.language_model.", "text."),
            ("language_model.model.", "text."),
            ("language_model.lm_head.", "lm_head."),
            ("model.audio_tower.", "audio."),
            ("audio_tower.", "audio."),
            ("model.multi_modal_projector.", "projector."),
            ("multi_modal_projector.", "projector."),
        ),
    )
)
