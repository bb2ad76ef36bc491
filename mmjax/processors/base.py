"""What every family's processor shares: the processed item, the spans it fills, and placeholder expansion.

A processor turns decoded media into arrays for the device and a prompt with one placeholder per item into a prompt with
one token per embedding row. NumPy only: nothing here may import jax.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mmjax.types import RequestError

Kwargs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One processed media item. `features` lead with the `units` axis (patches, crops, clips), or with the rows where
    the encoder's `picks` say so; read-only.

    times: when each layer of a clip's grid is; empty where nothing is known, and in the families that do not ask.
    Qwen2.5-VL: positions, not yet rounded, from the first layer to where it begins. Qwen3-VL: seconds into the video,
    in the middle between the layer's frames. The Omni families: seconds from the clip's start to where it begins.
    sound: a video that comes with its sound track, which is an audio item of the same prompt. ready: the rows
    themselves, float32 [rows, W], of an item that came as embeddings; it has no features and no units.
    """

    kind: str
    features: dict[str, np.ndarray]
    units: int
    rows: int  # embedding rows it yields = placeholder tokens it fills
    grid: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    sound: bool = False
    ready: np.ndarray | None = None

    def __post_init__(self) -> None:
        for array in self._arrays():  # cached and shared between requests: nobody may write
            array.flags.writeable = False

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays())

    def _arrays(self) -> list[np.ndarray]:
        return [*self.features.values(), *([] if self.ready is None else [self.ready])]


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Prompt tokens [start, start + length) take rows first..first+length-1 of item `index` of `kind`.

    An item may have several spans: the frames and the sound of a video take turns.
    """

    start: int
    length: int
    kind: str
    index: int
    first: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Timestamps:
    """The tokens of an answer that tells times: `first` to `last` are times, `end` ends it, `never` is not to come.

    latest: how many steps after `first` it may begin. said: the tokens of the prompt that it goes on from.
    """

    first: int
    last: int
    end: int
    never: int
    latest: int
    said: tuple[int, ...]


class Expanded(NamedTuple):
    """A prompt after expansion; spans are in prompt order. `encoder_tokens` and `timestamps`, of prompts that ask for
    times, are for encoder-decoder models only."""

    tokens: list[int]
    spans: list[Span]
    encoder_tokens: tuple[int, ...] = ()
    timestamps: Timestamps | None = None


class Processor(Protocol):
    """The host side of a family. Constructed as `(config, files, tokenizer)`: config.json, the other parsed JSON files
    by file name, and the tokenizer or None."""

    kinds: Mapping[str, int | None]  # modality -> most items one prompt may hold (None: no bound)
    placeholder: Mapping[str, str]  # modality -> text that stands for one item in a prompt, {i} for its number from 1
    marker: Mapping[str, str]  # modality -> the part of `placeholder` that expands
    accepts: frozenset[str]  # processor kwargs that `item` understands
    embeds: Mapping[str, tuple[str, ...]]  # modality -> arrays in which embeddings come: the rows, then a size
    sampling_rate: int | None  # of the audio that `item` takes

    def item(self, kind: str, media: Any, kwargs: Kwargs) -> Item: ...

    def item_rows(self, kind: str, size: tuple[int, ...], kwargs: Kwargs) -> int:
        """Rows of an item of this size: image (height, width), video (frames, height, width), audio (samples,)."""
        ...

    def outline(self, kind: str, size: tuple[int, ...], kwargs: Kwargs) -> Item:
        """The item that embeddings of this size make, without its rows; the size of those that bring none is how many
        rows they are."""
        ...

    def expand(self, tokens: Sequence[int], items: Mapping[str, Sequence[Item]]) -> Expanded: ...

    def positions(
        self, tokens: Sequence[int], spans: Sequence[Span], items: Mapping[str, Sequence[Item]]
    ) -> tuple[np.ndarray, int]:
        """(int32[R, T], delta): token i >= T sits at i + delta on every row."""
        ...


def linear_positions(length: int) -> tuple[np.ndarray, int]:
    """Ordinary 1-D positions: (int32[1, length], 0)."""
    return np.arange(length, dtype=np.int32)[None], 0


def expand_placeholders(
    tokens: Sequence[int],
    items: Mapping[str, Sequence[Item]],
    markers: Mapping[str, int],
    placeholder: Mapping[str, str],
) -> Expanded:
    """Replace the n-th marker token of each kind by as many as its n-th item has rows.

    Runs that already have the right length are kept, so that expanded prompts can be sent again. Kinds are independent:
    one may come expanded and another not. A count that fits neither way is a RequestError.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    taken: list[tuple[int, int, str, int]] = []  # first marker, markers consumed, kind, index
    for kind, marker in markers.items():
        found = np.flatnonzero(ids == marker)
        rows = [item.rows for item in items.get(kind, ())]
        if len(found) == len(rows):
            lengths = [1] * len(rows)
        elif len(found) == sum(rows):
            lengths = rows
        else:
            raise mismatch(kind, len(rows), len(found), placeholder[kind])
        first = np.cumsum([0, *lengths])
        for index, length in enumerate(lengths):
            run = found[first[index] : first[index] + length]
            if run[-1] - run[0] != length - 1:
                raise mismatch(kind, len(rows), len(found), placeholder[kind])
            taken.append((int(run[0]), length, kind, index))
    out: list[int] = []
    spans: list[Span] = []
    done = 0
    for start, length, kind, index in sorted(taken):
        out.extend(tokens[done:start])
        rows_here = items[kind][index].rows
        spans.append(Span(len(out), rows_here, kind, index))
        out.extend([markers[kind]] * rows_here)
        done = start + length
    out.extend(tokens[done:])
    return Expanded(out, spans)


def mismatch(kind: str, expected: int, found: int, placeholder: str) -> RequestError:
    """A prompt with `found` placeholders for `expected` items."""
    placeholder = placeholder.replace("{i}", "1")
    if not expected:
        fix = f"remove {placeholder!r} from the prompt, or pass the {kind} data it stands for"
    else:
        fix = f"write {placeholder!r} exactly once per {kind} item, in the order of the items"
    return RequestError(
        f"Expected there to be {expected} prompt placeholders corresponding to {expected} {kind} items, but instead "
        f"found {found} placeholder tokens in the prompt. To fix this, {fix}.",
        "placeholder_mismatch",
    )
