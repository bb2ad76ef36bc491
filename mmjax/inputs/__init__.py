"""Checks prompts and prepares them for the engine.

The names of vLLM's `vllm.inputs` are here too, so that `mmjax.inputs.TextPrompt` works.
"""

from mmjax.types.prompts import (
    EmbedsPrompt,
    ExplicitEncoderDecoderPrompt,
    MultiModalDataDict,
    MultiModalUUIDDict,
    PromptType,
    SingletonPrompt,
    TextPrompt,
    TokensPrompt,
)

__all__ = [
    "EmbedsPrompt",
    "ExplicitEncoderDecoderPrompt",
    "MultiModalDataDict",
    "MultiModalUUIDDict",
    "PromptType",
    "SingletonPrompt",
    "TextPrompt",
    "TokensPrompt",
]
