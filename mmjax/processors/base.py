"""What the processors share: the processed item, the spans it fills, and placeholder expansion.

A processor turns decoded media into arrays for the encoder, and a prompt with one placeholder per item into a prompt
with one token per embedding. NumPy only: nothing here may import jax.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mmjax.multimodal.video import MAX_NUMBER
from mmjax.types import RequestError

ProcessorKwargs = Mapping[str, Any]
Encode = Callable[..., list[int]]  # `Tokenizer.encode` with the options of a request as its defaults


@dataclasses.dataclass(frozen=True, eq=False)
class MediaItem:
    """One processed media item. Its arrays are read-only.

    features: the encoder's input arrays, as its `EncoderSpec.fields` declare them. num_inputs: encoder inputs (patches,
    crops, chunks). num_embeds: embeddings, and placeholder tokens that they fill. grid: (t, h, w) of the embeddings, or
    what the family says.

    frame_times: the time of each step of a video's grid; empty where it is unknown or the family does not use it.
    Qwen2.5-VL: rotary positions, not yet rounded, at which the steps begin. Qwen3-VL: seconds into the video, in the
    middle between a step's frames. The Omni families: seconds from the start of the video to where the steps begin.
    with_audio: a video whose sound track is an audio item of the same prompt. embeds: float32 [num_embeds, W], of an
    item that came as embeddings; it has no features and no inputs.
    """

    modality: str
    features: dict[str, np.ndarray]
    num_inputs: int
    num_embeds: int
    grid: tuple[int, ...] = ()
    frame_times: tuple[float, ...] = ()
    with_audio: bool = False
    embeds: np.ndarray | None = None

    def __post_init__(self) -> None:
        for array in self._arrays():  # cached and shared between requests
            array.flags.writeable = False

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays())

    def _arrays(self) -> list[np.ndarray]:
        return [*self.features.values(), *([] if self.embeds is None else [self.embeds])]


@dataclasses.dataclass(frozen=True, slots=True)
class PlaceholderSpan:
    """Prompt tokens [start, start + length) take embeddings embed_offset..embed_offset+length-1 of an item.

    item_index: counts the items of its modality. An item may have several spans: the embeddings of a video and of its
    sound are interleaved.
    """

    start: int
    length: int
    modality: str
    item_index: int
    embed_offset: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class TimestampTokens:
    """The special tokens of a transcript with timestamps, which are first_id..last_id.

    eos_id: ends it. no_timestamps_id: must not be sampled. max_initial_index: how many timestamps after first_id it may
    begin. prefix_ids: the tokens of the prompt that it continues.
    """

    first_id: int
    last_id: int
    eos_id: int
    no_timestamps_id: int
    max_initial_index: int
    prefix_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SuppressedTokens:
    """Tokens that must not be sampled: ids never, first_ids not as the first one."""

    ids: tuple[int, ...] = ()
    first_ids: tuple[int, ...] = ()


NOTHING_SUPPRESSED = SuppressedTokens()


class ExpandedPrompt(NamedTuple):
    """A prompt after expansion, with spans in prompt order.

    encoder_token_ids, and timestamps for prompts that want them: of encoder-decoder models only.
    """

    token_ids: list[int]
    spans: list[PlaceholderSpan]
    encoder_token_ids: tuple[int, ...] = ()
    timestamps: TimestampTokens | None = None


class Processor(Protocol):
    """The host side of a family. Constructed as `(config, files, tokenizer)`: config.json, the other parsed JSON files
    by file name, and the tokenizer or None. Families inherit what they do not do otherwise.

    mm_limits: by modality, the most items of a prompt (None: no limit). placeholder_text: by modality, the text that
    stands for an item in a prompt, with {i} for its number from 1. placeholder_token: the part of it that is expanded.
    accepted_kwargs: mm_processor_kwargs that `process_item` understands. embed_fields: by modality, the names of the
    arrays in which embeddings come: the embeddings, then their size. sampling_rate: of the audio that `process_item`
    takes.
    """

    mm_limits: Mapping[str, int | None]
    placeholder_text: Mapping[str, str]
    placeholder_token: Mapping[str, str]
    accepted_kwargs: frozenset[str]
    embed_fields: Mapping[str, tuple[str, ...]]
    sampling_rate: int | None

    def tokenize(self, text: str, encode: Encode) -> list[int]:
        """Token ids of a prompt's text, placeholders not expanded."""
        return encode(text)

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem:
        """The item of an RGB image or uint8 [height, width, 3], of a `Video`, or of mono audio float32 [samples]."""
        ...

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """The number of embeddings of an item of this size: image (height, width), video (frames, height, width),
        audio (samples,)."""
        ...

    def item_for_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> MediaItem:
        """The item of embeddings of this size, without them. The size of embeddings that come without one is their
        number."""
        ...

    @property
    def num_mel_bins(self) -> int:
        """Bins of the log-mel features that `from_mel` takes; 0 where a family takes none."""
        return 0

    def from_mel(self, mel: np.ndarray) -> MediaItem:
        """The audio item of log-mel features float32 [bins, frames], in families whose `embed_fields` name them."""
        raise NotImplementedError

    @property
    def audio_window_s(self) -> float | None:
        """Seconds of audio in an item at most; None where any length fits."""
        return None

    @property
    def is_multilingual(self) -> bool:
        """Whether a model for transcripts knows other languages than English."""
        return True

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt:
        """A token for every embedding of each item. A prompt that is expanded already is returned as it is.

        RequestError when placeholders and items do not match.
        """
        ...

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """(int32 [R, T], delta): token i >= T has position i + delta on every axis."""
        ...


