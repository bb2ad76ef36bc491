"""Conversion tables: which published tensors become which parameter, and the strict engine that runs them.

The engine claims every tensor exactly once and fills every target exactly once. Whatever does not work out is one of
four errors, all found from names and shapes before a single weight is read.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
from mmjax.converters.transforms import Region, Shape, Transform, identity, transpose

INDEX, MEMBER = "{i}", "{j}"


class ConversionError(ValueError):
    """A checkpoint and a model do not fit together."""


class UnclaimedTensorError(ConversionError):
    """A tensor that no rule claims, or whose place the model does not have."""


class ClaimedTwiceError(ConversionError):
    """A tensor claimed by two rules, or two tensors for one place."""


class WrongShapeError(ConversionError):
    """A tensor whose shape cannot become the parameter's."""


class EmptyHoleError(ConversionError):
    """A parameter, or a part of one, that nothing fills."""


class Tensor(Protocol):
    """A tensor known from its header; the bytes come on demand."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> Shape: ...

    def read(self, region: Region = ()) -> np.ndarray:
        """The value or a region of it, not to be written to. Nothing of it stays in memory beside the result, and no
        more is read than the region needs."""
        ...


@dataclasses.dataclass(frozen=True)
class Rule:
    """`source` (one name or several) becomes `target` through `transform`.

    `{i}` is a number. In the sources only, the target is stacked and the value lands at index i of its leading axis.
    Where the target has it too, a `{j}` behind it in the sources stacks likewise (the experts of a layer). There are no
    other patterns. `optional` says that the model may lack the target; the sources then count as ignored.
    """

    source: str | tuple[str, ...]
    target: str
    transform: Transform = identity
    optional: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def stacked(self) -> bool:
        return MEMBER in self.sources[0] or (INDEX in self.sources[0] and INDEX not in self.target)

    def path(self, number: str) -> str:
        """The target of the sources with this number, "3", or these numbers, "3.17"."""
        return self.target.replace(INDEX, number.partition(".")[0])

    def index(self, number: str) -> int | None:
        """Where on the leading axis they land."""
        return int(number.rpartition(".")[2]) if self.stacked else None

    def source_at(self, part: int, number: str) -> str:
        """The name of one of those sources."""
        first, _, second = number.partition(".")
        return self.sources[part].replace(INDEX, first).replace(MEMBER, second)


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model that its checkpoint may leave in another one.

    key: of config.json, names the other checkpoint. config: the key of config.json for the other's config.json.
    source_prefix, prefix: how the names of the part's tensors begin in the other checkpoint, and in this one.
    """

    key: str
    config: str
    source_prefix: str
    prefix: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rules over canonical names. `prefixes` (old, new) make a name canonical: the first that matches is applied, once.

    `ignore`: patterns that cover the whole canonical name of a tensor that nobody needs. `copies`: a second canonical
    name -> the first, of one and the same tensor: read where the first is missing, ignored where it is not.
    `otherwise`: another layout under the same names, for checkpoints that do not fit as a whole and then do. `parts`:
    what a checkpoint may lack because another has it.
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    prefixes: tuple[tuple[str, str], ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    otherwise: Table | None = None
    parts: tuple[Part, ...] = ()

    def canonical(self, name: str) -> str:
        for old, new in self.prefixes:
            if name.startswith(old):
                return new + name[len(old) :]
        return name

    @functools.cached_property
    def _sources(self) -> tuple[re.Pattern[str], ...]:
        names = [*(_pattern(source).pattern for rule in self.rules for source in rule.sources), *self.ignore]
        return tuple(map(re.compile, (*names, *map(re.escape, self.copies))))

    def knows(self, name: str) -> bool:
        """Whether a tensor of this name is taken or ignored, in any model of the family."""
        canonical = self.canonical(name)
        return any(pattern.fullmatch(canonical) for pattern in self._sources)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One application of a rule: `sources` as the checkpoint calls them; `index` on the leading axis when stacked."""

    sources: tuple[str, ...]
    transform: Transform
    shape: Shape
    index: int | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a checkpoint fills a model. `pieces` follows the order of the model's paths."""

    pieces: dict[str, tuple[Piece, ...]]
    claimed: tuple[str, ...]
    ignored: tuple[str, ...]
    problems: tuple[ConversionError, ...]


def linear(source: str, target: str, weight: Transform = transpose, bias: Transform = identity) -> tuple[Rule, Rule]:
    """The rules of a layer with `.weight` and `.bias`; the parameter of the bias is called `<target>_bias`."""
    return Rule(f"{source}.weight", target, weight), Rule(f"{source}.bias", f"{target}_bias", bias)


def norm(source: str, target: str) -> tuple[Rule, Rule]:
    """The rules of a LayerNorm with scale and bias."""
    return linear(source, target, identity)


def optional(*rules: Rule) -> tuple[Rule, ...]:
    """The same rules, allowed to have no place in the model."""
    return tuple(dataclasses.replace(rule, optional=True) for rule in rules)


class _Survey:
    """Collects who claims what; `plan` turns it into pieces."""

    def __init__(self, table: Table, shapes: Mapping[str, Shape], names: Iterable[str]) -> None:
        self.table = table
        self.shapes = shapes
        self.names = {table.canonical(name) for name in names} if table.copies else set()
        self.patterns = [
            (_pattern(source), row, part)
            for row, rule in enumerate(table.rules)
            for part, source in enumerate(rule.sources)
        ]
        self.ignore = [re.compile(pattern) for pattern in table.ignore]
        self.found: dict[tuple[int, str], dict[int, str]] = {}  # (row, number) -> part -> tensor
        self.claimed: list[str] = []
        self.ignored: list[str] = []
        self.problems: list[ConversionError] = []

    def has_place(self, rule: Rule, number: str) -> bool:
        path = rule.path(number)
        index = rule.index(number)
        return path in self.shapes and (index is None or index < (*self.shapes[path], 0)[0])

    def take(self, name: str, shape: Shape, *, listed: bool) -> None:
        """Give one tensor to the rule that claims it. One that no index lists is ignored where it has no place."""
        if not listed:
            count = len(self.problems)
            self.take(name, shape, listed=True)
            if len(self.problems) > count:
                del self.problems[count:]
                self.ignored.append(name)
            return
        canonical = self.table.canonical(name)
        first = self.table.copies.get(canonical)
        if first is not None and first in self.names:
            self.ignored.append(name)
            return
        canonical = first or canonical
        claims = [
            (".".join(match.groups()), row, part)
            for pattern, row, part in self.patterns
            if (match := pattern.fullmatch(canonical))
        ]
        if any(pattern.fullmatch(canonical) for pattern in self.ignore):
            self.ignored.append(name)
        elif not claims:
            self.problems.append(UnclaimedTensorError(f"tensor {name!r} of shape {shape}: no rule claims it"))
        elif len(claims) > 1:
            paths = " and ".join(self._place(self.table.rules[row], number) for number, row, _ in claims)
            self.problems.append(ClaimedTwiceError(f"tensor {name!r} of shape {shape} is claimed twice: by {paths}"))
        else:
            self._claim(name, shape, *claims[0])

    def _claim(self, name: str, shape: Shape, number: str, row: int, part: int) -> None:
        rule = self.table.rules[row]
        place = self._place(rule, number)
        if not self.has_place(rule, number):
            if rule.optional:
                self.ignored.append(name)
            else:
                told = f"tensor {name!r} of shape {shape} belongs to {place}, which this model does not have"
                self.problems.append(UnclaimedTensorError(told))
            return
        parts = self.found.setdefault((row, number), {})
        if part in parts:
            told = f"{place} is filled twice: by tensor {parts[part]!r} and by tensor {name!r} of shape {shape}"
            self.problems.append(ClaimedTwiceError(told))
            return
        parts[part] = name
        self.claimed.append(name)

    def _place(self, rule: Rule, number: str) -> str:
        path = rule.path(number)
        shape = f" of shape {self.shapes[path]}" if path in self.shapes else ""
        index = rule.index(number)
        return f"parameter {path!r}{'' if index is None else f' (layer {index})'}{shape}"


def _pattern(source: str) -> re.Pattern[str]:
    escaped = re.escape(source)
    for number in (INDEX, MEMBER):
        escaped = escaped.replace(re.escape(number), r"(0|[1-9]\d{0,5})")
    return re.compile(escaped)


def examine(tensors: Mapping[str, Tensor], table: Table, shapes: Mapping[str, Shape]) -> Plan:
    """Match names and shapes, and collect every problem instead of raising. Reads no weights."""
    result = _examine(tensors, table, shapes)
    if result.problems and table.otherwise is not None:
        other = examine(tensors, table.otherwise, shapes)
        return result if other.problems else other
    return result


def _examine(tensors: Mapping[str, Tensor], table: Table, shapes: Mapping[str, Shape]) -> Plan:
    survey = _Survey(table, shapes, tensors)
    listed = {name: getattr(tensor, "listed", True) for name, tensor in tensors.items()}
    for name in sorted(listed, key=lambda name: not listed[name]):
        survey.take(name, tuple(tensors[name].shape), listed=listed[name])
    pieces: dict[str, list[Piece]] = {path: [] for path in shapes}
    for (row, number), parts in survey.found.items():
        rule = table.rules[row]
        path = rule.path(number)
        missing = [rule.source_at(part, number) for part in range(len(rule.sources)) if part not in parts]
        if missing:
            survey.problems.append(
                EmptyHoleError(
                    f"parameter {path!r} of shape {shapes[path]} has a hole: no tensor {missing[0]!r}"
                    f" beside {next(iter(parts.values()))!r}"
                )
            )
        names = tuple(parts[part] for part in sorted(parts))
        shape = tuple(shapes[path])[1:] if rule.stacked else tuple(shapes[path])
        pieces[path].append(Piece(names, rule.transform, shape, rule.index(number)))
        if not missing:
            survey.problems.extend(_misfits(path, pieces[path][-1], shapes[path], tensors))
    for path, shape in shapes.items():
        survey.problems.extend(_holes(path, pieces[path], tuple(shape), table))
    ordered = {path: tuple(sorted(found, key=lambda piece: piece.index or 0)) for path, found in pieces.items()}
    return Plan(ordered, tuple(survey.claimed), tuple(survey.ignored), tuple(survey.problems))


def _misfits(path: str, piece: Piece, whole: Shape, tensors: Mapping[str, Tensor]) -> Iterator[ConversionError]:
    try:
        wanted = piece.transform.sources(piece.shape)
    except ValueError as error:
        names = ", ".join(map(repr, piece.sources))
        yield WrongShapeError(f"parameter {path!r} of shape {whole} cannot be made from {names}: {error}")
        return
    for name, want in zip(piece.sources, wanted, strict=True):
        shape = tuple(tensors[name].shape)
        if shape != want:
            told = f"tensor {name!r} has shape {shape}, but parameter {path!r} of shape {whole} needs {want}"
            yield WrongShapeError(told)


def _holes(path: str, found: list[Piece], shape: Shape, table: Table) -> Iterator[ConversionError]:
    if not found:
        rules = [rule for rule in table.rules if rule.path("#") == re.sub(r"(?<=\.)\d+(?=\.)", "#", path)]
        hint = f"; it comes from {', '.join(rules[0].sources)}" if rules else "; no rule of the table makes it"
        yield EmptyHoleError(f"parameter {path!r} of shape {shape} is not filled by any tensor{hint}")
    elif found[0].index is not None:
        filled = [piece.index for piece in found]
        if missing := sorted(set(range(shape[0])) - set(filled)):
            yield EmptyHoleError(
                f"parameter {path!r} of shape {shape} has a hole at layer {missing[0]}"
                f" ({len(missing)} of {shape[0]} layers are not filled)"
            )
        if len(set(filled)) < len(filled):
            yield ClaimedTwiceError(f"parameter {path!r} of shape {shape}: two rules fill the same layer")
    elif len(found) > 1:
        names = " and ".join(repr(piece.sources[0]) for piece in found)
        yield ClaimedTwiceError(f"parameter {path!r} of shape {shape} is filled twice: by tensors {names}")


def plan(tensors: Mapping[str, Tensor], table: Table, shapes: Mapping[str, Shape]) -> Plan:
    """Match names and shapes; raise the first problem, saying how many more there are. Reads no weights."""
    result = examine(tensors, table, shapes)
    if result.problems:
        first, more = result.problems[0], len(result.problems) - 1
        raise type(first)(f"{first}{f' (and {more} more problems)' if more else ''}")
    return result


def leaf_dtype(pieces: tuple[Piece, ...], tensors: Mapping[str, Tensor]) -> np.dtype:
    """The dtype a parameter comes out in: that of its sources. Should they differ, the widest, and float32 where
    neither holds the other's values, such as float16 and bfloat16."""
    dtypes = {tensors[name].dtype for piece in pieces for name in piece.sources}
    try:
        return np.result_type(*dtypes)
    except TypeError:
        return np.dtype(np.float32)


def build(pieces: tuple[Piece, ...], shape: Shape, tensors: Mapping[str, Tensor], region: Region = ()) -> np.ndarray:
    """The value of one parameter or a region of it, C-contiguous. Raises WrongShapeError when a transform breaks its
    promise."""
    dtype = leaf_dtype(pieces, tensors)
    if pieces[0].index is None:
        return np.ascontiguousarray(_made(pieces[0], tensors, dtype, region))
    first, inner = (region[0].start, region[1:]) if region else (0, ())
    wanted = [piece for piece in pieces if not region or first <= (piece.index or 0) < region[0].stop]
    out = np.empty(tuple(part.stop - part.start for part in region) or shape, dtype)
    for piece in wanted:
        # not named: it is gone before the next one is read
        out[(piece.index or 0) - first] = _made(piece, tensors, dtype, inner)
    return out


def _made(piece: Piece, tensors: Mapping[str, Tensor], dtype: np.dtype, region: Region) -> np.ndarray:
    """The value that a piece gives, or a region of it. Reads no more than one axis of the region lets it leave out."""
    partial = [axis for axis, part in enumerate(region) if part.stop - part.start < piece.shape[axis]]
    shape, parts = piece.shape, None
    for axis in partial:
        parts = piece.transform.source_parts(shape, axis, region[axis])
        if parts is not None:
            partial.remove(axis)
            shape = (*shape[:axis], region[axis].stop - region[axis].start, *shape[axis + 1 :])
            break
    regions = parts or (((),),) * len(piece.sources)
    sources = (
        _read(tensors[name], part).astype(dtype, copy=False) for name, part in zip(piece.sources, regions, strict=True)
    )
    value = piece.transform(*sources, shape=shape)
    if value.shape != shape:
        raise WrongShapeError(f"tensors {piece.sources} became shape {value.shape}, not {shape}")
    return value[tuple(part if axis in partial else slice(None) for axis, part in enumerate(region))]


def _read(tensor: Tensor, regions: tuple[Region, ...]) -> np.ndarray:
    """Regions of a tensor, which differ along one axis, one after the other on it."""
    if len(regions) == 1:
        return tensor.read(regions[0]) if regions[0] else tensor.read()
    (axis,) = (i for i, ends in enumerate(zip(*regions, strict=True)) if ends[0] != ends[1])
    return np.concatenate([tensor.read(region) for region in regions], axis=axis)


Read = Callable[[Region], np.ndarray]
"""Reads a parameter, or the region of it that is asked for."""


def readers(tensors: Mapping[str, Tensor], table: Table, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Read]]:
    """Yield (path, a function that reads it) for every path of `shapes`, in its order. Values have the dtype of the
    source, and may be read-only. Raises ConversionError, before anything is read."""
    ready = plan(tensors, table, shapes)
    return (
        (path, functools.partial(build, pieces, tuple(shapes[path]), tensors)) for path, pieces in ready.pieces.items()
    )


def convert(
    tensors: Mapping[str, Tensor], table: Table, shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, np.ndarray]]:
    """The values that `readers` reads, one at a time."""
    return ((path, read(())) for path, read in readers(tensors, table, shapes))
