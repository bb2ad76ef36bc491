"""Tokens from the device become an answer: when it ends, its text, its log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmjax.engine.output_processor import LogprobsChunk, PromptChunk, StepResult
from mmjax.engine.sequence import Sequence
from mmjax.outputs.detokenizer import Detokenizer
from mmjax.types import CompletionOutput, Logprob


class CompletionState:
    """One of a request's answers. `eos`: the end-of-sequence token, whose stop has no reason to tell."""

    def __init__(self, seq: Sequence, tokenizer: Any, eos: int | None) -> None:
        self.seq = seq
        self.eos = eos
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.cumulative_logprob = 0.0
        self.logprobs: list[dict[int, Logprob]] | None = None if seq.params.logprobs is None else []
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if seq.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * seq.prompt_len
        self._tokenizer = tokenizer
        wants_text = tokenizer is not None and seq.params.detokenize
        self._text = Detokenizer(tokenizer, seq.prompt.token_ids.tolist(), seq.params) if wants_text else None

    def take(self, result: StepResult, column: int, steps: int) -> None:
        """Take the tokens that a dispatch has sampled."""
        tokens = result.token_ids(column, steps)
        self.append(tokens, None if self.logprobs is None else result.logprobs(column, tokens))

    def take_prompt(self, result: StepResult, chunk: PromptChunk) -> None:
        """Take the log-probabilities of a chunk of the prompt."""
        assert self.prompt_logprobs is not None
        report = result.prompt_logprobs(chunk)
        for i in range(chunk.num_tokens):
            self.prompt_logprobs[chunk.first + i] = self._entry(report, i, self.seq.params.prompt_logprobs or 0)

    def append(self, tokens: np.ndarray, report: LogprobsChunk | None) -> None:
        """Take the device's newest tokens i32[n], up to where the answer ends."""
        seq, before = self.seq, self.seq.num_tokens
        new, end = self._until_end(tokens.tolist())
        seq.append_tokens(new)
        if self._text is not None:
            unseen = end is not None and end[0] == "stop" and not seq.params.include_stop_str_in_output
            self._text.push(new[:-1] if unseen else new)
            if self._text.stopped is not None:
                seq.num_tokens = before + self._text.consumed
                end = ("stop", self._text.stopped)
        if report is not None and self.logprobs is not None:
            for i in range(seq.num_tokens - before):
                self.cumulative_logprob += float(report.logprobs[i])
                self.logprobs.append(self._entry(report, i, seq.params.logprobs or 0))
        if end is not None:
            self.finish(*end)

    def finish(self, reason: str, stop: int | str | None) -> None:
        """The answer is complete."""
        self.finish_reason = reason
        self.stop_reason = stop
        if self._text is not None:
            self._text.finish()

    @property
    def text(self) -> str:
        """The text so far."""
        return "" if self._text is None else self._text.text

    def output(self) -> CompletionOutput:
        """The answer so far, as users see it."""
        return CompletionOutput(
            index=self.seq.index,
            text=self.text,
            token_ids=self.seq.output_ids.tolist(),
            cumulative_logprob=self.cumulative_logprob if self.logprobs is not None else None,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _until_end(self, tokens: list[int]) -> tuple[list[int], tuple[str, int | str | None] | None]:
        """The tokens up to the one that ends the answer, and (finish reason, stop reason) if one does."""
        seq, p = self.seq, self.seq.params
        done = seq.output_len
        tokens = tokens[: seq.max_tokens - done]
        for i in range(max(0, p.min_tokens - done), len(tokens)):
            token = tokens[i]
            if token in seq.stop_ids:
                return tokens[: i + 1], ("stop", None if token == self.eos and not p.ignore_eos else token)
        return tokens, ("length", None) if done + len(tokens) == seq.max_tokens else None

    def _entry(self, report: LogprobsChunk, i: int, count: int) -> dict[int, Logprob]:
        """The sampled token and its `count` best rivals (all when -1), by id."""
        count = report.top_ids.shape[1] if count == -1 else count
        ids = [int(report.token_ids[i]), *report.top_ids[i, :count].tolist()]
        values = [float(report.logprobs[i]), *report.top_logprobs[i, :count].tolist()]
        ranks = [int(report.ranks[i]), *range(1, count + 1)]
        texts = [None if self._tokenizer is None else self._tokenizer.text_of(t) for t in ids]
        entry: dict[int, Logprob] = {}
        for token, value, rank, text in zip(ids, values, ranks, texts, strict=True):
            entry.setdefault(token, Logprob(value, rank, text))
        return entry
