"""Bias rows from logit_bias, allowed_token_ids and bad_words."""

import numpy as np
import pytest

from mmjax.engine.logits.bias import LogitsBias
from mmjax.types import SamplingParams, ValidationError

VOCAB = 12
IDS = {"cat": [1], " cat": [2], "new york": [3, 4], " new york": [5, 4], "odd": [6], " odd": [7, 6], "": [], " ": []}


class Words:
    """A tokenizer with one id per word, one for the word after a space, and a lone space that some words need."""

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return IDS[text]


def row(output=(), **params):
    return LogitsBias(SamplingParams(**params), VOCAB, Words()).bias_row(output)


def banned(array):
    return np.flatnonzero(np.isneginf(array)).tolist()


def test_no_bias_gives_no_row():
    constraints = LogitsBias(SamplingParams(), VOCAB, None)
    assert constraints.bias_row([1, 2]) is None and not constraints.dynamic


def test_logit_bias_is_clamped():
    got = row(logit_bias={3: 250, "4": -1.5})
    np.testing.assert_array_equal(got, np.array([0, 0, 0, 100, -1.5, *[0] * 7], np.float32))
    assert got.dtype == np.float32


def test_only_allowed_tokens_remain():
    got = row(allowed_token_ids=[2, 5], logit_bias={5: 1, 6: 9})
    assert banned(got) == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
    assert got[2] == 0 and got[5] == 1


def test_bad_word_of_one_token_is_banned_in_both_forms():
    constraints = LogitsBias(SamplingParams(bad_words=["cat"]), VOCAB, Words())
    assert not constraints.dynamic
    assert banned(constraints.bias_row([])) == [1, 2]


def test_space_that_is_its_own_token_is_not_banned():
    assert banned(row(bad_words=["odd"])) == [6]


@pytest.mark.parametrize(
    ("output", "expected"), [([], []), ([3], [4]), ([9, 5], [4]), ([5, 9], []), ([4], []), (np.array([0, 3]), [4])]
)
def test_last_token_of_a_phrase_is_banned_after_the_others(output, expected):
    constraints = LogitsBias(SamplingParams(bad_words=[" new york"]), VOCAB, Words())
    assert constraints.dynamic
    assert banned(constraints.bias_row(output)) == expected


def test_rows_are_independent():
    constraints = LogitsBias(SamplingParams(bad_words=["new york", "cat"]), VOCAB, Words())
    assert banned(constraints.bias_row([3])) == [1, 2, 4]
    assert banned(constraints.bias_row([])) == [1, 2]


def test_word_without_tokens_is_ignored():
    assert row(bad_words=[" "]) is None


def test_bad_words_need_a_tokenizer_and_known_tokens():
    with pytest.raises(ValidationError, match="tokenizer"):
        LogitsBias(SamplingParams(bad_words=["cat"]), VOCAB, None)
    with pytest.raises(ValidationError, match="vocabulary of 2"):
        LogitsBias(SamplingParams(bad_words=["cat"]), 2, Words())
