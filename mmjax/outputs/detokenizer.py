"""Converts tokens to text as they are sampled, and finds stop strings.

A token's text depends on its neighbors in only two ways: a character may span several tokens, and some tokenizers drop
the space before the first word. So each token is converted to bytes once, an incremental UTF-8
decoder joins them, and the cost is linear in the length of the output.
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
    """The part of a tokenizer that detokenizing needs."""

    def __hash__(self) -> int: ...

    @property
    def special_ids(self) -> Set[int]: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def token_of(self, index: int) -> str | None: ...


class Detokenizer:
    """The text of one output.

    text: the text released so far. stopped: the stop string that ended the output, or None. consumed: how many tokens
    of the latest `push` belong to the output; all of them unless a stop string has ended it.

    Text that may be the start of a stop string is held back until it is known not to be one, and so are incomplete
    characters. A stop string counts if a token after the first `min_tokens` completes it. Of several stop strings, the
    one completed first counts; of those completed by the same character, the longest. So the result depends neither on
    how the text is split into tokens nor on how the tokens are split into pushes.
    """

    def __init__(self, tokenizer: TextDecoder, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._token_bytes = _token_bytes(tokenizer)
        self._skipped: Set[int] = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self._utf8 = self._token_bytes.utf8_decoder()
        self._strip = self._token_bytes.strips and all(token in self._skipped for token in prompt_ids)
        self._no_spaces = not params.spaces_between_special_tokens
        self._after_special = False
        self._stops = [_StopMatcher(stop) for stop in params.stop or ()]
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._count = 0
        self._released: list[str] = []
        self._held_back = ""
        self.stopped: str | None = None
        self.consumed = 0

    @property
    def text(self) -> str:
        self._released[:] = ["".join(self._released)]
        return self._released[0]

    def push(self, new_ids: Sequence[int]) -> str:
        """Take the next tokens of the output. Returns the text that they release. Tokens after a stop are ignored."""
        self.consumed = 0
        texts = []
        for token in new_ids:
            if self.stopped is not None:
                break
            self.consumed += 1
            self._count += 1
            texts.append(self._scan(self._decode(token)))
        return self._release("".join(texts))

    def finish(self) -> str:
        """Release the text that was held back, with U+FFFD for an incomplete character. No more tokens may follow."""
        if self.stopped is None:
            self._held_back += self._utf8.decode(b"", final=True)
        rest, self._held_back = self._held_back, ""
        return self._release(rest)

    def _release(self, text: str) -> str:
        self._released.append(text)
        return text

    def _decode(self, token: int) -> str:
        """The characters that this token completes."""
        if token in self._skipped:
            return ""
        data, joins = self._token_bytes.get(token)
        special = token in self._token_bytes.special_ids
        if self._no_spaces and special and self._after_special:
            data = data.lstrip(b" ")
        self._after_special = special
        text = "" if joins else self._utf8.decode(b"", final=True)
        text += self._utf8.decode(data)
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        return text

    def _scan(self, text: str) -> str:
        """The part of the held-back text plus `text` that can be released."""
        text, scanned = self._held_back + text, len(self._held_back)
        for end in range(scanned, len(text)) if self._stops else ():
            complete = [stop for stop in self._stops if stop.feed(text[end])]
            if complete and self._count > self._min_tokens:
                self.stopped = max((stop.text for stop in complete), key=len)
                self._held_back = ""
                return text[: end + 1 if self._include_stop else end + 1 - len(self.stopped)]
        hold = max((stop.matched for stop in self._stops), default=0)
        if hold == 0 or self._include_stop:
            self._held_back = ""
            return text
        self._held_back = text[-hold:]
        return text[:-hold]


class _StopMatcher:
    """Knuth-Morris-Pratt matching of one stop string. matched: how many of its characters the text so far ends with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._border = [0]  # for each prefix, the length of its longest proper prefix that is also a suffix
        for char in text[1:]:
            self._border.append(self._extend(self._border[-1], char))

    def _extend(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._border[matched - 1]
        return matched + (self.text[matched] == char)

    def feed(self, char: str) -> bool:
        """Take one more character. Returns whether it completes the stop string."""
        self.matched = self._extend(self.matched, char)
        if self.matched < len(self.text):
            return False
        self.matched = self._border[-1]
        return True


class _TokenBytes:
    """The bytes of each token of a byte-level BPE tokenizer, or of a SentencePiece-like one with byte tokens.

    The text is the tokenizer's own, except that valid characters survive in a run of byte tokens that is partly invalid
    UTF-8. The tokenizer would drop them too, so text could only be released at the end of such a run.
    """

    def __init__(self, tokenizer: TextDecoder) -> None:
        self._tokenizer = tokenizer
        self.special_ids = tokenizer.special_ids
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]  # any ordinary token works
        self._anchor_text = tokenizer.decode(self._anchor, False)
        start = tokenizer.encode(" a", add_special_tokens=False)[:1]
        spelling = "".join(tokenizer.token_of(token) or "" for token in start)
        spaced = tokenizer.decode(start, False).startswith(" ")
        self.byte_level = spelling.startswith("Ġ") and spaced
        self.strips = spelling.startswith("▁") and not spaced
        self._cache: dict[int, tuple[bytes, bool]] = {}

    def utf8_decoder(self) -> codecs.IncrementalDecoder:
        """A new decoder, which replaces invalid bytes as the tokenizer does."""
        return codecs.getincrementaldecoder("utf-8")("replace" if self.byte_level else _EACH_BYTE)

    def get(self, token: int) -> tuple[bytes, bool]:
        """The token's bytes in the middle of a text, and whether they may continue the previous token's character.

        No bytes for an id that the tokenizer does not have.
        """
        found = self._cache.get(token)
        if found is None:
            found = self._cache[token] = self._find(token)
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


_EACH_BYTE = "mmjax-replace-each-byte"  # as byte-fallback decoders do; byte-level ones replace whole sequences
codecs.register_error(_EACH_BYTE, _replace_each_byte)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: the byte's own where that is printable, else the next one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_alphabet()


@functools.lru_cache(maxsize=8)
def _token_bytes(tokenizer: TextDecoder) -> _TokenBytes:
    return _TokenBytes(tokenizer)


def bytes_of(tokenizer: TextDecoder, token: int) -> bytes:
    """The bytes that a token adds to a text: part of a character if it is one of several tokens of it."""
    return _token_bytes(tokenizer).get(token)[0]
