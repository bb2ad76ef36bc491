"""LLaVA-OneVision: published names, the names of transformers since 4.52, and what transformers 5 saves."""

from __future__ import annotations

from mmjax.converters import clip_or_siglip, decoder
from mmjax.converters.table import Rule, Table, linear

TABLE = decoder.any_text_model(
    Table(
        rules=(
            *decoder.RULES,
            *clip_or_siglip.RULES,
            *linear("projector.linear_1", "projector.fc1"),
            *linear("projector.linear_2", "projector.fc2"),
            Rule("image_newline", "newline"),
        ),
        ignore=(*decoder.IGNORE, *clip_or_siglip.IGNORE),
        prefixes=(
            ("model.language_model.", "text."),
            ("language_model.model.", "text."),
            ("language_model.lm_head.", "lm_head."),
            ("model.vision_tower.vision_model.", "vision."),
            ("model.vision_tower.", "vision."),
            ("vision_tower.vision_model.", "vision."),
            ("vision_tower.", "vision."),
            ("model.multi_modal_projector.", "projector."),
            ("multi_modal_projector.", "projector."),
            ("model.image_newline", "image_newline"),
        ),
    )
)
