"""What every family's processor shares: the processed item, the spans it fills, and placeholder expansion.

A processor turns decoded media into arrays for the device and a prompt with one placeholder per item into a prompt with
one token per embedding row. NumPy only: nothing here may import jax.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mmjax.types import RequestError

ProcessorKwargs = Mapping[str, Any]
Encode = Callable[..., list[int]]  # `Tokenizer.encode` with the options of a request as its defaults


@dataclasses.dataclass(frozen=True, eq=False)
class MediaItem:
    """One processed media item. `features` lead with the `units` axis (patches, crops, clips), or with the rows where
    the encoder's `picks` say so; read-only.

    times: when each layer of a clip's grid is; empty where nothing is known, and in the families that do not ask.
    Qwen2.5-VL: positions, not yet rounded, from the first layer to where it begins. Qwen3-VL: seconds into the video,
    in the middle between the layer's frames. The Omni families: seconds from the clip's start to where it begins.
    sound: a video that comes with its sound track, which is an audio item of the same prompt. ready: the rows
    themselves, float32 [rows, W], of an item that came as embeddings; it has no features and no units.
    """

    modality: str
    features: dict[str, np.ndarray]
    num_inputs: int
    num_embeds: int  # embedding rows it yields = placeholder tokens it fills
    grid: tuple[int, ...] = ()
    frame_times: tuple[float, ...] = ()
    with_audio: bool = False
    embeds: np.ndarray | None = None

    def __post_init__(self) -> None:
        for array in self._arrays():  # cached and shared between requests: nobody may write
            array.flags.writeable = False

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays())

    def _arrays(self) -> list[np.ndarray]:
        return [*self.features.values(), *([] if self.embeds is None else [self.embeds])]


@dataclasses.dataclass(frozen=True, slots=True)
class PlaceholderSpan:
    """Prompt tokens [start, start + length) take rows first..first+length-1 of item `index` of `kind`.

    An item may have several spans: the frames and the sound of a video take turns.
    """

    start: int
    length: int
    modality: str
    item_index: int
    embed_offset: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class TimestampTokens:
    """The tokens of an answer that tells times: `first` to `last` are times, `end` ends it, `never` is not to come.

    latest: how many steps after `first` it may begin. said: the tokens of the prompt that it goes on from.
    """

    first_id: int
    last_id: int
    eos_id: int
    no_timestamps_id: int
    max_initial_index: int
    prefix_ids: tuple[int, ...]


class ExpandedPrompt(NamedTuple):
    """A prompt after expansion; spans are in prompt order. `encoder_tokens` and `timestamps`, of prompts that ask for
    times, are for encoder-decoder models only."""

    token_ids: list[int]
    spans: list[PlaceholderSpan]
    encoder_token_ids: tuple[int, ...] = ()
    timestamps: TimestampTokens | None = None


class Processor(Protocol):
    """The host side of a family. Constructed as `(config, files, tokenizer)`: config.json, the other parsed JSON files
    by file name, and the tokenizer or None. Families inherit from it what they do not do in a way of their own."""

    mm_limits: Mapping[str, int | None]  # modality -> most items one prompt may hold (None: no bound)
    placeholder_text: Mapping[
        str, str
    ]  # modality -> text that stands for one item in a prompt, {i} for its number from 1
    placeholder_token: Mapping[str, str]  # modality -> the part of `placeholder` that expands
    accepted_kwargs: frozenset[str]  # processor kwargs that `item` understands
    embed_fields: Mapping[str, tuple[str, ...]]  # modality -> arrays in which embeddings come: the rows, then a size
    sampling_rate: int | None  # of the audio that `item` takes

    def tokenize(self, text: str, encode: Encode) -> list[int]:
        """Token ids of a prompt's text, placeholders not expanded."""
        return encode(text)

    def process_item(self, modality: str, media: Any, kwargs: ProcessorKwargs) -> MediaItem: ...

    def num_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> int:
        """Rows of an item of this size: image (height, width), video (frames, height, width), audio (samples,)."""
        ...

    def item_for_embeds(self, modality: str, size: tuple[int, ...], kwargs: ProcessorKwargs) -> MediaItem:
        """The item that embeddings of this size make, without its rows; the size of those that bring none is how many
        rows they are."""
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

    def expand_prompt(self, token_ids: Sequence[int], items: Mapping[str, Sequence[MediaItem]]) -> ExpandedPrompt: ...

    def rope_positions(
        self, token_ids: Sequence[int], spans: Sequence[PlaceholderSpan], items: Mapping[str, Sequence[MediaItem]]
    ) -> tuple[np.ndarray, int]:
        """(int32[R, T], delta): token i >= T sits at i + delta on every row."""
        ...


def linear_positions(length: int) -> tuple[np.ndarray, int]:
    """Ordinary 1-D positions: (int32[1, length], 0)."""
    return np.arange(length, dtype=np.int32)[None], 0


def expand_placeholders(
    token_ids: Sequence[int],
    items: Mapping[str, Sequence[MediaItem]],
    placeholder_ids: Mapping[str, int],
    placeholder_text: Mapping[str, str],
) -> ExpandedPrompt:
    """Replace the n-th marker token of each kind by as many as its n-th item has rows.

    Runs that already have the right length are kept, so that expanded prompts can be sent again. Kinds are independent:
    one may come expanded and another not. A count that fits neither way is a RequestError.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    taken: list[tuple[int, int, str, int]] = []  # first marker, markers consumed, kind, index
    for modality, marker in placeholder_ids.items():
        found = np.flatnonzero(ids == marker)
        rows = [item.num_embeds for item in items.get(modality, ())]
        if len(found) == len(rows):
            lengths = [1] * len(rows)
        elif len(found) == sum(rows):
            lengths = rows
        else:
            raise placeholder_mismatch(modality, len(rows), len(found), placeholder_text[modality])
        first = np.cumsum([0, *lengths])
        for index, length in enumerate(lengths):
            run = found[first[index] : first[index] + length]
            if run[-1] - run[0] != length - 1:
                raise placeholder_mismatch(modality, len(rows), len(found), placeholder_text[modality])
            taken.append((int(run[0]), length, modality, index))
    out: list[int] = []
    spans: list[PlaceholderSpan] = []
    done = 0
    for start, length, modality, index in sorted(taken):
        out.extend(token_ids[done:start])
        rows_here = items[modality][index].num_embeds
        spans.append(PlaceholderSpan(len(out), rows_here, modality, index))
        out.extend([placeholder_ids[modality]] * rows_here)
        done = start + length
    out.extend(token_ids[done:])
    return ExpandedPrompt(out, spans)


def placeholder_mismatch(modality: str, expected: int, found: int, placeholder: str) -> RequestError:
    """A prompt with `found` placeholders for `expected` items."""
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
