"""When each word of a transcript is spoken, by the method published with Whisper.

The cross attention of some heads follows the audio while the text is written. Dynamic time warping finds the path
through it, from which each token has a first step; tokens are joined to words, and words with their punctuation.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Sequence

import numpy as np

Decode = Callable[[Sequence[int]], str]

MEDIAN_STEPS = 7  # over which the attention is smoothed
UNSPACED = frozenset({"zh", "ja", "th", "lo", "my", "yue"})  # languages without spaces between words
OPENING = frozenset("\"'“¿([{-")
CLOSING = frozenset("\"'.。,，!！?？:：”)]}、")  # noqa: RUF001
SENTENCE_ENDS = frozenset(".。!！?？")  # noqa: RUF001
LONGEST_MEDIAN_S = 0.7  # of the median length of a word, by which long ones are measured
PAUSE_MEDIANS = 4  # as many times as long, a word after a pause includes the pause


@dataclasses.dataclass(frozen=True)
class Word:
    """A word with its times in seconds, and how many tokens it has."""

    text: str
    start: float
    end: float
    num_tokens: int = 1


def time_words(words: Sequence[Word], scores: np.ndarray, first_row: int, step_s: float) -> list[Word]:
    """Words with their times in a chunk.

    scores: f32[A, T, U], of the encoder's steps that are audio, of step_s seconds each. first_row: of the token before
    the first one of the words; the last row is of the end of the transcript.
    """
    starts = first_steps(alignment_matrix(scores)[first_row:-1]) * step_s  # of each token, and of the end
    bounds = np.cumsum([0, *(word.num_tokens for word in words)])
    return [
        dataclasses.replace(word, start=float(starts[begin]), end=float(starts[end]))
        for word, begin, end in zip(words, bounds, bounds[1:], strict=False)
    ]


def alignment_matrix(scores: np.ndarray) -> np.ndarray:
    """float64 [T, U]: the mean over heads of the smoothed attention, of scores f32[A, T, U]."""
    from scipy.special import softmax

    matrix: np.ndarray = smoothed(softmax(scores.astype(np.float64), axis=-1)).mean(axis=0)
    return matrix


def smoothed(weights: np.ndarray) -> np.ndarray:
    """Attention [A, T, U], of each head and step in standard deviations over all tokens, smoothed over time."""
    from scipy.ndimage import median_filter

    spread = weights.std(axis=1, keepdims=True)
    weights = (weights - weights.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
    if weights.shape[2] > MEDIAN_STEPS // 2:
        weights = median_filter(weights, size=(1, 1, MEDIAN_STEPS), mode="mirror")
    return weights


def first_steps(matrix: np.ndarray) -> np.ndarray:
    """int [T]: the first step of each row on the path of the largest sum from the first row and step to the last ones.

    A path goes one row down, one step on, or both (dynamic time warping). Cells of one antidiagonal only depend on
    those of the two before it, so each antidiagonal is one operation.
    """
    rows, steps = matrix.shape
    cost = np.full((rows + 1, steps + 1), np.inf)
    cost[0, 0] = 0
    for total in range(2, rows + steps + 1):
        row = np.arange(max(1, total - steps), min(rows, total - 1) + 1)
        step = total - row
        before = np.minimum(np.minimum(cost[row - 1, step - 1], cost[row - 1, step]), cost[row, step - 1])
        cost[row, step] = before - matrix[row - 1, step - 1]
    first = np.zeros(rows, np.int64)
    row, step = rows, steps
    while row > 0 and step > 0:
        first[row - 1] = step - 1
        both, down, on = cost[row - 1, step - 1], cost[row - 1, step], cost[row, step - 1]
        if both < down and both < on:
            row, step = row - 1, step - 1
        elif down < both and down < on:
            row -= 1
        else:
            step -= 1
    return first


def split_words(token_ids: Sequence[int], decode: Decode, language: str) -> list[Word]:
    """The words of a text, without times: whole characters each, joined up to the next space where the language has
    spaces. Punctuation is a word of its own."""
    whole, done, pending = decode(token_ids), 0, []
    pieces: list[Word] = []
    for token in token_ids:
        pending.append(token)
        text = decode(pending)
        # U+FFFD ends an incomplete character, unless the text itself has it there
        at = done + text.find("\ufffd")
        if "\ufffd" not in text or whole[at : at + 1] == "\ufffd":
            pieces.append(Word(text, 0.0, 0.0, len(pending)))
            done, pending = done + len(text), []
    if pending:
        pieces.append(Word(decode(pending), 0.0, 0.0, len(pending)))
    if language in UNSPACED:
        return pieces
    words: list[Word] = []
    for piece in pieces:
        begins = piece.text.startswith(" ") or piece.text.strip() in string.punctuation
        if begins or not words:
            words.append(piece)
        else:
            words[-1] = _joined(words[-1], piece)
    return words


def _joined(word: Word, piece: Word) -> Word:
    """A word and what follows it, with the times of the word."""
    return dataclasses.replace(word, text=word.text + piece.text, num_tokens=word.num_tokens + piece.num_tokens)


def merge_punctuation(words: Sequence[Word]) -> list[Word]:
    """Words with the punctuation before and after them, whose own times are dropped."""
    found: list[Word] = []
    opening: Word | None = None
    for word in words:
        if opening is not None:
            word = dataclasses.replace(
                word, text=opening.text + word.text, num_tokens=opening.num_tokens + word.num_tokens
            )
            opening = None
        if word.text.startswith(" ") and word.text.strip() and OPENING.issuperset(word.text.strip()):
            opening = word
        elif found and not found[-1].text.endswith(" ") and word.text in CLOSING:
            found[-1] = _joined(found[-1], word)
        else:
            found.append(word)
    return found if opening is None else [*found, opening]


def shorten(words: Sequence[Word], segments: Sequence[tuple[float, float, int]]) -> list[Word]:
    """Words without the pauses that the path gives them: at the end of a sentence, and around a segment.

    segments: (start, end, number of tokens), in the order of the words. A word is long if it is longer than twice the
    median; it then ends, or begins, where the segment does, or is cut to twice the median.
    """
    lengths = [word.end - word.start for word in words if word.end > word.start]
    median = min(LONGEST_MEDIAN_S, float(np.median(lengths))) if lengths else 0.0
    longest, found = 2 * median, list(words)
    for i in range(1, len(found)):
        if found[i].end - found[i].start > longest:
            if found[i].text in SENTENCE_ENDS:
                found[i] = dataclasses.replace(found[i], end=found[i].start + longest)
            elif found[i - 1].text in SENTENCE_ENDS:
                found[i] = dataclasses.replace(found[i], start=found[i].end - longest)
    found = merge_punctuation(found)
    index, spoken_until = 0, 0.0
    for start, end, num_tokens in segments:
        begin, taken = index, 0
        while index < len(found) and taken < num_tokens:
            taken += found[index].num_tokens
            index += 1
        if index > begin:
            part = _shorten_segment(found[begin:index], start, end, median, spoken_until)
            found[begin:index], spoken_until = part, part[-1].end
    return found


def _shorten_segment(words: list[Word], start: float, end: float, median: float, spoken_until: float) -> list[Word]:
    """The words of one segment. spoken_until: when the last word before them ended."""
    longest, first = 2 * median, words[0]
    second = words[1] if len(words) > 1 else None
    if first.end - spoken_until > PAUSE_MEDIANS * median and (
        first.end - first.start > longest or (second is not None and second.end - first.start > 2 * longest)
    ):
        if second is not None and second.end - second.start > longest:
            bound = max(second.end / 2, second.end - longest)
            first, words[1] = dataclasses.replace(first, end=bound), dataclasses.replace(second, start=bound)
        first = dataclasses.replace(first, start=max(0.0, first.end - longest))
    if first.start + 0.5 < start < first.end:
        first = dataclasses.replace(first, start=max(0.0, min(first.end - median, start)))
    words[0] = first
    last = words[-1]
    if last.start < end < last.end - 0.5:
        words[-1] = dataclasses.replace(last, end=max(last.start + median, end))
    return words
