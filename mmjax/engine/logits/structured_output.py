"""Structured output: allows only tokens with which the output conforms to a JSON schema, a regex or a list of choices.

llguidance tracks the grammar. It is an optional dependency: `pip install 'mmjax[structured]'`.

The engine's thread does none of this work. A constraint is compiled on a thread of its own, with its first mask, before
its request is queued; later masks are computed on other threads, and the scheduler leaves out a sequence whose mask is
not ready.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from mmjax.engine.logits import PendingRow
from mmjax.engine.logits.bias import LogitsBias
from mmjax.engine.logits.grammar_limits import check_choices, check_repeats, patterns_of
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import RequestError, TooDeepError, ValidationError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CONSTRAINTS = ("json", "json_object", "regex", "choice", "grammar")
MAX_GRAMMAR_CHARS = 1 << 20
# Between the tokens of JSON: one space, or a line break with indentation. Small models would write spaces forever.
JSON_WHITESPACE = r"[\x20\t]|\r?\n[\x20\t]{0,32}"
# Of a grammar: lexer expressions, lexer states (1 to 2 kB each) and symbols. Of one mask: lexer expressions (14 000 in
# a millisecond) and parser items (20 000 in one).
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 250_000,
}
MAX_COMPILE_S = 10.0
SLOW_MASK_S = 0.001  # of CPU time
NO_EXTENSION = "NoExtensionBias"  # llguidance's word for a grammar that allows no token, and no end


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """A compiled constraint. Every sequence has its own copy of the matcher. first_allowed: bool[V], the tokens that an
    output may begin with."""

    matcher: LLMatcher
    first_allowed: np.ndarray


class GrammarCompiler:
    """Compiles constraints for one vocabulary, which it reads on first use: about a second for 150 000 tokens.

    threads: where servers compile. Most cores are left to the engine and to the masks. mask_threads: where the masks of
    running sequences are computed.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self.tokenizer, self.vocab_size, self.eos_ids = tokenizer, vocab_size, list(eos_ids)
        self._vocabulary: LLTokenizer | None = None
        self._lock = threading.Lock()
        cores = os.cpu_count() or 1
        self.threads = ThreadPoolExecutor(max(1, cores // 4), "grammar")
        self.mask_threads = ThreadPoolExecutor(max(2, min(8, cores // 2)), "mask")

    def compile(self, structured: Any) -> CompiledGrammar:
        """Compile the constraint in `SamplingParams.structured_outputs`, and compute its first mask.

        This may take seconds, most of them without holding the GIL. RequestError for a constraint that cannot be
        compiled or costs more than the limits allow, and if llguidance is not installed.
        """
        start = time.perf_counter()
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
        limits = llguidance.LLParserLimits(**LIMITS, verbose_errors=False)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValidationError(
                f"This constraint cannot be followed: {matcher.get_error().splitlines()[0]}",
                parameter="structured_outputs",
            )
        allowed = self.allowed_tokens(matcher, 0)
        if time.perf_counter() - start > MAX_COMPILE_S:
            raise _invalid(f"took longer to compile than the limit of {MAX_COMPILE_S:.0f} s; simplify the constraint")
        return CompiledGrammar(matcher, allowed)

    def allowed_tokens(self, matcher: LLMatcher, num_tokens: int) -> np.ndarray:
        """bool[V]: the tokens that may follow the `num_tokens` that the matcher has taken; the end-of-sequence tokens
        once the grammar has ended. ValidationError if the matcher has given up: beyond its limits it would let the
        output end anywhere."""
        mask = np.zeros(-(-self.vocab_size // 32), np.int32)
        if not matcher.is_stopped():
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        allowed = np.unpackbits(mask.view(np.uint8), count=self.vocab_size, bitorder="little").view(bool)
        eos_ids = [token for token in self.eos_ids if token < self.vocab_size]
        has_ended = matcher.is_stopped() and not matcher.is_error()
        if not has_ended and (not allowed.any() or (allowed[eos_ids].any() and not matcher.is_accepting())):
            reason = matcher.get_error().partition("\n")[0].strip()
            reason = "nothing that the model can write follows" if reason in ("", NO_EXTENSION) else reason
            figures = ", ".join(f"{name} {value}" for name, value in LIMITS.items())
            raise _invalid(
                f"cannot be followed after {num_tokens} tokens: {reason}. The constraint has no end, or needs more "
                f"than the limits allow ({figures}); simplify it"
            )
        if has_ended:
            allowed[eos_ids] = True
        return allowed


class StructuredOutput:
    """The `LogitsProcessor` of a sequence that follows a grammar. It adds the request's other biases."""

    dynamic = True
    first_timestamp = 0

    def __init__(self, compiler: GrammarCompiler, grammar: CompiledGrammar, bias: LogitsBias) -> None:
        self._compiler = compiler
        self._matcher = grammar.matcher.deep_copy()
        self._bias = bias
        self._num_consumed = 0
        self._is_slow = False
        self._next: Future[np.ndarray] = Future()  # the row of the token after these
        self._next.set_result(self._biased(grammar.first_allowed, ()))

    def prepare(self, output_ids: Sequence[int] | np.ndarray) -> PendingRow:
        """Compute the row after `output_ids`, which must only grow from call to call, on another thread."""
        if len(output_ids) != self._num_consumed:
            new_ids = [int(token) for token in output_ids[self._num_consumed :]]
            self._num_consumed = len(output_ids)
            self._next = self._compiler.mask_threads.submit(self._advance, self._next, new_ids, list(output_ids))
        return PendingRow(self._next, self._is_slow)

    def bias_row(self, output_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """f32[V] to add to the logits of the token after `output_ids`, which must only grow from call to call.
        ValidationError if the grammar cannot be followed any further."""
        return self.prepare(output_ids).row.result()

    def _advance(self, previous: Future[np.ndarray], new_ids: list[int], output_ids: list[int]) -> np.ndarray:
        previous.result()
        start = time.thread_time()
        if not self._matcher.is_stopped():
            self._matcher.consume_tokens(new_ids)
        row = self._biased(self._compiler.allowed_tokens(self._matcher, len(output_ids)), output_ids)
        self._is_slow = time.thread_time() - start > SLOW_MASK_S
        return row

    def _biased(self, allowed: np.ndarray, output_ids: Sequence[int]) -> np.ndarray:
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
            check_repeats(name, patterns_of(schema))
            dense = bool(structured.get("disable_any_whitespace", False))
            return matcher.grammar_from_json_schema(
                schema,
                defaults={"whitespace_flexible": False}
                if dense
                else {"whitespace_flexible": True, "whitespace_pattern": JSON_WHITESPACE},
            )
        if name == "regex":
            check_repeats(name, iter([value]))
            return matcher.grammar_from_regex(value)
        if name == "grammar":
            check_repeats(name, iter([value]))
            return matcher.grammar_from_lark(value)
        if (
            not isinstance(value, (list, tuple))
            or not value
            or not all(isinstance(choice, str) and choice for choice in value)
        ):
            raise _invalid("choice must be a list of strings that are not empty")
        check_choices(value)
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
        # a terminal: the parser takes 2000 alternatives at most, the lexer any number
        return matcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, ValidationError):
            raise
        raise _invalid(f"{name} cannot be read: {error}") from error


def _invalid(message: str) -> ValidationError:
    return ValidationError(f"structured_outputs {message}.", parameter="structured_outputs")
