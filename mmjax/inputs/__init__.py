"""Checks prompts and prepares them for the engine.

It also exports the names of vLLM's `vllm.inputs`, such as `TextPrompt`.
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
