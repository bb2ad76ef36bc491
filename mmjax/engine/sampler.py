"""Samples tokens from logits: pure functions, vectorized over rows, called inside the jitted step.

The order of operations, per row (S rows of V logits):

 1. log-probabilities and ranks are of the raw logits, before anything below;
 2. while min_tokens_left > 0, stop ids are excluded;
 3. logit_bias is added: the request's, and -inf for tokens that are not allowed; in transcripts with timestamps, where
    all timestamp tokens together are now likelier than any other token, only they remain;
 4. penalties, as defined by the CTRL paper (repetition, over prompt and output) and OpenAI (presence, frequency, over
    the output only);
 5. temperature 0: the first of the largest logits. Otherwise logits / temperature, then
 6. min_p, top_k, top_p, each applied to the tokens left by the previous one; tokens tied at a threshold all stay;
 7. one token is drawn by the Gumbel-max trick.

Steps that no row of a batch needs are skipped at run time (`lax.cond`). Measured with S = 16, V = 151936, in ms:

                 greedy  temperature  + min_p  + top_k  + top_p  penalties or bias  |  jnp.argmax  jnp.sort
    one CPU core    1.0          7.0      7.0       30       30                  3  |          12       657
    one H100       0.06         0.19        -     0.81     0.80               0.19  |        0.03      0.63

Log-probabilities with the 5 likeliest tokens take 5 ms more on the CPU core. The H100's top_k and top_p were taken with
32 passes in a loop, before `digit_bits`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from mmjax.kernels import current_platform

IN_PROMPT = 1 << 30  # a bit of token_counts; the bits below it count the token's occurrences in the output
BLOCK = 1024  # vocabulary entries per block of the two-level searches, at most


PromptLogprobs = tuple[Array, Array, Array, Array]
"""(logprob f32[T], rank i32[T], top_ids i32[T, top], top_logprobs f32[T, top])."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingMetadata:
    """The sampling parameters and state of the S rows of a step."""

    temperature: Array  # f32[S]; this and the next six are fields of SamplingParams, and "off" is the same value
    top_k: Array  # i32[S]; 0 = off
    top_p: Array  # f32[S]
    min_p: Array  # f32[S]
    presence_penalty: Array  # f32[S]
    frequency_penalty: Array  # f32[S]
    repetition_penalty: Array  # f32[S]
    seed: Array  # i32[S, 2]; the low 64 bits of the request's seed, low word first
    output_len: Array  # i32[S]; how many output tokens the sequence already has
    row: Array  # i32[S]; the sequence's row of token_counts and logit_bias; padding uses a row that no sequence has
    has_penalties: Array  # bool[S]; False = the three penalties are ignored and token_counts neither read nor updated
    has_bias: Array  # bool[S]; False = logit_bias is ignored
    first_timestamp: Array  # i32[S]; of biased rows: the id from which all tokens are timestamps; 0 = none is
    min_tokens_left: Array  # i32[S]; tokens required before the sequence may stop
    stop_ids: Array  # i32[S, E]; ids that end the sequence; -1 = padding
    want_logprobs: Array  # bool[S]; log-probabilities are computed for all rows when any row wants them


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerOutput:
    """One step's tokens and their log-probabilities, which are all zeros when no row wants them."""

    token_ids: Array  # i32[S]
    logprobs: Array  # f32[S]; natural log
    ranks: Array  # i32[S]; 1 = the most likely
    top_ids: Array  # i32[S, top]; most likely first
    top_logprobs: Array  # f32[S, top]


def token_counts_row(prompt_ids: Sequence[int], output_ids: Sequence[int], vocab: int) -> np.ndarray:
    """Compute one row i32[V] of token_counts on the host. Ids outside the vocabulary (of embeddings) are ignored."""

    def valid(ids: Sequence[int]) -> np.ndarray:
        array = np.asarray(ids, np.int64).reshape(-1)
        return array[(array >= 0) & (array < vocab)]

    row = np.bincount(valid(output_ids), minlength=vocab).astype(np.int32)
    row[valid(prompt_ids)] |= IN_PROMPT
    return row


