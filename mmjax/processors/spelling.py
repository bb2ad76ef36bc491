"""Prompts in tokens, spelled as text that can be searched and cut, and tokenised again."""

import re
from collections.abc import Sequence

from mmjax.text.tokenizer import Tokenizer

FIRST = 0xD800  # a special token is spelled as a lone surrogate, which no text can hold
LONE = re.compile("([\ud800-\udfff])")


class SpelledPrompt:
    """One prompt: its text, and the tokens it was made of. The tokenizer never looks across a special token, so pieces
    between two of them can be tokenised by themselves; those that are not cut keep the tokens they came with."""

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[int]):
        self.tokenizer = tokenizer
        self.specials = sorted(tokenizer.special_ids)
        letters = {token: chr(FIRST + number) for number, token in enumerate(self.specials)}
        self._pieces: dict[str, list[int]] = {}
        out, piece = [], list[int]()
        for token in (*tokens, None):
            if token is not None and token not in letters:
                piece.append(token)
                continue
            if piece:
                out.append(tokenizer.decode(piece))
                self._pieces[out[-1]] = piece
            if token is not None:
                out.append(letters[token])
            piece = []
        self.text = "".join(out)

    def tokens(self, text: str) -> list[int]:
        """Tokens of a part of `text`."""
        out: list[int] = []
        for piece in filter(None, LONE.split(text)):
            if LONE.match(piece):
                out.append(self.specials[ord(piece) - FIRST])
            else:
                out += self._pieces.get(piece) or self.tokenizer.encode(piece, add_special_tokens=False)
        return out
