"""The forms in which a prompt may be given. All are plain dictionaries; unknown extra keys are ignored.

Arrays are typed `Any` on purpose: NumPy, JAX and torch arrays are all accepted, and none of them is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypeAlias, TypedDict

MultiModalDataDict: TypeAlias = Mapping[str, Any]
"""modality ("image", "video", "audio") -> one item, a list of items (None = from the cache), or named arrays."""

MultiModalUUIDDict: TypeAlias = Mapping[str, Sequence[str | None] | str]
"""modality -> one name per item; None = identify the item by its content."""


class _Common(TypedDict):
    multi_modal_data: NotRequired[MultiModalDataDict | None]
    mm_processor_kwargs: NotRequired[dict[str, Any] | None]
    multi_modal_uuids: NotRequired[MultiModalUUIDDict | None]
    cache_salt: NotRequired[str]


class TextPrompt(_Common):
    """A text to tokenise, with its media."""

    prompt: str


class TokensPrompt(_Common):
    """Token ids, with their media; `prompt` is only carried into the output."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    token_type_ids: NotRequired[list[int]]


class EmbedsPrompt(_Common):
    """Rows of input embeddings [T, D] in place of tokens."""

    prompt_embeds: Any
    prompt: NotRequired[str]


SingletonPrompt: TypeAlias = str | list[int] | TextPrompt | TokensPrompt | EmbedsPrompt


class ExplicitEncoderDecoderPrompt(TypedDict):
    """Both halves of an encoder-decoder prompt. Media belong to the encoder's half; the decoder's may be None."""

    encoder_prompt: SingletonPrompt
    decoder_prompt: SingletonPrompt | None


PromptType: TypeAlias = SingletonPrompt | ExplicitEncoderDecoderPrompt