def count_tokens(token_counts: Array, metadata: SamplingMetadata, token: Array, active: Array) -> Array:
    """Count token i32[S] in token_counts i32[R, V] for rows that are active bool[S] and have penalties.

    In place if token_counts is donated. Updates of other rows are dropped, so padding rows may share one table row.
    """
    row = jnp.where(active & metadata.has_penalties, metadata.row, token_counts.shape[0])
    return token_counts.at[row, token].add(jnp.int32(1), mode="drop")


def sample(
    logits: Array, metadata: SamplingMetadata, token_counts: Array, logit_bias: Array, *, num_logprobs: int
) -> SamplerOutput:
    """Choose one token per row of logits f32[S, V], with token_counts i32[R, V] and logit_bias f32[R, V].

    A row's token depends on its own logits, parameters, seed and index only: not on other rows, its index in the batch
    or the batch's padding. num_logprobs: how many of the likeliest tokens to report beside the sampled one.
    """
    plain = ~jnp.any(
        metadata.has_penalties | metadata.has_bias | (metadata.min_tokens_left > 0) | (metadata.temperature > 0)
    )
    token = lax.cond(plain, lambda: _argmax(logits), lambda: _choose(logits, metadata, token_counts, logit_bias))
    size = logits.shape[0]

    def no_logprobs() -> PromptLogprobs:
        return (
            jnp.zeros(size, jnp.float32),
            jnp.zeros(size, jnp.int32),
            jnp.zeros((size, num_logprobs), jnp.int32),
            jnp.zeros((size, num_logprobs), jnp.float32),
        )

    logprobs = lax.cond(
        jnp.any(metadata.want_logprobs), lambda: prompt_logprobs(logits, token, num_logprobs), no_logprobs
    )
    return SamplerOutput(token, *logprobs)


def greedy(logits: Array) -> Array:
    """i32[S]: what `sample` chooses from f32[S, V] where no row asks for anything."""
    return _argmax(logits)


def prompt_logprobs(logits: Array, targets: Array, num_logprobs: int) -> PromptLogprobs:
    """The log-probabilities of targets i32[T] under logits f32[T, V].

    Returns (logprob f32[T], rank i32[T], top_ids i32[T, top], top_logprobs f32[T, top]). The rank is one more than the
    number of strictly likelier tokens. Targets past the vocabulary, which some models use as placeholders of media,
    have probability 0.
    """
    norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="fill", fill_value=-jnp.inf)
    rank = 1 + jnp.sum(logits > own, axis=-1, dtype=jnp.int32)
    ids, best = _largest(logits, num_logprobs)
    return (own - norm)[:, 0], rank, ids, best - norm


def _choose(logits: Array, metadata: SamplingMetadata, token_counts: Array, logit_bias: Array) -> Array:
    """The token of each row, when some row needs more than the argmax of its logits."""
    adjusted = metadata.has_penalties | metadata.has_bias | (metadata.min_tokens_left > 0)
    x = _when(adjusted, lambda x: _adjust(x, metadata, token_counts, logit_bias), logits)
    drawn = metadata.temperature > 0
    return lax.cond(jnp.any(drawn), lambda: jnp.where(drawn, _draw(x, metadata), _argmax(x)), lambda: _argmax(x))


def _when(needed: Array, change: Callable[[Array], Array], x: Array) -> Array:
    """change(x) if any row needs it, else x. Returning x costs a copy, so do not chain these on the common path."""
    return lax.cond(jnp.any(needed), change, lambda x: x, x)


def _adjust(x: Array, metadata: SamplingMetadata, token_counts: Array, logit_bias: Array) -> Array:
    """Steps 2 to 4 of the order above, on x f32[S, V]."""

    def forbid_stops(x: Array) -> Array:
        ids = jnp.where(
            (metadata.min_tokens_left[:, None] > 0) & (metadata.stop_ids >= 0), metadata.stop_ids, x.shape[1]
        )
        return jax.vmap(lambda row, row_ids: row.at[row_ids].set(-jnp.inf, mode="drop"))(x, ids)

    def add_bias(x: Array) -> Array:
        return x + jnp.where(metadata.has_bias[:, None], logit_bias[metadata.row], jnp.float32(0))

    x = _when(metadata.min_tokens_left > 0, forbid_stops, x)

    def prefer_timestamps(x: Array) -> Array:
        is_timestamp = jnp.arange(x.shape[1], dtype=jnp.int32) >= metadata.first_timestamp[:, None]
        timestamps = jax.nn.logsumexp(jnp.where(is_timestamp, x, -jnp.inf), axis=1, keepdims=True)
        text = jnp.max(jnp.where(is_timestamp, -jnp.inf, x), axis=1, keepdims=True)
        return jnp.where((metadata.first_timestamp[:, None] > 0) & ~is_timestamp & (timestamps > text), -jnp.inf, x)

    x = _when(metadata.has_bias, add_bias, x)
    x = _when(metadata.first_timestamp > 0, prefer_timestamps, x)
    return _when(metadata.has_penalties, lambda x: _apply_penalties(x, metadata, token_counts[metadata.row]), x)


