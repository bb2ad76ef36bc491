"""Log-probabilities over the whole vocabulary, as arrays instead of dictionaries."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmjax.types import Logprob, RequestOutput


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """f64 [..., V] of logits [..., V]."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def table(entries: Sequence[Mapping[int, Logprob] | None]) -> np.ndarray:
    """f64 [n, V] of n entries that were asked for with -1, which name every token."""
    out = np.empty((len(entries), len(entries[0] or ())))
    for row, entry in zip(out, entries, strict=True):
        assert entry is not None
        entry = {token: logprob for token, logprob in entry.items() if token < len(row)}  # markers may lie beyond
        assert sorted(entry) == list(range(len(row)))
        row[list(entry)] = [logprob.logprob for logprob in entry.values()]
    return out


def prompt_table(output: RequestOutput) -> np.ndarray:
    """f64 [T - 1, V]: the distribution at prompt tokens 1..T-1."""
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    return table(output.prompt_logprobs[1:]) if len(output.prompt_logprobs) > 1 else np.empty((0, 0))


def answer_table(output: RequestOutput) -> np.ndarray:
    """f64 [n, V]: the distribution at each of n generated tokens."""
    assert output.outputs[0].logprobs is not None
    return table(output.outputs[0].logprobs)


def close(ours: np.ndarray, theirs: np.ndarray, atol: float, what: Any) -> None:
    """Assert equal shapes and a largest absolute difference of `atol`, saying where and how far off."""
    assert ours.shape == theirs.shape, f"{what}: {ours.shape} against {theirs.shape}"
    if ours.size:
        gap = np.abs(ours.astype(np.float64) - theirs)
        at = np.unravel_index(int(np.argmax(gap)), gap.shape)
        assert gap[at] <= atol, f"{what}: off by {gap[at]:.2e} at {tuple(map(int, at))}, {(gap > atol).mean():.1%} are"
