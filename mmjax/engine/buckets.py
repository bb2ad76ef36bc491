"""The static sizes of a step's programs, and the layout of the one vector that holds a step's inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mmjax.batch import LayoutFields, PackedLayout
from mmjax.engine.sampling_state import SAMPLING_FIELDS
from mmjax.spec import EncoderSpec, FeatureField


@dataclasses.dataclass(frozen=True)
class BucketConfig:
    """Every static size of a step's programs.

    token_buckets, seq_buckets: ascending. encoder_buckets: inputs of each encoder, by its name, ascending.
    num_mm_rows: rows of the mm_embeds buffer. q_block_size: query tokens per block of a prefill. block_size: tokens per
    block of the KV cache. max_blocks_per_seq: width of the block table. cross_blocks_per_seq: blocks of the encoder's
    keys per sequence, 0 without cross attention. num_rows: rows of the sampling tables; padding uses the last one.
    embed_rows: rows per write of embeddings that need no encoder, 0 where none are accepted.
    """

    token_buckets: tuple[int, ...]
    seq_buckets: tuple[int, ...]
    encoder_buckets: Mapping[str, tuple[int, ...]]
    num_mm_rows: int
    q_block_size: int
    block_size: int
    max_blocks_per_seq: int
    cross_blocks_per_seq: int
    rope_axes: int
    num_rows: int
    max_stop_ids: int
    num_decode_steps: int
    max_logprobs: int
    embed_rows: int = 0

    def num_embeds(self, encoder: EncoderSpec, num_inputs: int) -> int:
        """Embeddings that an encoder's program returns; gathered ones must fit into the mm_embeds buffer."""
        num_embeds = encoder.num_embeds(num_inputs)
        return min(num_embeds, self.num_mm_rows) if encoder.gathers_embeds else num_embeds

    def field_len(self, field: FeatureField, encoder: EncoderSpec, num_inputs: int) -> int:
        """The leading axis of one of the encoder's fields, in a program for `num_inputs` inputs."""
        return num_inputs if field.axis == "inputs" else self.num_embeds(encoder, num_inputs)

    def max_seqs_in(self, tokens: int) -> int:
        """The most sequences that fit into a prefill of this many tokens: each takes at least one query block."""
        return min(tokens // self.q_block_size, self.seq_buckets[-1])

    def prefill_layout(self, tokens: int) -> PackedLayout:
        """Layout of a prefill dispatch of T tokens."""
        s, b = self.max_seqs_in(tokens), tokens // self.q_block_size
        fields: LayoutFields = (
            ("token_ids", (tokens,), "i32"),
            ("positions", (tokens,), "i32"),
            ("rope_positions", (self.rope_axes, tokens), "i32"),
            ("mm_index", (tokens,), "i32"),
            ("seq_index", (b,), "i32"),
            ("q_start", (b,), "i32"),
            ("last_token_index", (s,), "i32"),
            *self._shared_fields(s),
        )
        return PackedLayout(fields)

    def decode_layout(self, seqs: int) -> PackedLayout:
        """Layout of a decode dispatch of S sequences."""
        fields: LayoutFields = (
            ("positions", (seqs,), "i32"),
            ("rope_delta", (seqs,), "i32"),
            ("num_steps", (seqs,), "i32"),
        )
        return PackedLayout((*fields, *self._shared_fields(seqs)))

    def _shared_fields(self, seqs: int) -> LayoutFields:
        shared: LayoutFields = (
            ("block_table", (seqs, self.max_blocks_per_seq), "i32"),
            ("context_lens", (seqs,), "i32"),
            ("cross_block_table", (seqs, self.cross_blocks_per_seq), "i32"),
            ("cross_context_lens", (seqs,), "i32"),
            ("seed", (seqs, 2), "i32"),
            ("stop_ids", (seqs, self.max_stop_ids), "i32"),
        )
        return (*shared, *((name, (seqs,), dtype) for name, dtype in SAMPLING_FIELDS))
