"""logit_bias, allowed_token_ids and bad_words of a request, as one row f32[V] to add to the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mmjax.processors.base import NOTHING_SUPPRESSED, SuppressedTokens
from mmjax.types import SamplingParams, ValidationError


class TextEncoder(Protocol):
    """The part of a tokenizer that bad words need."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


class LogitsBias:
    """The biases of a request over a vocabulary of `vocab` logits; see `LogitsProcessor`.

    dynamic: some bad word has several tokens; its last token is forbidden after the others. Or the first token is yet
    to come, and some tokens must not be it (has_state: this changes with the first token). A logit_bias of the request
    goes before a suppressed token. Raises ValidationError for bad words without a tokenizer, or whose tokens the model
    does not have. The other parameters must have passed SamplingParams.verify.
    """

    first_timestamp = 0  # there are no timestamps

    def __init__(
        self,
        params: SamplingParams,
        vocab: int,
        tokenizer: TextEncoder | None,
        suppressed: SuppressedTokens = NOTHING_SUPPRESSED,
    ) -> None:
        words = _bad_word_ids(params.bad_words or (), vocab, tokenizer)
        self._phrases = [word for word in words if len(word) > 1]
        banned, self._not_first = (
            [token for token in ids if 0 <= token < vocab and token not in (params.logit_bias or {})]
            for ids in (suppressed.ids, suppressed.first_ids)
        )
        self.has_state = bool(self._not_first)
        self.dynamic = bool(self._phrases or self._not_first)
        self._fixed: np.ndarray | None = None
        if words or params.logit_bias or params.allowed_token_ids is not None or banned or self._not_first:
            self._fixed = _fixed_row(params, vocab, [*banned, *(word[0] for word in words if len(word) == 1)])

    def bias_row(self, output_ids: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """f32[V] to add to the logits of the token after `output_ids`; callers must not write to it. None: no token is
        ever biased."""
        if self._fixed is None or not self.dynamic:
            return self._fixed
        if self._not_first and not len(output_ids):
            row = self._fixed.copy()
            row[self._not_first] = -np.inf
            return row if np.isfinite(row).any() else self._fixed
        if not self._phrases:
            self.dynamic = False  # from now on the row stays as it is
            return self._fixed
        longest = max(map(len, self._phrases)) - 1
        tail = tuple(int(token) for token in output_ids[-longest:])
        banned = [phrase[-1] for phrase in self._phrases if tail[-(len(phrase) - 1) :] == phrase[:-1]]
        if not banned:
            return self._fixed
        row = self._fixed.copy()
        row[banned] = -np.inf
        return row

    def prepare(self, output_ids: Sequence[int] | np.ndarray) -> None:
        """None: `bias_row` takes no time."""
        return None


def _fixed_row(params: SamplingParams, vocab: int, banned: Sequence[int]) -> np.ndarray:
    row = np.zeros(vocab, np.float32)
    if params.logit_bias:
        row[list(params.logit_bias)] = list(params.logit_bias.values())
    if params.allowed_token_ids is not None:
        forbidden = np.ones(vocab, bool)
        forbidden[params.allowed_token_ids] = False
        row[forbidden] = -np.inf
    row[list(banned)] = -np.inf
    return row


def _bad_word_ids(words: Sequence[str], vocab: int, tokenizer: TextEncoder | None) -> list[tuple[int, ...]]:
    """The token ids of each word at the start of a text and, where they differ, after a space.

    The form after a space counts only if it has as many tokens and starts with another one: otherwise the space is a
    token of its own, which must not be banned with the word.
    """
    if words and tokenizer is None:
        raise ValidationError("bad_words need a tokenizer.", parameter="bad_words", value=words)
    found: list[tuple[int, ...]] = []
    for word in words:
        assert tokenizer is not None
        bare = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        forms = [bare, spaced] if len(spaced) == len(bare) and spaced[:1] != bare[:1] else [bare]
        for form in filter(None, forms):
            if not all(0 <= token < vocab for token in form):
                raise ValidationError(
                    f"bad_words: {word!r} is tokenized as {list(form)}, outside the model's vocabulary of {vocab}.",
                    parameter="bad_words",
                    value=word,
                )
            found.append(form)
    return found
