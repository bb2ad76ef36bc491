"""Rules of an image tower that is CLIP's or SigLIP's: they name all but CLIP's class token and first norm alike."""

from __future__ import annotations

from mmjax.converters import clip, siglip

RULES = (*siglip.RULES, *clip.FIRST)
IGNORE = (*siglip.IGNORE, *clip.IGNORE)
