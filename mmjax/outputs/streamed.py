"""The outputs of a running request, as its deltas arrive."""

from __future__ import annotations

import dataclasses

from mmjax.inputs.input_processor import EngineInput
from mmjax.outputs.completion import Delta
from mmjax.types import CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams


class StreamedOutputs:
    """Makes an output of each delta of a request: with what is new, or with everything so far, as `output_kind` says.

    The last delta waits for `last`, which also has the times of the request.
    """

    def __init__(self, request_id: str, engine_input: EngineInput, params: SamplingParams) -> None:
        self.request_id = request_id
        self.is_delta = params.output_kind is RequestOutputKind.DELTA
        self._prompt = engine_input
        self._so_far: dict[int, CompletionOutput] = {}
        self._unfinished = params.n
        self._last: list[CompletionOutput] = []  # what `last` returns of the last delta

    def add(self, delta: Delta) -> RequestOutput | None:
        """The output after a delta; None after the last one."""
        new = CompletionOutput(
            delta.index,
            delta.text,
            delta.token_ids,
            logprobs=delta.logprobs,
            cumulative_logprob=None if delta.logprobs is None else _sum(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        if not self.is_delta:
            self._so_far[delta.index] = _joined(self._so_far.get(delta.index), new)
        outputs = [new] if self.is_delta else [self._so_far[index] for index in sorted(self._so_far)]
        self._unfinished -= delta.finish_reason is not None
        if not self._unfinished:
            self._last = outputs
            return None
        encoder_ids = self._prompt.encoder_token_ids
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt.prompt,
            prompt_token_ids=self._prompt.token_ids.tolist(),
            prompt_logprobs=None,
            outputs=outputs,
            finished=False,
            encoder_prompt=self._prompt.encoder_prompt,
            encoder_prompt_token_ids=None if encoder_ids is None else encoder_ids.tolist(),
        )

    def last(self, whole: RequestOutput) -> RequestOutput:
        """The last output. whole: the request's, with everything."""
        outputs = self._last if self.is_delta else whole.outputs
        return dataclasses.replace(whole, request_id=self.request_id, outputs=outputs)


def _sum(delta: Delta) -> float:
    """The log-probability of the tokens of a delta."""
    entries = zip(delta.token_ids, delta.logprobs or (), strict=True)
    return sum(entry[token].logprob for token, entry in entries)


def _joined(before: CompletionOutput | None, new: CompletionOutput) -> CompletionOutput:
    """An output with what is new at its end. Neither is changed."""
    if before is None:
        return new
    logprobs = None if new.logprobs is None else [*(before.logprobs or ()), *new.logprobs]
    total = None if new.cumulative_logprob is None else new.cumulative_logprob + (before.cumulative_logprob or 0.0)
    return dataclasses.replace(
        new,
        text=before.text + new.text,
        token_ids=[*before.token_ids, *new.token_ids],
        logprobs=logprobs,
        cumulative_logprob=total,
    )
