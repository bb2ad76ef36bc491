"""`limit_mm_per_prompt`: which modalities there are, and how many items of each one prompt may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.types.errors import ValidationError

UNLIMITED = 999  # items of one modality in one prompt, unless limited
LIMIT_OPTIONS = {  # keys of the dictionary form of a limit; all but `count` only size the profiling run
    "image": ("count", "width", "height"),
    "video": ("count", "num_frames", "width", "height"),
    "audio": ("count", "length"),
}
MODALITIES = tuple(LIMIT_OPTIONS)


def read_limit(modality: Any, limit: Any) -> int:
    """Most items of a modality in one prompt. `limit` is a count, or a dictionary whose `count` may be missing.

    ValidationError: unknown modality or option, a count below 0, another option below 1, anything but integers.
    """
    name = f"limit_mm_per_prompt[{modality!r}]"
    if modality not in LIMIT_OPTIONS:
        raise _wrong("limit_mm_per_prompt", modality, f"keyed by one of {', '.join(MODALITIES)}")
    options = limit if isinstance(limit, Mapping) else {"count": limit}
    for option, value in options.items():
        if option not in LIMIT_OPTIONS[modality]:
            raise _wrong(name, option, f"made of {', '.join(LIMIT_OPTIONS[modality])}")
        least = 0 if option == "count" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            full = f"{name}[{option!r}]" if isinstance(limit, Mapping) else name
            raise _wrong(full, value, f"an int of at least {least}")
    return int(options.get("count", UNLIMITED))


def _wrong(name: str, value: Any, rule: str) -> ValidationError:
    return ValidationError(f"{name} must be {rule}, got {value!r}.", parameter=name, value=value)
