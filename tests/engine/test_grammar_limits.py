"""What the repeat counts of a constraint stand for."""

import pytest

from mmjax.engine.logits.grammar_limits import patterns_of, repeated_size


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("abc*d+(e|f)?", 0),
        ("(abc){3}", 6),
        ("a{,5}b{2,}c{3,7}?", 11),
        ("((a{10}){10}){10}", 999),
        (r"[a\]x]{4}\d{4}[]a]{2}[^]a]{2}", 8),
        (r"\p{Greek}{3}\x{1F600}{2}", 3),
        (r"\{9\}\({9}", 8),
        ("a{0}b{1}c{}", 0),
        (")a{3", 0),
        ("a{99999999999999999999}", 10**9 - 1),
        ("[", 0),
        ("\\", 0),
    ],
)
def test_repeated_size(pattern: str, size: int) -> None:
    assert repeated_size(pattern) == size


def test_patterns_of_a_schema() -> None:
    schema = {
        "anyOf": [{"pattern": "a"}, {"properties": {"pattern": {"pattern": "b"}}}],
        "patternProperties": {"c": {"items": {"pattern": "d"}}},
    }
    assert sorted(patterns_of(schema)) == ["a", "b", "c", "d"]
