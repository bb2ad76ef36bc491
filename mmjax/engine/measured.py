"""What compiled programs need of a device's memory."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

Layouts = tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]] | None, ...]
"""For each array of the parameters (its axes from the slowest to the fastest, its tiles), or None: by default."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """state_bytes: the state but for the KV cache. temp_bytes: the most that one program needs while it runs, its
    results included. code_bytes: the programs themselves. layouts: chosen by the compiler. All on one device."""

    state_bytes: int
    temp_bytes: int
    code_bytes: int
    layouts: Layouts

    def as_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Measured:
        values: dict[str, Any] = json.loads(text)
        layouts = [
            layout and (tuple(layout[0]), tuple(tuple(tile) for tile in layout[1])) for layout in values.pop("layouts")
        ]
        return cls(**values, layouts=tuple(layouts))


@dataclasses.dataclass(frozen=True)
class ProgramUsage:
    """Bytes of one program on one device. output_bytes: of results that do not take the place of arguments."""

    argument_bytes: int
    temp_bytes: int
    output_bytes: int
    code_bytes: int

    @classmethod
    def of(cls, analysis: Any) -> ProgramUsage:
        """From `memory_analysis` of a compiled program."""
        return cls(
            argument_bytes=analysis.argument_size_in_bytes,
            temp_bytes=analysis.temp_size_in_bytes,
            output_bytes=max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0),
            code_bytes=analysis.generated_code_size_in_bytes,
        )
