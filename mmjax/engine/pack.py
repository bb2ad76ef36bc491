"""Plans into padded arrays. Nothing is padded anywhere else, and what each padding means is said where it is put."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mmjax.batch import Fields, Layout, bucket
from mmjax.engine.encoder_cache import EncoderCache
from mmjax.engine.scheduler import Encode, Slice
from mmjax.engine.sequence import Sequence as Seq
from mmjax.models.family import Encoder

FAR = np.iinfo(np.int32).max  # an index that falls off every array

SAMPLING: tuple[tuple[str, str], ...] = (
    ("temperature", "f32"),
    ("top_k", "i32"),
    ("top_p", "f32"),
    ("min_p", "f32"),
    ("presence", "f32"),
    ("frequency", "f32"),
    ("repetition", "f32"),
    ("index", "i32"),
    ("row", "i32"),
    ("penalised", "bool"),
    ("biased", "bool"),
    ("stamp", "i32"),
    ("min_left", "i32"),
    ("want_logprobs", "bool"),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Every static size of the step's programs.

    tokens, seqs: ascending buckets; units: of each encoder, by its name. slab: rows that media may take. block:
    queries per prefill block. table: pages per sequence. cross: pages of the encoder's keys per sequence, 0 without.
    rows: rows of the sampling tables; the last belongs to nobody. ready: rows per dispatch of those that need no
    encoder, 0 where none are taken.
    """

    tokens: tuple[int, ...]
    seqs: tuple[int, ...]
    units: Mapping[str, tuple[int, ...]]
    slab: int
    block: int
    page: int
    table: int
    cross: int
    rope_rows: int
    rows: int
    stops: int
    steps: int
    top: int
    ready: int = 0

    def rows_of(self, encoder: Encoder, units: int) -> int:
        """Length of the row axis of an encoder's program: what is picked must find its place in the slab."""
        rows = encoder.rows_of(units)
        return min(rows, self.slab) if encoder.picks else rows

    def seqs_of(self, tokens: int) -> int:
        """Sequences in a prefill of so many tokens: each has at least one block."""
        return min(tokens // self.block, self.seqs[-1])

    def prefill(self, tokens: int) -> Layout:
        """Layout of a prefill dispatch of T tokens."""
        s, b = self.seqs_of(tokens), tokens // self.block
        fields: Fields = (
            ("tokens", (tokens,), "i32"),
            ("place", (tokens,), "i32"),
            ("positions", (self.rope_rows, tokens), "i32"),
            ("media", (tokens,), "i32"),
            ("owner", (b,), "i32"),
            ("start", (b,), "i32"),
            ("final", (s,), "i32"),
            *self._shared(s),
        )
        return Layout(fields)

    def decode(self, seqs: int) -> Layout:
        """Layout of a decode dispatch of S sequences."""
        fields: Fields = (("place", (seqs,), "i32"), ("delta", (seqs,), "i32"), ("steps", (seqs,), "i32"))
        return Layout((*fields, *self._shared(seqs)))

    def _shared(self, seqs: int) -> Fields:
        pages: Fields = (
            ("pages", (seqs, self.table), "i32"),
            ("length", (seqs,), "i32"),
            ("cross_pages", (seqs, self.cross), "i32"),
            ("cross_length", (seqs,), "i32"),
            ("seed", (seqs, 2), "i32"),
            ("stop", (seqs, self.stops), "i32"),
        )
        return (*pages, *((name, (seqs,), dtype) for name, dtype in SAMPLING))


LARGEST = np.iinfo(np.int32).max  # more than any vocabulary or length


class RowTable:
    """What the sampler must know of each running sequence, by table row, so that packing a step is a few gathers."""

    FIELDS = (*((name, dtype) for name, dtype in SAMPLING if name not in ("index", "row", "min_left")),)

    def __init__(self, sizes: Sizes) -> None:
        n = sizes.rows
        self.fields = {name: np.zeros(n, np.float32 if dtype == "f32" else np.int32) for name, dtype in self.FIELDS}
        self.fields["seed"] = np.zeros((n, 2), np.int32)
        self.fields["stop"] = np.full((n, sizes.stops), -1, np.int32)
        self.fields["cross_pages"] = np.zeros((n, sizes.cross), np.int32)
        self.fields["cross_length"] = np.zeros(n, np.int32)
        self.min_tokens = np.zeros(n, np.int32)

    def set(self, seq: Seq, cross_keys: int) -> None:
        """Note a sequence that has just got its row."""
        p, f, row = seq.params, self.fields, seq.row
        f["temperature"][row] = p.temperature
        f["top_k"][row] = min(max(p.top_k, 0), LARGEST)
        f["top_p"][row] = p.top_p
        f["min_p"][row] = p.min_p
        f["presence"][row] = p.presence_penalty
        f["frequency"][row] = p.frequency_penalty
        f["repetition"][row] = p.repetition_penalty
        f["penalised"][row] = seq.penalised
        f["biased"][row] = seq.biased
        f["stamp"][row] = seq.constraints.stamp
        f["want_logprobs"][row] = p.logprobs is not None
        f["seed"][row] = seq.seed_words
        f["stop"][row] = -1
        f["stop"][row, : len(seq.stops)] = seq.stops
        f["cross_pages"][row, : len(seq.cross_pages)] = seq.cross_pages
        f["cross_length"][row] = cross_keys if seq.cross_pages else 0
        self.min_tokens[row] = min(p.min_tokens, LARGEST)

    def fill(self, f: Mapping[str, np.ndarray], rows: np.ndarray, index: np.ndarray, tables: np.ndarray) -> None:
        """Write the first len(rows) rows of a batch; index: how many output tokens each already has."""
        n = len(rows)
        for name, values in self.fields.items():
            f[name][:n] = values[rows]
        f["pages"][:n] = tables[rows]
        f["row"][:n] = rows
        f["index"][:n] = index
        f["min_left"][:n] = np.maximum(self.min_tokens[rows] - index, 0)


def pack_prefill(
    sizes: Sizes, slices: Sequence[Slice], rows: RowTable, tables: np.ndarray, slab: EncoderCache
) -> tuple[int, np.ndarray]:
    """(token bucket T, vector) of chunks of prompts; each chunk starts on a block boundary."""
    block = sizes.block
    used = sum(-(-piece.count // block) for piece in slices)
    total = bucket(used * block, sizes.tokens)
    layout = sizes.prefill(total)
    vector = np.zeros(layout.size, np.int32)
    f = layout.views(vector)
    f["place"].fill(-1)  # padding has no place, so nothing is written for it
    f["media"].fill(-1)
    f["start"].fill(-block)  # a padding block sees no key
    f["final"].fill(-1)
    _pad_rows(f, sizes)
    at = 0
    for s, piece in enumerate(slices):
        seq, end = piece.seq, piece.start + piece.count
        here = slice(at, at + piece.count)
        f["tokens"][here] = seq.tokens[piece.start : end]
        f["place"][here] = np.arange(piece.start, end)
        _positions(seq, piece.start, end, f["positions"][:, here])
        _media(seq, piece.start, end, f["media"][here], slab)
        blocks = slice(at // block, at // block + -(-piece.count // block))
        f["owner"][blocks] = s
        f["start"][blocks] = np.arange(piece.start, end, block)
        f["length"][s] = end
        if piece.last:
            f["final"][s] = at + piece.count - 1
        at += -(-piece.count // block) * block
    own = np.array([piece.seq.row for piece in slices], np.int32)
    rows.fill(f, own, np.array([piece.seq.output_len for piece in slices], np.int32), tables)
    return total, vector


def pack_decode(
    sizes: Sizes, chosen: Sequence[tuple[Seq, int]], rows: RowTable, tables: np.ndarray
) -> tuple[int, np.ndarray]:
    """(sequence bucket S, vector) of decode steps. Called after planning: `planned` already counts these steps."""
    total = bucket(len(chosen), sizes.seqs)
    layout = sizes.decode(total)
    vector = np.zeros(layout.size, np.int32)
    f = layout.views(vector)
    _pad_rows(f, sizes)
    n = len(chosen)
    of = np.array([(q.row, q.planned - steps, q.prompt.delta, steps, q.prompt_len) for q, steps in chosen], np.int32).T
    f["place"][:n], f["delta"][:n], f["steps"][:n] = of[1:4]
    rows.fill(f, of[0], of[1] + 1 - of[4], tables)
    return total, vector


def pack_encode(
    sizes: Sizes, name: str, encoder: Encoder, work: Sequence[Encode]
) -> tuple[int, dict[str, np.ndarray], np.ndarray]:
    """(unit bucket U, features and picks by name, destination) of media items, end to end in one row of units.

    Destination: slab row of each encoded row, or place in the pages of each key for cross attention.
    """
    total = bucket(sum(e.item.units for e in work), sizes.units[name])
    count = sizes.rows_of(encoder, total)
    features = {}
    for axis, fields in ((total, encoder.features), (count, encoder.picks)):
        for field, (tail, dtype, fill) in fields.items():
            parts = _parts(encoder, field, work)
            out = np.full((axis, *tail), fill, dtype)
            np.concatenate(parts, out=out[: sum(map(len, parts))])
            features[field] = out
    if encoder.keys:
        places = np.concatenate([_places(e.pages, sizes.page)[: e.item.units * encoder.keys] for e in work])
        dest = np.full(total * encoder.keys, -1, np.int32)  # negative slots are dropped
        dest[: len(places)] = places
    else:
        dest = np.full(count, FAR, np.int32)
        rows = np.concatenate([e.rows for e in work])
        dest[: len(rows)] = rows
    return total, features, dest


def pack_ready(sizes: Sizes, work: Sequence[Encode]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows that came ready, in dispatches of `sizes.ready`: (f32[N, W], slab row of each), padding off the slab."""
    given = np.concatenate([e.item.ready for e in work if e.item.ready is not None])
    where = np.concatenate([e.rows for e in work])
    for start in range(0, len(given), sizes.ready):
        part = given[start : start + sizes.ready]
        rows, dest = np.zeros((sizes.ready, given.shape[1]), np.float32), np.full(sizes.ready, FAR, np.int32)
        rows[: len(part)], dest[: len(part)] = part, where[start : start + sizes.ready]
        yield rows, dest


def _parts(encoder: Encoder, field: str, work: Sequence[Encode]) -> list[np.ndarray]:
    """One array of every item, with the numbers in it made the batch's."""
    parts, segments, units = [], 0, 0
    for e in work:
        part = e.item.features[field]
        if field in encoder.numbered:
            part = part + segments
            segments = int(part.max()) + 1
        elif field in encoder.based:
            part = np.where(part >= 0, part + units * encoder.based[field], part)
        units += e.item.units
        parts.append(part)
    return parts


def _places(pages: Sequence[int], size: int) -> np.ndarray:
    return (np.asarray(pages, np.int32)[:, None] * size + np.arange(size, dtype=np.int32)).reshape(-1)


def pack_biases(sizes: Sizes, seqs: Sequence[Seq], vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows i32[S], f32[S, V] to add to their logits) of sequences whose constraints change with every token."""
    total = bucket(len(seqs), sizes.seqs)
    rows, biases = np.full(total, sizes.rows - 1, np.int32), np.zeros((total, vocab), np.float32)
    for s, seq in enumerate(seqs):
        assert seq.row is not None
        rows[s], bias = seq.row, seq.constraints.row(seq.outputs.tolist())
        if bias is not None:
            biases[s] = bias
    return rows, biases


def _pad_rows(f: Mapping[str, np.ndarray], sizes: Sizes) -> None:
    """Rows that ask for nothing and write to the table row that belongs to nobody."""
    f["row"].fill(sizes.rows - 1)
    f["stop"].fill(-1)
    f["top_p"].fill(1)
    f["repetition"].fill(1)


def _positions(seq: Seq, start: int, end: int, out: np.ndarray) -> None:
    given = min(max(seq.prompt_len - start, 0), end - start)
    out[:, :given] = seq.prompt.positions[:, start : start + given]
    out[:, given:] = np.arange(start + given, end) + seq.prompt.delta


def _media(seq: Seq, start: int, end: int, out: np.ndarray, slab: EncoderCache) -> None:
    for span in seq.prompt.spans:
        first, last = max(start, span.start), min(end, span.start + span.length)
        if first < last:
            rows = slab.get(span.key)
            assert rows is not None, "the scheduler encodes before it plans"
            shift = span.first - span.start
            out[first - start : last - start] = rows[first + shift : last + shift]
