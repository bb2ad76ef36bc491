"""What a compiled program's text says about it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)(?:-start)?\("
)
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|called_computations|branch_computations)="
    r"(?:%?([\w.\-]+)|\{([^}]*)\})"
)
BODY = re.compile(r"\bbody=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices: its kind, and the type and shape of its largest result on a device."""

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BYTES.get(self.dtype, 4)


@dataclasses.dataclass(frozen=True)
class Collectives:
    """once: those that a program runs once. per_iteration: those of its loops, for one iteration."""

    once: tuple[Collective, ...]
    per_iteration: tuple[Collective, ...]

    def counts(self) -> Counter[str]:
        """Of one iteration, or of the program if it has no loop with any; by kind."""
        return Counter(each.kind for each in self.per_iteration or self.once)


def collectives(text: str) -> Collectives:
    """Of a program's optimized HLO. A computation that is called twice counts twice."""
    own: dict[str, list[Collective]] = defaultdict(list)
    called: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    entry = current = ""
    for line in text.splitlines():
        if (start := COMPUTATION.match(line)) and not line.startswith(" "):
            current = start[1]
            entry = current if line.startswith("ENTRY") else entry
        elif found := COLLECTIVE.search(line):
            own[current].append(_collective(found[2], found[1]))
        else:
            bodies = set(BODY.findall(line))
            for one, several in CALLED.findall(line):
                called[current] += [(name, name in bodies) for name in re.findall(r"[\w.\-]+", one or several)]
    return Collectives(tuple(_walk(entry, own, called, False)), tuple(_walk(entry, own, called, True)))


def _walk(
    name: str, own: dict[str, list[Collective]], called: dict[str, list[tuple[str, bool]]], inside: bool
) -> Iterator[Collective]:
    """The collectives of a computation and of those that it calls: in loops, or outside of any."""
    if not inside:
        yield from own.get(name, ())
    for callee, is_loop in called.get(name, ()):
        if is_loop and inside:
            yield from _walk(callee, own, called, False)
            yield from _walk(callee, own, called, True)
        elif not is_loop:
            yield from _walk(callee, own, called, inside)


def _collective(kind: str, result: str) -> Collective:
    arrays = [(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in ARRAY.findall(result)]
    dtype, shape = max(arrays, key=lambda array: math.prod(array[1]), default=("", ()))
    return Collective(kind, dtype, shape)
