"""Reads `tokenization_kwargs`: special tokens, and how many tokens of a prompt to use."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmjax.types import ValidationError

TOKENIZATION_KWARGS = ("add_special_tokens", "truncate_prompt_tokens", "truncation_side", "truncation", "max_length")


@dataclasses.dataclass(frozen=True)
class TokenizationOptions:
    """How a prompt becomes tokens.

    add_special_tokens: None for the model's default. max_used: use this many of the prompt's tokens, None for all;
    from_start: the first ones, not the last ones. max_length: longer prompts are refused, None for the model's length.
    """

    add_special_tokens: bool | None = None
    max_used: int | None = None
    from_start: bool = False
    max_length: int | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any], max_prompt_len: int, *, from_start: bool) -> "TokenizationOptions":
        """Options as transformers and vLLM name them: truncate_prompt_tokens (-1: max_prompt_len), truncation_side
        ("left" cuts the prompt's start), max_length with truncation (true: truncate to max_length). from_start: the
        default. ValidationError for unknown names and wrong values."""
        for name in given:
            if name not in TOKENIZATION_KWARGS:
                raise ValidationError(
                    f"Unknown key in tokenization_kwargs; known are {TOKENIZATION_KWARGS}.", parameter=name
                )
        max_length = _integer(given, "max_length", 1)
        max_used = _integer(given, "truncate_prompt_tokens", -1)
        truncation = given.get("truncation")
        if truncation not in (None, True, False, "longest_first", "do_not_truncate"):
            raise ValidationError("Must be true or false.", parameter="truncation", value=truncation)
        if truncation in (True, "longest_first") and max_used is None:
            max_used = max_prompt_len if max_length is None else max_length
        if truncation in (False, "do_not_truncate"):
            max_used = None
        side = given.get("truncation_side")
        if side not in (None, "left", "right"):
            raise ValidationError("Must be 'left' or 'right'.", parameter="truncation_side", value=side)
        return cls(
            add_special_tokens=given.get("add_special_tokens"),
            max_used=max_prompt_len if max_used == -1 else max_used,
            from_start=from_start if side is None else side == "right",
            max_length=max_length,
        )

    def used(self, length: int) -> slice:
        """The part that is used of a prompt of this length."""
        count = length if self.max_used is None else min(self.max_used, length)
        return slice(count) if self.from_start else slice(length - count, length)

    def truncate(self, token_ids: list[int], num_closing: int) -> list[int]:
        """The token ids that are used. num_closing: of the last ones, which the tokenizer appends to every text, and
        which stay where its end is cut."""
        used = token_ids[self.used(len(token_ids))]
        if not self.from_start or not 0 < num_closing < len(used):
            return used
        return used[:-num_closing] + token_ids[-num_closing:]


def _integer(given: Mapping[str, Any], name: str, least: int) -> int | None:
    value = given.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValidationError(f"Must be an integer >= {least}.", parameter=name, value=value)
    return value
