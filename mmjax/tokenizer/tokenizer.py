"""Converts text to token ids and back, with the tokenizer in tokenizer.json.

The file is read with `tokenizers`, not with transformers, which takes seconds to import and whose AutoTokenizer may
encode differently from the published file.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from mmjax.types import ValidationError


class Tokenizer:
    """The tokenizer of a checkpoint directory. May be used from several threads."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{self.directory} has no tokenizer.json. Download it from the model's repository, or write it once "
                'with `transformers.AutoTokenizer.from_pretrained("<model>").save_pretrained("<directory>")`.'
            )
        self._backend = Backend.from_file(str(file))
        self._backend.no_truncation()  # some published files contain settings of the training run
        self._backend.no_padding()
        # older repositories name the special tokens in a file of their own
        roles = _read_json(self.directory / "special_tokens_map.json")
        self.config: dict[str, Any] = roles | _read_json(self.directory / "tokenizer_config.json")
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._texts: dict[int, str] = {}
        self.eos_id = self._id_from_config("eos_token")
        self.bos_id = self._id_from_config("bos_token")
        self.pad_id = self._id_from_config("pad_token")

    def encode(self, text: str, add_special_tokens: bool = True, *, max_tokens: int | None = None) -> list[int]:
        """The token ids of a text. max_tokens: text that cannot fit is refused before the slow tokenization."""
        if max_tokens is not None and len(text) > max_tokens * self.longest_token:
            raise ValidationError(
                f"This model's maximum context length is {max_tokens} tokens. However, your request has {len(text)} "
                "input characters, which cannot fit. Please reduce the length of the input.",
                parameter="input_text",
                value=len(text),
            )
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            _require_unicode(text)
            raise
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Incomplete UTF-8 becomes U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def text_of(self, index: int) -> str:
        """The text of one token by itself. Cached, because log-probabilities often need the same tokens."""
        text = self._texts.get(index)
        if text is None:
            text = self._texts[index] = self.decode([index], False)
        return text

    def id_of(self, token: str) -> int | None:
        """The id of a token, or None."""
        index: int | None = self._backend.token_to_id(token)
        return index

    def token_of(self, index: int) -> str | None:
        """The token as tokenizer.json spells it, possibly in a byte-level alphabet; or None."""
        token: str | None = self._backend.id_to_token(index)
        return token

    @property
    def vocab_size(self) -> int:
        """The number of tokens, including added ones. A model's embedding may have more rows."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest token. Text with more than n times as many has more than n tokens."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    @functools.cached_property
    def num_closing_tokens(self) -> int:
        """How many special tokens are appended to every text, such as an end of sequence for embeddings."""
        bare, full = (self._backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        return len(full) - starts[0] - len(bare) if bare and starts else 0

    @functools.cached_property
    def hf(self) -> Any:
        """The tokenizer as a Hugging Face object. Importing transformers, on first use, takes seconds."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(self.directory)

    def _id_from_config(self, role: str) -> int | None:
        """The id of a token that tokenizer_config.json names, as a string or as a serialized token."""
        token = self.config.get(role)
        if isinstance(token, dict):
            token = token["content"]
        return None if token is None else self.id_of(token)


def _require_unicode(text: str) -> None:
    """ValidationError for text with a lone surrogate, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValidationError(
            f"The text is not valid Unicode: character {error.start} is a lone surrogate. Remove it.",
            parameter="input_text",
        ) from None


def _read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content