def _apply_penalties(x: Array, metadata: SamplingMetadata, token_counts: Array) -> Array:
    """Apply the penalties to x f32[S, V], by the rows' token_counts i32[S, V]."""
    count = (token_counts & (IN_PROMPT - 1)).astype(jnp.float32)
    factor = jnp.where(token_counts != 0, metadata.repetition_penalty[:, None], jnp.float32(1))
    y = jnp.where(x > 0, x / factor, x * factor)
    y = (
        y
        - metadata.frequency_penalty[:, None] * count
        - metadata.presence_penalty[:, None] * (count > 0).astype(jnp.float32)
    )
    return jnp.where(metadata.has_penalties[:, None], y, x)


def _draw(x: Array, metadata: SamplingMetadata) -> Array:
    """A random token per row of x f32[S, V]; rows of temperature 0 get an arbitrary one."""
    x = x / jnp.where(metadata.temperature > 0, metadata.temperature, jnp.float32(1))[:, None]

    def key(seed: Array, index: Array) -> Array:
        words = seed[::-1].astype(jnp.uint32)  # in the order of jax.random.key(seed)
        return jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), index.astype(jnp.uint32))

    return _categorical(_weights(x, metadata), jax.vmap(key)(metadata.seed, metadata.output_len))


def _weights(x: Array, metadata: SamplingMetadata) -> Array:
    """f32[S, V]: probabilities of x f32[S, V] relative to the likeliest token's, 0 where step 6 excludes a token.

    The likeliest token is never excluded. Each rule is one threshold per row; only the search for it may be skipped.
    """
    size, vocab = x.shape
    best = jnp.max(x, axis=-1, keepdims=True)
    weight = jnp.exp(x - jnp.where(jnp.isneginf(best), jnp.float32(0), best))

    def kth_largest() -> Array:
        k = jnp.clip(metadata.top_k, 1, vocab).astype(jnp.float32)  # counts are exact in float32 up to 2^24
        return jnp.where((metadata.top_k > 0)[:, None], _threshold(x, jnp.float32(1), k), -jnp.inf)

    floor = lax.cond(jnp.any(metadata.top_k > 0), kth_largest, lambda: jnp.full((size, 1), -jnp.inf, jnp.float32))
    weight = jnp.where((x >= floor) & (weight >= metadata.min_p[:, None]), weight, jnp.float32(0))

    def nucleus() -> Array:
        least = _threshold(weight, weight, metadata.top_p * jnp.sum(weight, axis=-1))
        return jnp.where((metadata.top_p < 1)[:, None], jnp.minimum(least, jnp.float32(1)), jnp.float32(0))

    least = lax.cond(jnp.any(metadata.top_p < 1), nucleus, lambda: jnp.zeros((size, 1), jnp.float32))
    return jnp.where(weight >= least, weight, jnp.float32(0))


