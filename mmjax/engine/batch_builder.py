"""Builds the padded NumPy arrays of a dispatch from what the scheduler returned. All padding happens here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mmjax.batch import bucket
from mmjax.engine.buckets import BucketConfig
from mmjax.engine.encoder_cache import EncoderCache
from mmjax.engine.output_processor import PromptChunk
from mmjax.engine.sampling_state import PADDING, SamplingState
from mmjax.engine.scheduler import ScheduledChunk, ScheduledEncode
from mmjax.engine.sequence import EngineSequence
from mmjax.processors.base import MediaItem
from mmjax.spec import EncoderSpec, FeatureField

OUT_OF_RANGE = np.iinfo(np.int32).max  # past the end of every array, so writes to this index are dropped


def build_prefill(
    buckets: BucketConfig,
    chunks: Sequence[ScheduledChunk],
    sampling_state: SamplingState,
    block_tables: np.ndarray,
    encoder_cache: EncoderCache,
) -> tuple[int, np.ndarray]:
    """(token bucket T, packed vector i32) of a prefill. Each chunk starts on a boundary of query blocks."""
    block = buckets.q_block_size
    num_blocks = sum(-(-chunk.num_tokens // block) for chunk in chunks)
    total = bucket(num_blocks * block, buckets.token_buckets)
    layout = buckets.prefill_layout(total)
    vector = np.zeros(layout.size, np.int32)
    f = layout.views(vector)
    f["positions"].fill(-1)  # the keys and values of padding are not written
    f["mm_index"].fill(-1)
    f["q_start"].fill(-block)  # a padding block attends to no key
    f["last_token_index"].fill(-1)
    _pad_rows(f, buckets)
    offset = 0
    for s, chunk in enumerate(chunks):
        seq, end = chunk.seq, chunk.start + chunk.num_tokens
        tokens = slice(offset, offset + chunk.num_tokens)
        f["token_ids"][tokens] = seq.token_ids[chunk.start : end]
        f["positions"][tokens] = np.arange(chunk.start, end)
        _fill_rope_positions(seq, chunk.start, end, f["rope_positions"][:, tokens])
        _fill_mm_index(seq, chunk.start, end, f["mm_index"][tokens], encoder_cache)
        blocks = slice(offset // block, offset // block + -(-chunk.num_tokens // block))
        f["seq_index"][blocks] = s
        f["q_start"][blocks] = np.arange(chunk.start, end, block)
        f["context_lens"][s] = end
        if chunk.is_last:
            f["last_token_index"][s] = offset + chunk.num_tokens - 1
        offset += -(-chunk.num_tokens // block) * block
    rows = np.array([chunk.seq.row for chunk in chunks], np.int32)
    output_lens = np.array([chunk.seq.output_len for chunk in chunks], np.int32)
    sampling_state.fill(f, rows, output_lens, block_tables)
    return total, vector


def build_logprob_targets(total: int, chunks: Sequence[PromptChunk]) -> np.ndarray:
    """i32[T]: for each token of a prefill, the token after it whose log-probability is wanted, or 0."""
    targets = np.zeros(total, np.int32)
    for chunk in chunks:
        token_ids = chunk.seq.token_ids[chunk.first : chunk.first + chunk.num_tokens]
        targets[chunk.offset : chunk.offset + chunk.num_tokens] = token_ids
    return targets


def build_decode(
    buckets: BucketConfig,
    scheduled: Sequence[tuple[EngineSequence, int]],
    sampling_state: SamplingState,
    block_tables: np.ndarray,
) -> tuple[int, np.ndarray]:
    """(sequence bucket S, packed vector i32) of decode steps. Each sequence's `num_scheduled` already counts its
    steps."""
    total = bucket(len(scheduled), buckets.seq_buckets)
    layout = buckets.decode_layout(total)
    vector = np.zeros(layout.size, np.int32)
    f = layout.views(vector)
    _pad_rows(f, buckets)
    n = len(scheduled)
    rows, positions, rope_deltas, num_steps, prompt_lens = np.array(
        [(s.row, s.num_scheduled - steps, s.prompt.rope_delta, steps, s.prompt_len) for s, steps in scheduled], np.int32
    ).T
    f["positions"][:n], f["rope_delta"][:n], f["num_steps"][:n] = positions, rope_deltas, num_steps
    sampling_state.fill(f, rows, positions + 1 - prompt_lens, block_tables)
    return total, vector


def build_encode(
    buckets: BucketConfig, name: str, encoder: EncoderSpec, work: Sequence[ScheduledEncode]
) -> tuple[int, dict[str, np.ndarray], np.ndarray]:
    """(input bucket, fields by name, destination) of media items, packed end to end.

    Destination: the mm_embeds row of each embedding, or for cross attention the cache slot of each key.
    """
    total = bucket(sum(e.item.num_inputs for e in work), buckets.encoder_buckets[name])
    items = [e.item for e in work]
    features = {
        field.name: _pack_field(field, items, buckets.field_len(field, encoder, total)) for field in encoder.fields
    }
    if encoder.keys_per_input:
        slots = np.concatenate(
            [_slots(e.block_ids, buckets.block_size)[: e.item.num_inputs * encoder.keys_per_input] for e in work]
        )
        dest = np.full(total * encoder.keys_per_input, -1, np.int32)  # negative slots are dropped
        dest[: len(slots)] = slots
    else:
        dest = np.full(buckets.num_embeds(encoder, total), OUT_OF_RANGE, np.int32)
        rows = np.concatenate([e.rows for e in work])
        dest[: len(rows)] = rows
    return total, features, dest


def build_embed_writes(
    buckets: BucketConfig, work: Sequence[ScheduledEncode]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Items that came as embeddings, `embed_rows` at a time: (f32[N, W], their rows i32[N] of the mm_embeds buffer)."""
    all_embeds = np.concatenate([e.item.embeds for e in work if e.item.embeds is not None])
    all_rows = np.concatenate([e.rows for e in work])
    n, width = buckets.embed_rows, all_embeds.shape[1]
    for start in range(0, len(all_embeds), n):
        part = all_embeds[start : start + n]
        embeds, dest = np.zeros((n, width), np.float32), np.full(n, OUT_OF_RANGE, np.int32)
        embeds[: len(part)], dest[: len(part)] = part, all_rows[start : start + n]
        yield embeds, dest


