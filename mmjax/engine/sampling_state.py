"""What the sampler must know of each running sequence."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmjax.engine.sequence import EngineSequence

SAMPLING_FIELDS: tuple[tuple[str, str], ...] = (
    ("temperature", "f32"),
    ("top_k", "i32"),
    ("top_p", "f32"),
    ("min_p", "f32"),
    ("presence_penalty", "f32"),
    ("frequency_penalty", "f32"),
    ("repetition_penalty", "f32"),
    ("output_len", "i32"),
    ("row", "i32"),
    ("has_penalties", "bool"),
    ("has_bias", "bool"),
    ("first_timestamp", "i32"),
    ("min_tokens_left", "i32"),
    ("want_logprobs", "bool"),
)


LARGEST = np.iinfo(np.int32).max  # more than any vocabulary or length


class SamplingState:
    """What the sampler must know of each running sequence, by table row, so that packing a step is a few gathers."""

    FIELDS = (
        *((name, dtype) for name, dtype in SAMPLING_FIELDS if name not in ("output_len", "row", "min_tokens_left")),
    )

    def __init__(self, num_rows: int, max_stop_ids: int, cross_blocks_per_seq: int) -> None:
        n = num_rows
        self.fields = {name: np.zeros(n, np.float32 if dtype == "f32" else np.int32) for name, dtype in self.FIELDS}
        self.fields["seed"] = np.zeros((n, 2), np.int32)
        self.fields["stop_ids"] = np.full((n, max_stop_ids), -1, np.int32)
        self.fields["cross_block_table"] = np.zeros((n, cross_blocks_per_seq), np.int32)
        self.fields["cross_context_lens"] = np.zeros(n, np.int32)
        self.min_tokens = np.zeros(n, np.int32)

    def set(self, seq: EngineSequence, cross_keys: int) -> None:
        """Note a sequence that has just got its row."""
        p, f, row = seq.params, self.fields, seq.row
        f["temperature"][row] = p.temperature
        f["top_k"][row] = min(max(p.top_k, 0), LARGEST)
        f["top_p"][row] = p.top_p
        f["min_p"][row] = p.min_p
        f["presence_penalty"][row] = p.presence_penalty
        f["frequency_penalty"][row] = p.frequency_penalty
        f["repetition_penalty"][row] = p.repetition_penalty
        f["has_penalties"][row] = seq.has_penalties
        f["has_bias"][row] = seq.has_bias
        f["first_timestamp"][row] = seq.logits_processor.first_timestamp
        f["want_logprobs"][row] = p.logprobs is not None
        f["seed"][row] = seq.seed_words
        f["stop_ids"][row] = -1
        f["stop_ids"][row, : len(seq.stop_ids)] = seq.stop_ids
        f["cross_block_table"][row, : len(seq.cross_block_ids)] = seq.cross_block_ids
        f["cross_context_lens"][row] = cross_keys if seq.cross_block_ids else 0
        self.min_tokens[row] = min(p.min_tokens, LARGEST)

    def fill(self, f: Mapping[str, np.ndarray], rows: np.ndarray, index: np.ndarray, tables: np.ndarray) -> None:
        """Write the first len(rows) rows of a batch; index: how many output tokens each already has."""
        n = len(rows)
        for name, values in self.fields.items():
            f[name][:n] = values[rows]
        f["block_table"][:n] = tables[rows]
        f["row"][:n] = rows
        f["output_len"][:n] = index
        f["min_tokens_left"][:n] = np.maximum(self.min_tokens[rows] - index, 0)