def _threshold(value: Array, mass: Array, target: Array) -> Array:
    """f32[S, 1]: the largest t for which the `mass` of all entries with value >= t reaches target f32[S].

    value f32[S, V] has no NaN. A search over the ordered bit patterns of float32, from -inf to +inf, a digit of some
    bits per pass: exact whatever the values are, without a sort. See `digit_bits` for what a pass costs.
    """
    bits = digit_bits(current_platform())
    zero, digits = jnp.float32(0), range(1, 1 << bits)

    def unordered(key: Array) -> Array:
        bits = key ^ ((key >> 31) & jnp.int32(0x7FFFFFFF))  # its own inverse
        return lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    def refine(i: Array, low: Array) -> Array:
        shift = 32 - bits * (i + 1)
        # Sums wrap around past +inf, where all patterns are NaN: no value reaches those.
        keys = [low + lax.shift_left(jnp.int32(digit), shift) for digit in digits]
        masses = tuple(jnp.where(value >= unordered(key), mass, zero) for key in keys)
        # one reduction of all: XLA:GPU reads the values once
        sums = lax.reduce(
            masses, (zero,) * len(keys), lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), (1,)
        )
        digit = functools.reduce(jnp.add, [(total >= target).astype(jnp.int32) for total in sums])
        return low + lax.shift_left(digit, shift)

    start = jnp.full(value.shape[:1], ~0x7F800000, jnp.int32)
    return unordered(lax.fori_loop(0, 32 // bits, refine, start, unroll=bits > 1))


def digit_bits(platform: str) -> int:
    """Bits per pass of `_threshold`: a pass reads the values once and sums them for 2^bits - 1 thresholds.

    On the CPU a pass is bound by its sums: with two bits the search takes twice as long as with one (a sort, 20 times).
    A GPU is bound by launches and by reading: of 256 rows with V = 151936, 156 MB, which take 52 us at 3 TB/s. On an
    H200 a step whose rows sample takes 0.21 ms longer than a greedy one at batch 1 and 2.3 ms at 256 sequences, draw
    and thresholds together (docs/performance.md).
    """
    return 4 if platform == "gpu" else 1


def _argmax(x: Array) -> Array:
    """i32[S]: the first of the largest entries of each row; 0.5 ms where jnp.argmax takes 12 (sizes as above)."""
    blocks = _blocks(x, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1).astype(jnp.int32)
    return block * blocks.shape[-1] + jnp.argmax(_pick(blocks, block), axis=-1).astype(jnp.int32)


def _categorical(weight: Array, keys: Array) -> Array:
    """i32[S]: one entry per row, with probability proportional to weight f32[S, V]; keys[S].

    Gumbel-max first among blocks, by their total weight, then among the entries of the chosen block. That is the same
    distribution as Gumbel-max over the row with about sqrt(V) as many random numbers (1 ms instead of 25).
    """

    blocks = _blocks(weight, 0.0)
    count, width = blocks.shape[1:]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (count + width,), jnp.float32))(keys)
    total = jnp.sum(blocks, axis=-1)
    block = jnp.argmax(jnp.log(total) + noise[:, :count], axis=-1).astype(jnp.int32)
    offset = jnp.argmax(jnp.log(_pick(blocks, block)) + noise[:, count:], axis=-1).astype(jnp.int32)
    return block * width + offset


def _blocks(x: Array, fill: float) -> Array:
    """x f32[S, V] as n blocks of W entries, [S, n, W]; without a copy if V has a suitable divisor W, else padded."""
    size, vocab = x.shape
    width = next((w for w in range(BLOCK, 63, -1) if vocab % w == 0), 0)
    if not width:
        width = min(vocab, BLOCK)
        x = jnp.pad(x, ((0, 0), (0, -vocab % width)), constant_values=fill)
    return x.reshape(size, -1, width)


def _pick(blocks: Array, block: Array) -> Array:
    """The block of each row: [S, n, W] at i32[S] -> [S, W]."""
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def _largest(x: Array, count: int) -> tuple[Array, Array]:
    """(ids i32[S, count], values f32[S, count]) of the largest entries of x f32[S, V], largest first.

    They are searched in the `count` blocks with the largest maxima: no other block can hold one of them.
    """
    blocks = _blocks(x, -jnp.inf)
    width = blocks.shape[-1]
    if not 0 < count < blocks.shape[1]:
        values, ids = lax.top_k(x, count)
        return ids.astype(jnp.int32), values
    best = jnp.sort(lax.top_k(jnp.max(blocks, axis=-1), count)[1], axis=-1)  # sorted: of ties the first id wins
    entries = jnp.take_along_axis(blocks, best[:, :, None], axis=1).reshape(x.shape[0], -1)
    values, at = lax.top_k(entries, count)
    return (jnp.take_along_axis(best, at // width, axis=1) * width + at % width).astype(jnp.int32), values