def item_of_any_length(self: Processor, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> MediaItem:
    """`Processor.item_for_embeds` of families whose items may have any number of embeddings."""
    return MediaItem(modality, {}, num_inputs=0, num_embeds=size[0])


def positive_int(kwargs: Mapping[str, Any], name: str) -> int:
    """A positive integer from processor kwargs; RequestError when it is anything else."""
    value = kwargs[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(f"mm_processor_kwargs: {name} must be a positive integer, got {value!r}.", "bad_kwargs")
    if value > MAX_NUMBER:
        raise RequestError(f"mm_processor_kwargs: {name} must be at most {MAX_NUMBER}.", "bad_kwargs")
    return value


def linear_positions(length: int) -> tuple[np.ndarray, int]:
    """Ordinary one-dimensional positions: (int32 [1, length], 0)."""
    return np.arange(length, dtype=np.int32)[None], 0


def expand_placeholders(
    token_ids: Sequence[int],
    items: Mapping[str, Sequence[MediaItem]],
    placeholder_ids: Mapping[str, int],
    placeholder_text: Mapping[str, str],
) -> ExpandedPrompt:
    """Replace the n-th placeholder token of each modality by as many as its n-th item has embeddings.

    Runs of the right length stay as they are, so that expanded prompts can be sent again; one modality may come
    expanded and another not. RequestError for a number of placeholder tokens that fits neither way.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    runs: list[tuple[int, int, str, int]] = []  # first placeholder, number of placeholders, modality, item index
    for modality, placeholder_id in placeholder_ids.items():
        found = np.flatnonzero(ids == placeholder_id)
        counts = [item.num_embeds for item in items.get(modality, ())]
        if len(found) == len(counts):
            lengths = [1] * len(counts)
        elif len(found) == sum(counts):
            lengths = counts
        else:
            raise placeholder_mismatch(modality, len(counts), len(found), placeholder_text[modality])
        first = np.cumsum([0, *lengths])
        for index, length in enumerate(lengths):
            run = found[first[index] : first[index] + length]
            if run[-1] - run[0] != length - 1:
                raise placeholder_mismatch(modality, len(counts), len(found), placeholder_text[modality])
            runs.append((int(run[0]), length, modality, index))
    out: list[int] = []
    spans: list[PlaceholderSpan] = []
    done = 0
    for start, length, modality, index in sorted(runs):
        out.extend(token_ids[done:start])
        num_embeds = items[modality][index].num_embeds
        spans.append(PlaceholderSpan(len(out), num_embeds, modality, index))
        out.extend([placeholder_ids[modality]] * num_embeds)
        done = start + length
    out.extend(token_ids[done:])
    return ExpandedPrompt(out, spans)


def placeholder_mismatch(modality: str, expected: int, found: int, placeholder: str) -> RequestError:
    """The error of a prompt with `found` placeholders for `expected` items."""
    placeholder = placeholder.replace("{i}", "1")
    if not expected:
        fix = f"remove {placeholder!r} from the prompt, or pass the {modality} data it stands for"
    else:
        fix = f"write {placeholder!r} exactly once per {modality} item, in the order of the items"
    return RequestError(
        f"Expected there to be {expected} prompt placeholders corresponding to {expected} {modality} items, but "
        "instead "
        f"found {found} placeholder tokens in the prompt. To fix this, {fix}.",
        "placeholder_mismatch",
    )
