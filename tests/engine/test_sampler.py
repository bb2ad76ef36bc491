"""The sampler against plain NumPy definitions, and its determinism, independence and exact truncation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.engine import sampler as sampler


@functools.partial(jax.jit, static_argnames="top")
def run(logits, rows, seen, bias, top=1):
    return sampler.sample(logits, rows, seen, bias, num_logprobs=top)


adjust = jax.jit(sampler._adjust)
weights = jax.jit(sampler._weights)


@functools.cache
def weights_on(platform):
    """`weights` as traced for a platform."""
    bits = sampler.digit_bits(platform)

    def run(*arrays):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampler, "digit_bits", lambda _: bits)
            return sampler._weights(*arrays)

    return jax.jit(run)


def rows_of(size, **given):
    """Metadata with the `given` values, scalars or one value per row; greedy and off otherwise."""
    off = dict.fromkeys(["temperature", "min_p", "presence_penalty", "frequency_penalty"], 0.0) | dict(
        top_p=1.0, repetition_penalty=1.0
    )
    off |= dict.fromkeys(["top_k", "output_len", "row", "min_tokens_left", "first_timestamp"], 0)
    off |= dict.fromkeys(["has_penalties", "has_bias", "want_logprobs"], False)
    dtypes = {float: np.float32, int: np.int32, bool: np.bool_}
    fields = {name: np.full(size, value, dtypes[type(value)]) for name, value in off.items()}
    for name, value in given.items():
        fields[name][...] = value
    return sampler.SamplingMetadata(
        **fields, seed=np.zeros((size, 2), np.int32), stop_ids=np.full((size, 2), -1, np.int32)
    )


def tables(rows, vocab):
    return np.zeros((rows, vocab), np.int32), np.zeros((rows, vocab), np.float32)


def noise(size, vocab, seed=0):
    return np.random.default_rng(seed).normal(size=(size, vocab)).astype(np.float32) * 3


def draw(logits, count, **given):
    """`count` draws from one row of logits: the draws differ by `output_len` only."""
    rows = rows_of(count, output_len=np.arange(count), **given)
    return np.asarray(run(np.tile(logits, (count, 1)), rows, *tables(1, len(logits))).token_ids)


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def assert_distributed(tokens, p):
    """Pearson's statistic within five standard deviations of its mean, for fixed seeds."""
    expected = p * len(tokens)
    counts = np.bincount(tokens, minlength=len(p))
    assert not counts[p == 0].any()
    kept = p > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize("vocab", [1, 1031, 2048])  # one entry, padded blocks, whole blocks
def test_greedy_takes_the_first_of_the_largest(vocab):
    logits = np.round(noise(5, vocab))  # rounding makes ties
    out = run(logits, rows_of(5), *tables(1, vocab))
    np.testing.assert_array_equal(out.token_ids, logits.argmax(-1))
    assert not np.any(out.logprobs) and not np.any(out.ranks) and not np.any(out.top_ids)


def test_distribution_follows_the_temperature():
    logits = np.array([2.0, 1.0, 0.0, -1.0, 1.5, -np.inf, 0.3, -3.0], np.float32)
    for temperature in (1.0, 0.5, 1.7):
        tokens = draw(logits, 20000, temperature=temperature)
        assert_distributed(tokens, softmax(logits / np.float32(temperature)))


@pytest.mark.parametrize("vocab", [1031, 2048])
def test_distribution_over_several_blocks(vocab):
    logits = np.full(vocab, -np.inf, np.float32)
    place = np.array([0, 3, 511, 512, 1000, 1023, 1024, vocab - 2, vocab - 1])
    place = np.unique(place[place < vocab])
    logits[place] = np.linspace(-1, 1.5, len(place))
    assert_distributed(draw(logits, 4000, temperature=1.0), softmax(logits))