def _pack_field(field: FeatureField, items: Sequence[MediaItem], length: int) -> np.ndarray:
    """One field of all items, end to end and padded to `length`. Segment ids and indices become those of the batch."""
    parts, segments, inputs = [], 0, 0
    for item in items:
        part = item.features[field.name]
        if field.is_segment_id:
            part = part + segments
            segments = int(part.max()) + 1
        elif field.index_stride:
            part = np.where(part >= 0, part + inputs * field.index_stride, part)
        inputs += item.num_inputs
        parts.append(part)
    out = np.full((length, *field.shape), field.pad, field.dtype)
    np.concatenate(parts, out=out[: sum(map(len, parts))])
    return out


def _slots(block_ids: Sequence[int], size: int) -> np.ndarray:
    return (np.asarray(block_ids, np.int32)[:, None] * size + np.arange(size, dtype=np.int32)).reshape(-1)


def build_logit_biases(
    buckets: BucketConfig, bias_rows: Mapping[int, np.ndarray | None], vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    """(rows i32[S], biases f32[S, V]) of sequences whose biases depend on their latest token. bias_rows: the bias by
    row of the sampling tables; None = none."""
    total = bucket(len(bias_rows), buckets.seq_buckets)
    rows, biases = np.full(total, buckets.num_rows - 1, np.int32), np.zeros((total, vocab), np.float32)
    for s, (row, bias) in enumerate(bias_rows.items()):
        rows[s] = row
        if bias is not None:
            biases[s] = bias
    return rows, biases


def _pad_rows(f: Mapping[str, np.ndarray], buckets: BucketConfig) -> None:
    """Padding rows: every parameter is off, and what they compute is written to the table row that no sequence has."""
    f["row"].fill(buckets.num_rows - 1)
    f["stop_ids"].fill(-1)
    for name, off in PADDING:
        f[name].fill(off)


def _fill_rope_positions(seq: EngineSequence, start: int, end: int, out: np.ndarray) -> None:
    """Rotary positions of tokens [start, end) into i32[R, end - start]."""
    in_prompt = min(max(seq.prompt_len - start, 0), end - start)
    out[:, :in_prompt] = seq.prompt.rope_positions[:, start : start + in_prompt]
    out[:, in_prompt:] = np.arange(start + in_prompt, end) + seq.prompt.rope_delta


def _fill_mm_index(seq: EngineSequence, start: int, end: int, out: np.ndarray, encoder_cache: EncoderCache) -> None:
    """Rows of the mm_embeds buffer for tokens [start, end) into i32[end - start]."""
    for span in seq.prompt.spans:
        first, last = max(start, span.start), min(end, span.start + span.length)
        if first < last:
            rows = encoder_cache.get(span.item_hash)
            assert rows is not None, "the scheduler has allocated rows for every scheduled item"
            shift = span.embed_offset - span.start
            out[first - start : last - start] = rows[first + shift : last + shift]
