"""Tokens to text as they come, with stop strings.

A token's text depends on its neighbours in two ways only: a character may be spread over several tokens, and some
tokenizers drop the space before the very first word. So each token becomes bytes once, an incremental UTF-8 decoder
joins them, and the cost is linear in the length of the output.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Sequence, Set
from typing import Protocol

from mmjax.types import SamplingParams

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextDecoder(Protocol):
    """The half of a tokenizer that is needed here."""

    def __hash__(self) -> int: ...

    @property
    def special_ids(self) -> Set[int]: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def token_of(self, index: int) -> str | None: ...


class Detokenizer:
    """The text of one output.

    `text`: what has been released so far. `stopped`: the stop string that ended the output, or None. `consumed`: how
    many tokens of the latest `push` belong to the output; fewer than were pushed only if a stop string ended it.

    Text that may turn out to be the beginning of a stop string is held back until it is known not to be, and so are
    incomplete characters. A stop string counts if it is completed by a token after the first `min_tokens`. Of several,
    the one completed first counts, and of those completed at once the longest: so the result does not depend on how
    the text was cut into tokens, nor tokens into pushes.
    """

    def __init__(self, tokenizer: TextDecoder, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._pieces = _pieces(tokenizer)
        self._hidden: Set[int] = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self._utf8 = self._pieces.incremental()
        self._strip = self._pieces.strips and all(token in self._hidden for token in prompt_ids)
        self._tight = not params.spaces_between_special_tokens
        self._after_special = False
        self._stops = [_Stop(stop) for stop in params.stop or ()]
        self._keep_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._count = 0
        self._parts: list[str] = []
        self._held = ""
        self.stopped: str | None = None
        self.consumed = 0

    @property
    def text(self) -> str:
        self._parts[:] = ["".join(self._parts)]
        return self._parts[0]

    def push(self, new_ids: Sequence[int]) -> str:
        """Take the next tokens of the output; returns the text they release. Tokens after a stop string are ignored."""
        self.consumed = 0
        fresh = []
        for token in new_ids:
            if self.stopped is not None:
                break
            self.consumed += 1
            self._count += 1
            fresh.append(self._scan(self._decode(token)))
        return self._release("".join(fresh))

    def finish(self) -> str:
        """No more tokens will come: release what was held back, with U+FFFD for an incomplete character."""
        if self.stopped is None:
            self._held += self._utf8.decode(b"", final=True)
        rest, self._held = self._held, ""
        return self._release(rest)

    def _release(self, text: str) -> str:
        self._parts.append(text)
        return text

    def _decode(self, token: int) -> str:
        """The characters that this token completes."""
        if token in self._hidden:
            return ""
        piece, joins = self._pieces.piece(token)
        special = token in self._pieces.special_ids
        if self._tight and special and self._after_special:
            piece = piece.lstrip(b" ")
        self._after_special = special
        text = "" if joins else self._utf8.decode(b"", final=True)
        text += self._utf8.decode(piece)
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        return text

    def _scan(self, text: str) -> str:
        """The part of held text plus `text` that can be released."""
        text, scanned = self._held + text, len(self._held)
        for end in range(scanned, len(text)) if self._stops else ():
            complete = [stop for stop in self._stops if stop.feed(text[end])]
            if complete and self._count > self._min_tokens:
                self.stopped = max((stop.text for stop in complete), key=len)
                self._held = ""
                return text[: end + 1 if self._keep_stop else end + 1 - len(self.stopped)]
        hold = max((stop.matched for stop in self._stops), default=0)
        if hold == 0 or self._keep_stop:
            self._held = ""
            return text
        self._held = text[-hold:]
        return text[:-hold]


class _Stop:
    """Knuth-Morris-Pratt matching of one stop string: `matched` characters of it end the text so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._border = [0]  # of each prefix: the longest proper prefix that is also its suffix
        for char in text[1:]:
            self._border.append(self._extend(self._border[-1], char))

    def _extend(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._border[matched - 1]
        return matched + (self.text[matched] == char)

    def feed(self, char: str) -> bool:
        """Take one more character; whether it completes the stop string."""
        self.matched = self._extend(self.matched, char)
        if self.matched < len(self.text):
            return False
        self.matched = self._border[-1]
        return True


class _Pieces:
    """The bytes of each token of a byte-level BPE tokenizer, or of a SentencePiece-like one with byte tokens.

    The text is what the tokenizer itself would decode, except that a run of byte tokens which is partly invalid UTF-8
    keeps its valid characters. The tokenizer would give them up too, and one would have to wait for the end of the run.
    """

    def __init__(self, tokenizer: TextDecoder) -> None:
        self._tokenizer = tokenizer
        self.special_ids = tokenizer.special_ids
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]  # any ordinary token would do
        self._anchor_text = tokenizer.decode(self._anchor, False)
        start = tokenizer.encode(" a", add_special_tokens=False)[:1]
        spelling = "".join(tokenizer.token_of(token) or "" for token in start)
        spaced = tokenizer.decode(start, False).startswith(" ")
        self.byte_level = spelling.startswith("Ġ") and spaced
        self.strips = spelling.startswith("▁") and not spaced
        self._known: dict[int, tuple[bytes, bool]] = {}

    def incremental(self) -> codecs.IncrementalDecoder:
        """A new decoder of joined pieces, which shows invalid bytes as the tokenizer does."""
        return codecs.getincrementaldecoder("utf-8")("replace" if self.byte_level else _EACH_BYTE)

    def piece(self, token: int) -> tuple[bytes, bool]:
        """The token's bytes in the middle of a text, and whether they may continue a character begun before them.

        No bytes for an id that the tokenizer does not have.
        """
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._find(token)
        return found

    def _find(self, token: int) -> tuple[bytes, bool]:
        spelling = self._tokenizer.token_of(token)
        if spelling is None:
            return b"", True
        if self.byte_level:
            known = all(char in _BYTES for char in spelling)
            return bytes(_BYTES[char] for char in spelling) if known else spelling.encode(), True
        byte = BYTE_TOKEN.fullmatch(spelling)
        if byte:
            return bytes.fromhex(byte[1]), True
        return self._tokenizer.decode([*self._anchor, token], False)[len(self._anchor_text) :].encode(), False


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


_EACH_BYTE = "mmjax-replace-each-byte"  # what byte-fallback decoders do, where byte-level ones replace whole sequences
codecs.register_error(_EACH_BYTE, _replace_each_byte)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character of each byte: itself where printable, else the next one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_alphabet()


@functools.lru_cache(maxsize=8)
def _pieces(tokenizer: TextDecoder) -> _Pieces:
    return _Pieces(tokenizer)