def reference_support(logits, k, p, min_p):
    """min_p, then top_k, then top_p by sorting; tokens tied with the last one stay."""
    x = logits.astype(np.float64)
    prob = softmax(x)
    keep = prob >= min_p * prob.max() * (1 - 1e-6)
    if k > 0:
        keep &= x >= np.sort(x)[::-1][min(k, len(x)) - 1]
    if p < 1:
        left = np.where(keep, prob, 0)
        ordered = np.sort(left)[::-1]
        last = np.searchsorted(np.cumsum(ordered), p * left.sum() * (1 - 1e-7))
        keep &= left >= ordered[min(last, len(x) - 1)] * (1 - 1e-6)
    return keep & (prob > 0)


def test_distribution_after_every_truncation():
    logits = np.array([2.0, 1.0, 0.0, -1.0, 1.5, -0.5, 0.3, -3.0], np.float32)
    for k, p, min_p in ((6, 1.0, 0.0), (0, 0.85, 0.0), (0, 1.0, 0.2), (5, 0.9, 0.1)):
        expected = np.where(reference_support(logits, k, p, min_p), softmax(logits), 0)
        tokens = draw(logits, 20000, temperature=1.0, top_k=k, top_p=p, min_p=min_p)
        assert_distributed(tokens, expected / expected.sum())


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("ties", [False, True])
def test_truncation_equals_the_sorted_definition(ties, platform):
    weights = weights_on(platform)
    generator = np.random.default_rng(3)
    size, vocab = 64, 500
    logits = noise(size, vocab, 4)
    if ties:
        logits = np.round(logits * 2) / 2
    logits[:8] = np.abs(logits[:8])
    logits[8:16] = -np.abs(logits[8:16]) - 40
    logits[16:20, 100:] = -np.inf
    k = generator.choice([0, 1, 2, 5, 50, 499, 500, 9000], size)
    p = generator.choice([1.0, 0.9, 0.5, 0.1, 1e-6], size).astype(np.float32)
    min_p = generator.choice([0.0, 0.01, 0.3, 1.0], size).astype(np.float32)
    got = np.asarray(weights(logits, rows_of(size, temperature=1, top_k=k, top_p=p, min_p=min_p))) > 0
    for i in range(size):
        expected = reference_support(logits[i], k[i], float(p[i]), float(min_p[i]))
        assert got[i].any()
        np.testing.assert_array_equal(got[i], expected, err_msg=f"k={k[i]} p={p[i]} min_p={min_p[i]}")


def test_top_k_counts_exactly_without_ties():
    logits = noise(6, 3000, 5)
    k = np.array([1, 2, 10, 777, 2999, 3000])
    got = np.asarray(weights(logits, rows_of(6, temperature=1, top_k=k))) > 0
    np.testing.assert_array_equal(got.sum(-1), k)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_wider_digits_find_the_same_thresholds(bits, monkeypatch):
    values = noise(9, 700, 7)
    values[0] = np.abs(values[0])
    values[1, 5:] = -np.inf
    values[2] = np.round(values[2])
    values[3, :3] = np.finfo(np.float32).max
    values[4, :3] = np.inf
    counts = np.array([1, 5, 300, 3, 3, 9, 700, 699, 2], np.float32)
    narrow = np.asarray(jax.jit(sampler._threshold)(values, np.float32(1), counts))
    monkeypatch.setattr(sampler, "digit_bits", lambda _: bits)
    wide = np.asarray(jax.jit(lambda *arrays: sampler._threshold(*arrays))(values, np.float32(1), counts))
    np.testing.assert_array_equal(wide, narrow)
    kept = np.asarray(jnp.sum(jnp.asarray(values) >= wide, axis=1))  # XLA flushes the thresholds next to zero
    assert kept[2] >= 300, "ties are kept"
    np.testing.assert_array_equal(np.delete(kept, 2), [1, 5, 3, 3, 9, 700, 699, 2])


def test_negative_top_k_is_off():
    logits = noise(6, 3000)
    assert np.all(np.asarray(weights(logits, rows_of(6, temperature=1, top_k=-1))) > 0)


