"""Phi-3.5-vision, as published; VLM2Vec has the same names. Some checkpoints repeat the embedding in the image part."""

from __future__ import annotations

from mmjax.converters import clip, decoder
from mmjax.converters import transforms as to
from mmjax.converters.table import Rule, Table, linear

TABLE = Table(
    rules=(
        *decoder.RULES,
        *decoder.FUSED,
        *clip.RULES,
        *linear("image.img_projection.0", "projector.fc1"),
        *linear("image.img_projection.2", "projector.fc2"),
        Rule("image.sub_GN", "newline", to.flatten(3)),
        Rule("image.glb_GN", "divider", to.flatten(2)),
    ),
    ignore=(*decoder.IGNORE, *clip.IGNORE),
    prefixes=(
        ("model.vision_embed_tokens.img_processor.vision_model.", "vision."),
        ("model.vision_embed_tokens.", "image."),
        ("model.", "text."),
    ),
    copies={"image.wte.weight": "text.embed_tokens.weight"},
)
