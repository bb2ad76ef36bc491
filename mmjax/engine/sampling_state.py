"""What the sampler must know of each running sequence."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmjax.engine.sequence import EngineSequence
from mmjax.types import SAMPLING_PARAMETERS

PARAMETERS: tuple[tuple[str, str], ...] = tuple(
    (name, parameter.dtype) for name, parameter in SAMPLING_PARAMETERS.items() if parameter.dtype is not None
)
# What of a sequence never changes while it has its row: its parameters, and what is derived from them.
ROW_FIELDS = (
    *PARAMETERS,
    ("has_penalties", "bool"),
    ("has_bias", "bool"),
    ("first_timestamp", "i32"),
    ("want_logprobs", "bool"),
)
SAMPLING_FIELDS = (*ROW_FIELDS, ("output_len", "i32"), ("row", "i32"), ("min_tokens_left", "i32"))
"""(name, dtype) of each field of `sampler.SamplingMetadata` that is one number per sequence of a batch."""

# Padding sequences have all parameters off. Those that are off at 0 are left out: a packed batch begins as zeros.
PADDING = tuple((name, off) for name, _ in PARAMETERS if (off := SAMPLING_PARAMETERS[name].off))
LARGEST = np.iinfo(np.int32).max  # more than any vocabulary or length


NOT_PLAIN = ("temperature", "has_penalties", "has_bias", "min_tokens_left", "want_logprobs")
"""The fields of which any, where it is not zero, makes a row ask for more than its likeliest token."""


def all_plain_greedy(f: Mapping[str, np.ndarray]) -> bool:
    """Whether every row of a batch asks for its likeliest token and nothing else."""
    return not any(f[name].any() for name in NOT_PLAIN)


class SamplingState:
    """What the sampler must know of each running sequence, by table row, so that packing a step is a few gathers."""

    def __init__(self, num_rows: int, max_stop_ids: int, cross_blocks_per_seq: int) -> None:
        n = num_rows
        self.fields = {name: np.zeros(n, np.float32 if dtype == "f32" else np.int32) for name, dtype in ROW_FIELDS}
        self.fields["seed"] = np.zeros((n, 2), np.int32)
        self.fields["stop_ids"] = np.full((n, max_stop_ids), -1, np.int32)
        self.fields["cross_block_table"] = np.zeros((n, cross_blocks_per_seq), np.int32)
        self.fields["cross_context_lens"] = np.zeros(n, np.int32)
        self.min_tokens = np.zeros(n, np.int32)

    def set(self, seq: EngineSequence, cross_keys: int) -> None:
        """Fill the row that a sequence has just been given."""
        p, f, row = seq.params, self.fields, seq.row
        for name, dtype in PARAMETERS:
            value = getattr(p, name)
            # top_k may be -1, and larger than an int32
            f[name][row] = min(max(value, 0), LARGEST) if dtype == "i32" else value
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