def test_a_row_depends_on_nothing_but_itself():
    vocab = 300
    logits = noise(8, vocab, 6)
    want = dict(
        temperature=[0.9, 0.0, 1.3, 0.7, 1.0, 0.0, 2.0, 1.0],
        top_k=[0, 0, 20, 0, 5, 0, 0, 0],
        top_p=[1, 1, 1, 0.8, 0.9, 1, 1, 1],
        min_p=[0, 0, 0, 0, 0, 0, 0.01, 0],
        has_penalties=[0, 1, 0, 1, 0, 0, 0, 1],
        repetition_penalty=[1, 1.4, 1, 1.2, 1, 1, 1, 0.9],
        has_bias=[0, 0, 1, 0, 0, 1, 0, 0],
        output_len=[0, 5, 7, 1, 2, 3, 4, 9],
        row=np.arange(8),
    )
    together = rows_of(8, **want)
    together.seed[:, 0] = np.arange(8) * 11
    generator = np.random.default_rng(0)
    seen = generator.integers(0, 3, (8, vocab)).astype(np.int32)
    bias = generator.normal(size=(8, vocab)).astype(np.float32)
    tokens = np.asarray(run(logits, together, seen, bias).token_ids)
    for i in range(8):
        alone = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], together)
        assert run(logits[i : i + 1], alone, seen, bias).token_ids[0] == tokens[i]
    order = np.array([5, 2, 7, 0, 1, 3])  # another place, other neighbours, another size, other table rows
    moved = jax.tree.map(lambda leaf: leaf[order], together)
    moved = dataclasses.replace(moved, row=np.arange(6, dtype=np.int32))
    again = run(logits[order], moved, seen[order], bias[order]).token_ids
    np.testing.assert_array_equal(again, tokens[order])


def test_seed_and_index_decide():
    logits = np.tile(noise(1, 300, 7) / 6, (6, 1))
    rows = rows_of(6, temperature=1.0, output_len=[0, 0, 0, 0, 0, 1])
    rows.seed[...] = [[1, 0], [1, 0], [2, 0], [1, 1], [-1, -1], [1, 0]]
    tokens = np.asarray(run(logits, rows, *tables(6, 300)).token_ids)
    assert tokens[0] == tokens[1]
    assert len({int(t) for t in tokens[1:]}) == 5  # 1 in 80 by chance; fixed by the seeds


