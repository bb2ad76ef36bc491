"""The output of one generated sequence: its tokens, text, log-probabilities and finish reason."""

from __future__ import annotations

import dataclasses

import numpy as np

from mmjax.engine.output_processor import LogprobsChunk, PromptChunk, StepResult
from mmjax.engine.sequence import EngineSequence
from mmjax.outputs.detokenizer import Detokenizer
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import CompletionOutput, Logprob


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one output of a request has gained since its last delta. The last one has a finish_reason."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


class CompletionState:
    """The `OutputProcessor` of a generated sequence. eos_id: the end-of-sequence token; it leaves stop_reason None."""

    def __init__(self, seq: EngineSequence, tokenizer: Tokenizer | None, eos_id: int | None) -> None:
        self.seq = seq
        self.eos_id = eos_id
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: Exception | None = None
        self.cumulative_logprob = 0.0
        self.logprobs: list[dict[int, Logprob]] | None = None if seq.params.logprobs is None else []
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if seq.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * seq.prompt_len
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None and seq.params.detokenize:
            self._detokenizer = Detokenizer(tokenizer, seq.prompt.token_ids.tolist(), seq.params)
        self._delta_start: tuple[int, int] | None = (
            0,
            0,
        )  # (characters, tokens) in all deltas so far; None after the last

    def take(self, result: StepResult, column: int, steps: int) -> None:
        """Take the tokens sampled by a dispatch, up to the end of the output."""
        token_ids = result.token_ids(column, steps)
        self._append(token_ids, None if self.logprobs is None else result.logprobs(column, token_ids))

    def take_prompt(self, result: StepResult, chunk: PromptChunk) -> None:
        """Take the log-probabilities of a chunk of the prompt."""
        assert self.prompt_logprobs is not None
        logprobs = result.prompt_logprobs(chunk)
        for i in range(chunk.num_tokens):
            self.prompt_logprobs[chunk.first + i] = self._entry(logprobs, i, self.seq.params.prompt_logprobs or 0)

    def finish(self, reason: str, stop: int | str | None) -> None:
        """End the output, and release the text that was held back."""
        self.finish_reason = reason
        self.stop_reason = stop
        if self._detokenizer is not None:
            self._detokenizer.finish()

    @property
    def text(self) -> str:
        """The text so far."""
        return "" if self._detokenizer is None else self._detokenizer.text

    def new_delta(self) -> Delta | None:
        """What the output has gained since the last delta; None if nothing."""
        if self._delta_start is None:
            return None
        text, seq, ended = self.text, self.seq, self.finish_reason is not None
        end = len(text), seq.output_len
        if end == self._delta_start and not ended:
            return None
        num_chars, num_tokens = self._delta_start
        self._delta_start = None if ended else end
        return Delta(
            index=seq.index,
            text=text[num_chars:],
            token_ids=seq.output_ids[num_tokens:].tolist(),
            logprobs=None if self.logprobs is None else self.logprobs[num_tokens : seq.output_len],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def output(self) -> CompletionOutput:
        """The output so far."""
        return CompletionOutput(
            index=self.seq.index,
            text=self.text,
            token_ids=self.seq.output_ids.tolist(),
            cumulative_logprob=self.cumulative_logprob if self.logprobs is not None else None,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _append(self, token_ids: np.ndarray, logprobs: LogprobsChunk | None) -> None:
        """Append sampled tokens i32[n] and their log-probabilities."""
        seq, before = self.seq, self.seq.num_tokens
        new_ids, end = self._until_end(token_ids.tolist())
        seq.append_tokens(new_ids)
        if self._detokenizer is not None:
            hide_last = end is not None and end[0] == "stop" and not seq.params.include_stop_str_in_output
            self._detokenizer.push(new_ids[:-1] if hide_last else new_ids)
            if self._detokenizer.stopped is not None:
                seq.num_tokens = before + self._detokenizer.consumed
                end = ("stop", self._detokenizer.stopped)
        if logprobs is not None and self.logprobs is not None:
            for i in range(seq.num_tokens - before):
                self.cumulative_logprob += float(logprobs.logprobs[i])
                self.logprobs.append(self._entry(logprobs, i, seq.params.logprobs or 0))
        if end is not None:
            self.finish(*end)

    def _until_end(self, token_ids: list[int]) -> tuple[list[int], tuple[str, int | str | None] | None]:
        """The tokens up to the one that ends the output, and (finish reason, stop reason) if one does."""
        seq, params = self.seq, self.seq.params
        before = seq.output_len
        token_ids = token_ids[: seq.max_tokens - before]
        for i in range(max(0, params.min_tokens - before), len(token_ids)):
            token = token_ids[i]
            if token in seq.stop_ids:
                return token_ids[: i + 1], ("stop", None if token == self.eos_id and not params.ignore_eos else token)
        return token_ids, ("length", None) if before + len(token_ids) == seq.max_tokens else None

    def _entry(self, logprobs: LogprobsChunk, i: int, count: int) -> dict[int, Logprob]:
        """Token i and the `count` likeliest tokens at its position (all of them when -1), by id."""
        count = logprobs.top_ids.shape[1] if count == -1 else count
        ids = [int(logprobs.token_ids[i]), *logprobs.top_ids[i, :count].tolist()]
        values = [float(logprobs.logprobs[i]), *logprobs.top_logprobs[i, :count].tolist()]
        ranks = [int(logprobs.ranks[i]), *range(1, count + 1)]
        texts = [None if self._tokenizer is None else self._tokenizer.text_of(t) for t in ids]
        entry: dict[int, Logprob] = {}
        for token, value, rank, text in zip(ids, values, ranks, texts, strict=True):
            entry.setdefault(token, Logprob(value, rank, text))
        return entry
