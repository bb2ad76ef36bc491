"""Plans into padded arrays. Nothing is padded anywhere else, and what each padding means is said where it is put."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mmjax.batch import bucket
from mmjax.engine.buckets import BucketConfig
from mmjax.engine.encoder_cache import EncoderCache
from mmjax.engine.sampling_state import SamplingState
from mmjax.engine.scheduler import ScheduledChunk, ScheduledEncode
from mmjax.engine.sequence import Sequence as Seq
from mmjax.processors.base import MediaItem
from mmjax.spec import EncoderSpec, FeatureField

OUT_OF_RANGE = np.iinfo(np.int32).max  # an index that falls off every array


def build_prefill(
    buckets: BucketConfig,
    chunks: Sequence[ScheduledChunk],
    sampling_state: SamplingState,
    block_tables: np.ndarray,
    encoder_cache: EncoderCache,
) -> tuple[int, np.ndarray]:
    """(token bucket T, vector) of chunks of prompts; each chunk starts on a block boundary."""
    block = buckets.q_block_size
    used = sum(-(-chunk.num_tokens // block) for chunk in chunks)
    total = bucket(used * block, buckets.token_buckets)
    layout = buckets.prefill_layout(total)
    vector = np.zeros(layout.size, np.int32)
    f = layout.views(vector)
    f["positions"].fill(-1)  # padding has no place, so nothing is written for it
    f["mm_index"].fill(-1)
    f["q_start"].fill(-block)  # a padding block sees no key
    f["last_token_index"].fill(-1)
    _pad_rows(f, buckets)
    at = 0
    for s, chunk in enumerate(chunks):
        seq, end = chunk.seq, chunk.start + chunk.num_tokens
        here = slice(at, at + chunk.num_tokens)
        f["token_ids"][here] = seq.token_ids[chunk.start : end]
        f["positions"][here] = np.arange(chunk.start, end)
        _positions(seq, chunk.start, end, f["rope_positions"][:, here])
        _media(seq, chunk.start, end, f["mm_index"][here], encoder_cache)
        blocks = slice(at // block, at // block + -(-chunk.num_tokens // block))
        f["seq_index"][blocks] = s
        f["q_start"][blocks] = np.arange(chunk.start, end, block)
        f["context_lens"][s] = end
        if chunk.is_last:
            f["last_token_index"][s] = at + chunk.num_tokens - 1
        at += -(-chunk.num_tokens // block) * block
    own = np.array([chunk.seq.row for chunk in chunks], np.int32)
    sampling_state.fill(f, own, np.array([chunk.seq.output_len for chunk in chunks], np.int32), block_tables)
    return total, vector


def build_decode(
    buckets: BucketConfig, chosen: Sequence[tuple[Seq, int]], sampling_state: SamplingState, block_tables: np.ndarray
) -> tuple[int, np.ndarray]:
    """(sequence bucket S, vector) of decode steps. Called after planning: `planned` already counts these steps."""
    total = bucket(len(chosen), buckets.seq_buckets)
    layout = buckets.decode_layout(total)
    vector = np.zeros(layout.size, np.int32)
    f = layout.views(vector)
    _pad_rows(f, buckets)
    n = len(chosen)
    of = np.array(
        [(q.row, q.num_scheduled - steps, q.prompt.rope_delta, steps, q.prompt_len) for q, steps in chosen], np.int32
    ).T
    f["positions"][:n], f["rope_delta"][:n], f["num_steps"][:n] = of[1:4]
    sampling_state.fill(f, of[0], of[1] + 1 - of[4], block_tables)
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
    """Rows that came ready, in dispatches of `sizes.ready`: (f32[N, W], slab row of each), padding off the slab."""
    given = np.concatenate([e.item.embeds for e in work if e.item.embeds is not None])
    where = np.concatenate([e.rows for e in work])
    for start in range(0, len(given), buckets.embed_rows):
        part = given[start : start + buckets.embed_rows]
        rows, dest = (
            np.zeros((buckets.embed_rows, given.shape[1]), np.float32),
            np.full(buckets.embed_rows, OUT_OF_RANGE, np.int32),
        )
        rows[: len(part)], dest[: len(part)] = part, where[start : start + buckets.embed_rows]
        yield rows, dest


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


def build_logit_biases(buckets: BucketConfig, seqs: Sequence[Seq], vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows i32[S], f32[S, V] to add to their logits) of sequences whose constraints change with every token."""
    total = bucket(len(seqs), buckets.seq_buckets)
    rows, biases = np.full(total, buckets.num_rows - 1, np.int32), np.zeros((total, vocab), np.float32)
    for s, seq in enumerate(seqs):
        assert seq.row is not None
        rows[s], bias = seq.row, seq.logits_processor.bias_row(seq.output_ids.tolist())
        if bias is not None:
            biases[s] = bias
    return rows, biases


def _pad_rows(f: Mapping[str, np.ndarray], buckets: BucketConfig) -> None:
    """Rows that ask for nothing and write to the table row that belongs to nobody."""
    f["row"].fill(buckets.num_rows - 1)
    f["stop_ids"].fill(-1)
    f["top_p"].fill(1)
    f["repetition_penalty"].fill(1)


def _positions(seq: Seq, start: int, end: int, out: np.ndarray) -> None:
    given = min(max(seq.prompt_len - start, 0), end - start)
    out[:, :given] = seq.prompt.rope_positions[:, start : start + given]
    out[:, given:] = np.arange(start + given, end) + seq.prompt.rope_delta


def _media(seq: Seq, start: int, end: int, out: np.ndarray, encoder_cache: EncoderCache) -> None:
    for span in seq.prompt.spans:
        first, last = max(start, span.start), min(end, span.start + span.length)
        if first < last:
            rows = encoder_cache.get(span.item_hash)
            assert rows is not None, "the scheduler encodes before it plans"
            shift = span.embed_offset - span.start
            out[first - start : last - start] = rows[first + shift : last + shift]