def test_penalties_equal_their_definition():
    vocab = 40
    logits = noise(3, vocab, 8)
    prompt, output = [1, 2, 3, 3], [3, 5, 5, 5, 9]
    seen = np.stack([sampler.token_counts_row(prompt, output, vocab), np.zeros(vocab, np.int32)])
    rows = rows_of(
        3,
        has_penalties=[True, False, True],
        repetition_penalty=[1.5, 1.5, 1.0],
        presence_penalty=0.5,
        frequency_penalty=[0.25, 0.25, -1],
        row=[0, 0, 1],
    )
    got = np.asarray(adjust(logits, rows, seen, np.zeros((2, vocab), np.float32)))
    expected = logits[0].copy()
    for token in set(prompt + output):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token in set(output):
        expected[token] -= 0.25 * output.count(token) + 0.5
    np.testing.assert_allclose(got[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(got[1:], logits[1:])


def test_stops_are_excluded_before_min_tokens():
    vocab = 30
    logits = noise(4, vocab, 9)
    logits[:, 7], logits[:, 11] = 50, 49
    rows = rows_of(4, min_tokens_left=[2, 0, 1, 1])
    rows.stop_ids[...] = [[7, 11], [7, 11], [7, -1], [-1, -1]]
    tokens = run(logits, rows, *tables(2, vocab)).token_ids
    rest = logits[0].copy()
    rest[[7, 11]] = -np.inf
    np.testing.assert_array_equal(tokens, [rest.argmax(), 7, 11, 7])


def test_bias_and_allowed_tokens():
    vocab = 30
    logits = noise(4, vocab, 10)
    bias = np.zeros((2, vocab), np.float32)
    bias[1] = -np.inf
    bias[1, [4, 20]] = [0, 100]
    rows = rows_of(4, has_bias=[True, False, True, False], row=1, temperature=[0, 0, 1, 0])
    tokens = run(logits, rows, np.zeros((2, vocab), np.int32), bias).token_ids
    np.testing.assert_array_equal(tokens, [20, logits[1].argmax(), 20, logits[3].argmax()])


def test_a_row_without_any_possible_token_is_finite():
    bias = np.full((1, 10), -np.inf, np.float32)
    for temperature in (0, 1):
        rows = rows_of(1, has_bias=True, temperature=temperature, top_k=3, top_p=0.5)
        assert 0 <= run(noise(1, 10), rows, np.zeros((1, 10), np.int32), bias).token_ids[0] < 10


@pytest.mark.parametrize(("vocab", "top"), [(20, 0), (20, 20), (5120, 3), (1031 * 7, 2)])
def test_logprobs_are_of_the_raw_logits(vocab, top):
    logits = noise(4, vocab, 11)
    logits[0] = np.round(logits[0])
    rows = rows_of(
        4, want_logprobs=[True, False, False, False], temperature=[5, 5, 0, 0], min_tokens_left=1, has_penalties=True
    )
    rows.stop_ids[:, 0] = logits.argmax(-1)
    out = jax.tree.map(np.asarray, run(logits, rows, *tables(1, vocab), top=top))
    logs = np.log([softmax(line) for line in logits])
    for i, token in enumerate(out.token_ids):
        assert token != rows.stop_ids[i, 0]
        assert out.ranks[i] == 1 + (logits[i] > logits[i, token]).sum()
        np.testing.assert_allclose(out.logprobs[i], logs[i, token], rtol=1e-5, atol=1e-5)
        expected = np.argsort(-logits[i], kind="stable")[:top]
        np.testing.assert_allclose(out.top_logprobs[i], logs[i, expected], rtol=1e-5, atol=1e-5)
        if i:  # row 0 has ties: any of the tied ids may be listed, but each once
            np.testing.assert_array_equal(out.top_ids[i], expected)
        assert len(set(out.top_ids[i].tolist())) == top
        np.testing.assert_array_equal(logits[i, out.top_ids[i]], logits[i, expected])


def test_prompt_logprobs():
    logits = noise(9, 60, 12)
    targets = np.arange(9, dtype=np.int32) * 5
    logprob, rank, ids, values = jax.jit(sampler.prompt_logprobs, static_argnums=2)(logits, targets, 2)
    logs = np.log([softmax(line) for line in logits])
    np.testing.assert_allclose(logprob, logs[np.arange(9), targets], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rank, 1 + (logits > logits[np.arange(9), targets][:, None]).sum(-1))
    np.testing.assert_array_equal(ids, np.argsort(-logits)[:, :2])
    np.testing.assert_allclose(values, -np.sort(-logs)[:, :2], rtol=1e-5, atol=1e-5)


def test_count_tokens_counts_active_penalized_rows_only():
    vocab = 12
    seen = np.stack([sampler.token_counts_row([3], [], vocab), np.zeros(vocab, np.int32)])
    rows = rows_of(4, has_penalties=[True, False, True, True], row=[0, 0, 1, 1])
    token, active = np.array([3, 4, 5, 5], np.int32), np.array([True, True, True, False])
    out = np.asarray(jax.jit(sampler.count_tokens, donate_argnums=0)(jnp.asarray(seen), rows, token, active))
    expected = np.stack([sampler.token_counts_row([3], [3], vocab), sampler.token_counts_row([], [5], vocab)])
    np.testing.assert_array_equal(out, expected)


def test_token_counts_row_ignores_ids_outside_the_vocabulary():
    row = sampler.token_counts_row([0, 99, -1], [2, 2, 50], 10)
    assert row[0] == sampler.IN_PROMPT and row[2] == 2 and row.sum() == sampler.IN_PROMPT + 2
    assert not sampler.token_counts_row([], [], 4).any()
