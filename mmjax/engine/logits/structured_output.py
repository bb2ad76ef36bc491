"""Structured output: which tokens may come next so that the answer keeps to a JSON schema, a regex or a choice.

The grammar is followed by llguidance, an optional dependency: `pip install 'mmjax[structured]'`.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.engine.logits.bias import LogitsBias
from mmjax.types import RequestError, TooDeepError, ValidationError

KINDS = ("json", "json_object", "regex", "choice", "grammar")
MAX_SIZE = 1 << 20  # characters of a grammar
# Between the tokens of JSON: one blank, or a new line with its indentation. Small models write blanks without end.
SPACE = r"[\x20\t]|\r?\n[\x20\t]{0,32}"


class CompiledGrammar:
    """A constraint, read and compiled; each answer follows a copy of `matcher`."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher


class GrammarCompiler:
    """The tokens as llguidance wants them; made on first use, which takes about a second for 150 000 tokens."""

    def __init__(self, tokenizer: Any, vocab: int, eos: Sequence[int]) -> None:
        self.tokenizer, self.vocab, self.eos = tokenizer, vocab, list(eos)
        self._made: Any = None
        self._lock = threading.Lock()

    def compile(self, structured: Any) -> CompiledGrammar:
        """Compile a constraint, which may take long; Rules are passed on. The interpreter is free meanwhile.

        RequestError for a constraint that cannot be, or no llguidance.
        """
        if isinstance(structured, CompiledGrammar):
            return structured
        try:
            import llguidance
        except ImportError:
            raise RequestError(
                "structured_outputs need llguidance: pip install 'mmjax[structured]'.", "structured_unavailable"
            ) from None
        if self.tokenizer is None or not self.eos:
            raise RequestError("structured_outputs need a tokenizer with an end-of-sequence token.", "no_tokenizer")
        with self._lock:
            if self._made is None:
                text = (self.tokenizer.directory / "tokenizer.json").read_text(encoding="utf-8")
                self._made = llguidance.LLTokenizer(text, n_vocab=self.vocab, eos_token=self.eos)
        try:
            grammar = _grammar(llguidance.LLMatcher, structured)
        except RecursionError as error:
            raise TooDeepError from error
        matcher = llguidance.LLMatcher(self._made, grammar, log_level=0)
        if matcher.is_error():
            raise ValidationError(
                f"This constraint cannot be followed: {matcher.get_error().splitlines()[0]}",
                parameter="structured_outputs",
            )
        return CompiledGrammar(matcher)


class StructuredOutput:
    """The constraints of one answer that keeps to a grammar, on top of the request's others. See `Constraints`."""

    dynamic = True
    first_timestamp = 0

    def __init__(self, vocabulary: GrammarCompiler, rules: CompiledGrammar, others: LogitsBias) -> None:
        self._matcher = rules.matcher.deep_copy()
        self._others = others
        self._vocab, self._eos = vocabulary.vocab, [t for t in vocabulary.eos if t < vocabulary.vocab]
        self._mask = np.zeros(-(-vocabulary.vocab // 32), np.int32)
        self._address = self._mask.ctypes.data
        self._taken = 0

    def bias_row(self, output_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """f32[V] to add to the logits of the token after `output_ids`, which only ever grow."""
        new = [int(token) for token in output_ids[self._taken :]]
        self._taken = len(output_ids)
        if new and not self._matcher.is_stopped():
            self._matcher.consume_tokens(new)
        if self._matcher.is_stopped():
            self._mask[:] = 0
        else:
            self._matcher.unsafe_compute_mask_ptr(self._address, self._mask.nbytes)
        allowed = np.unpackbits(self._mask.view(np.uint8), count=self._vocab, bitorder="little").view(bool)
        if not allowed.any():  # the grammar has ended
            allowed[self._eos] = True
        row = np.where(allowed, np.float32(0), np.float32(-np.inf))
        others = self._others.bias_row(output_ids)
        both = row if others is None else row + others
        return both if np.isfinite(both).any() else row


def _grammar(matcher: Any, structured: Any) -> str:
    """One of KINDS in llguidance's form. ValidationError for none, several, or one that cannot be read.

    `disable_any_whitespace`: JSON without blanks and line breaks between its tokens, which else are few (SPACE).
    """
    if dataclasses.is_dataclass(structured) and not isinstance(structured, type):
        structured = dataclasses.asdict(structured)
    if not isinstance(structured, Mapping):
        raise _wrong(f"must be a dictionary with one of {', '.join(KINDS)}, got {type(structured).__name__}")
    given = {name: structured[name] for name in KINDS if structured.get(name) not in (None, False)}
    if len(given) != 1:
        raise _wrong(f"must hold exactly one of {', '.join(KINDS)}, got {', '.join(given) or 'none'}")
    [(kind, value)] = given.items()
    if len(str(value)) > MAX_SIZE:
        raise _wrong(f"is longer than {MAX_SIZE} characters")
    try:
        if kind in ("json", "json_object"):
            schema = {"type": "object"} if kind == "json_object" else value
            schema = json.loads(schema) if isinstance(schema, str) else schema
            dense = bool(structured.get("disable_any_whitespace", False))
            spaced = {"whitespace_flexible": not dense, **({} if dense else {"whitespace_pattern": SPACE})}
            return str(matcher.grammar_from_json_schema(schema, defaults=spaced))
        if kind == "regex":
            return str(matcher.grammar_from_regex(value))
        if kind == "grammar":
            return str(matcher.grammar_from_lark(value))
        if (
            not isinstance(value, (list, tuple))
            or not value
            or not all(isinstance(choice, str) and choice for choice in value)
        ):
            raise _wrong("choice must be a list of strings that are not empty")
        options = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
        return str(matcher.grammar_from_lark(f"start: {options}"))
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, ValidationError):
            raise
        raise _wrong(f"{kind} cannot be read: {error}") from error


def _wrong(words: str) -> ValidationError:
    return ValidationError(f"structured_outputs {words}.", parameter="structured_outputs")
