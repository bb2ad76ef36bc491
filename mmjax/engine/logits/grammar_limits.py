"""Limits of what a constraint may cost, those that its text alone shows. llguidance checks the others as it goes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mmjax.types import ValidationError

MAX_CHOICES = 4096
# Characters that the repeat counts of a pattern add when they are written out. (abcdefghij){2000} has that many: its
# first mask takes 22 ms, each later one 7 ms; ten times as many, 340 and 70 ms (demo model, one core).
MAX_REPEATED = 20_000
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_ENORMOUS = 10**9
_NAMED_ATOM = "pPxu"  # \p{Greek}, \x{1F600}: braces that are no count


def check_choices(choices: list[str] | tuple[str, ...]) -> None:
    """ValidationError for more than MAX_CHOICES choices."""
    if len(choices) > MAX_CHOICES:
        raise ValidationError(
            f"structured_outputs choice has {len(choices)} entries, at most {MAX_CHOICES} are allowed.",
            parameter="structured_outputs",
        )


def check_repeats(name: str, patterns: Iterator[str]) -> None:
    """ValidationError for patterns whose repeat counts add more than MAX_REPEATED characters. name: of the
    constraint."""
    total = sum(map(repeated_size, patterns))
    if total > MAX_REPEATED:
        size = str(total) if total < _ENORMOUS // 2 else "a billion"
        raise ValidationError(
            f"structured_outputs {name}: the repeat counts stand for {size} characters, "
            f"at most {MAX_REPEATED} are allowed. Use smaller counts, or * and +.",
            parameter="structured_outputs",
        )


def patterns_of(schema: Any) -> Iterator[str]:
    """The regular expressions in a JSON schema."""
    rest = [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            if isinstance(value.get("pattern"), str):
                yield value["pattern"]
            if isinstance(value.get("patternProperties"), dict):
                yield from value["patternProperties"]
            rest += value.values()
        elif isinstance(value, list):
            rest += value


def repeated_size(pattern: str) -> int:
    """How many characters the repeat counts of a regular expression add when they are written out: 6 for (abc){3}.

    An estimate: it knows groups, classes and escapes, and takes every other sign for a character.
    """
    groups, last, added, at = [0], 0, 0, 0
    while at < len(pattern):
        sign = pattern[at]
        count = _COUNT.match(pattern, at) if sign == "{" else None
        at += 1
        if count is not None:
            most = max((_number(digits) for digits in count.groups() if digits), default=1)
            more = last * max(0, most - 1)
            groups[-1], last, added = groups[-1] + more, last + more, min(added + more, _ENORMOUS)
            at = count.end()
        elif sign == "(":
            groups.append(0)
            last = 0
        elif sign == ")" and len(groups) > 1:
            last = min(groups.pop(), _ENORMOUS)
            groups[-1] += last
        elif sign not in "|*+?^$":
            at = _end_of_atom(pattern, at - 1)
            groups[-1], last = groups[-1] + 1, 1
    return added


def _number(digits: str) -> int:
    return int(digits) if len(digits) < 10 else _ENORMOUS


def _end_of_atom(pattern: str, at: int) -> int:
    """The index after the character, escape or class that begins at `at`."""
    if pattern[at] == "\\":
        is_named = pattern[at + 1 : at + 2] in tuple(_NAMED_ATOM) and pattern[at + 2 : at + 3] == "{"
        end = pattern.find("}", at) if is_named else -1
        return end + 1 if end >= 0 else at + 2
    if pattern[at] != "[":
        return at + 1
    at += 2 if pattern[at + 1 : at + 2] == "^" else 1
    at += pattern[at : at + 1] == "]"
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at + 1
