"""Structured output: allows only tokens with which the output conforms to a JSON schema, a regex or a list of choices.

llguidance tracks the grammar. It is an optional dependency: `pip install 'mmjax[structured]'`.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmjax.engine.logits.bias import LogitsBias
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError, TooDeepError, ValidationError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CONSTRAINTS = ("json", "json_object", "regex", "choice", "grammar")
MAX_GRAMMAR_CHARS = 1 << 20
# Between the tokens of JSON: one space, or a line break with indentation. Small models would write spaces forever.
JSON_WHITESPACE = r"[\x20\t]|\r?\n[\x20\t]{0,32}"


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """A compiled constraint. Every sequence has its own copy of the matcher."""

    matcher: LLMatcher


class GrammarCompiler:
    """Compiles constraints for one vocabulary, which it reads on first use: about a second for 150 000 tokens."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self.tokenizer, self.vocab_size, self.eos_ids = tokenizer, vocab_size, list(eos_ids)
        self._vocabulary: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, structured: Any) -> CompiledGrammar:
        """Compile the constraint in `SamplingParams.structured_outputs`.

        This may take seconds, most of them without holding the GIL. RequestError for a constraint that cannot be
        compiled, and if llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError:
            raise RequestError(
                "structured_outputs need llguidance: pip install 'mmjax[structured]'.", "structured_unavailable"
            ) from None
        if self.tokenizer is None or not self.eos_ids:
            raise RequestError("structured_outputs need a tokenizer with an end-of-sequence token.", "no_tokenizer")
        with self._lock:
            if self._vocabulary is None:
                text = (self.tokenizer.directory / "tokenizer.json").read_text(encoding="utf-8")
                self._vocabulary = llguidance.LLTokenizer(text, n_vocab=self.vocab_size, eos_token=self.eos_ids)
        try:
            grammar = _grammar(llguidance.LLMatcher, structured)
        except RecursionError as error:
            raise TooDeepError from error
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise ValidationError(
                f"This constraint cannot be followed: {matcher.get_error().splitlines()[0]}",
                parameter="structured_outputs",
            )
        return CompiledGrammar(matcher)


class StructuredOutput:
    """The `LogitsProcessor` of a sequence that follows a grammar. It adds the request's other biases."""

    dynamic = True
    first_timestamp = 0

    def __init__(self, compiler: GrammarCompiler, grammar: CompiledGrammar, bias: LogitsBias) -> None:
        self._matcher = grammar.matcher.deep_copy()
        self._bias = bias
        self._vocab_size = compiler.vocab_size
        self._eos_ids = [token for token in compiler.eos_ids if token < compiler.vocab_size]
        self._mask = np.zeros(-(-compiler.vocab_size // 32), np.int32)
        self._mask_pointer = self._mask.ctypes.data
        self._num_consumed = 0

    def bias_row(self, output_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """f32[V] to add to the logits of the token after `output_ids`, which must only grow from call to call."""
        new_ids = [int(token) for token in output_ids[self._num_consumed :]]
        self._num_consumed = len(output_ids)
        if new_ids and not self._matcher.is_stopped():
            self._matcher.consume_tokens(new_ids)
        if self._matcher.is_stopped():
            self._mask[:] = 0
        else:
            self._matcher.unsafe_compute_mask_ptr(self._mask_pointer, self._mask.nbytes)
        allowed = np.unpackbits(self._mask.view(np.uint8), count=self._vocab_size, bitorder="little").view(bool)
        if not allowed.any():  # the grammar has ended
            allowed[self._eos_ids] = True
        row = np.where(allowed, np.float32(0), np.float32(-np.inf))
        bias = self._bias.bias_row(output_ids)
        biased = row if bias is None else row + bias
        return biased if np.isfinite(biased).any() else row


def _grammar(matcher: type[LLMatcher], structured: Any) -> str:
    """The grammar of llguidance for one of CONSTRAINTS. ValidationError for none, several, or an invalid one.

    disable_any_whitespace: JSON without spaces or line breaks between its tokens; otherwise JSON_WHITESPACE is
    allowed there.
    """
    if dataclasses.is_dataclass(structured) and not isinstance(structured, type):
        structured = dataclasses.asdict(structured)
    if not isinstance(structured, Mapping):
        raise _invalid(f"must be a dictionary with one of {', '.join(CONSTRAINTS)}, got {type(structured).__name__}")
    given = {name: structured[name] for name in CONSTRAINTS if structured.get(name) not in (None, False)}
    if len(given) != 1:
        raise _invalid(f"must hold exactly one of {', '.join(CONSTRAINTS)}, got {', '.join(given) or 'none'}")
    [(name, value)] = given.items()
    if len(str(value)) > MAX_GRAMMAR_CHARS:
        raise _invalid(f"is longer than {MAX_GRAMMAR_CHARS} characters")
    try:
        if name in ("json", "json_object"):
            schema = {"type": "object"} if name == "json_object" else value
            schema = json.loads(schema) if isinstance(schema, str) else schema
            dense = bool(structured.get("disable_any_whitespace", False))
            return matcher.grammar_from_json_schema(
                schema,
                defaults={"whitespace_flexible": False}
                if dense
                else {"whitespace_flexible": True, "whitespace_pattern": JSON_WHITESPACE},
            )
        if name == "regex":
            return matcher.grammar_from_regex(value)
        if name == "grammar":
            return matcher.grammar_from_lark(value)
        if (
            not isinstance(value, (list, tuple))
            or not value
            or not all(isinstance(choice, str) and choice for choice in value)
        ):
            raise _invalid("choice must be a list of strings that are not empty")
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
        return matcher.grammar_from_lark(f"start: {choices}")
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, ValidationError):
            raise
        raise _invalid(f"{name} cannot be read: {error}") from error


def _invalid(message: str) -> ValidationError:
    return ValidationError(f"structured_outputs {message}.", parameter="structured_outputs")
