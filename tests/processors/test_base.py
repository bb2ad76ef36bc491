"""Placeholder expansion, without any model."""

import numpy as np
import pytest

from mmjax.processors.base import MediaItem, PlaceholderSpan, expand_placeholders
from mmjax.types import RequestError

MARKERS = {"image": 90, "video": 91}
PLACEHOLDER = {"image": "<img>", "video": "<vid>"}


def item(modality: str, num_embeds: int) -> MediaItem:
    return MediaItem(
        modality, {"pixels": np.zeros((num_embeds, 2), np.uint8)}, num_inputs=num_embeds, num_embeds=num_embeds
    )


def expand(tokens: list[int], **num_embeds: list[int]) -> tuple[list[int], list[PlaceholderSpan]]:
    items = {modality: [item(modality, n) for n in lengths] for modality, lengths in num_embeds.items()}
    expanded = expand_placeholders(tokens, items, MARKERS, PLACEHOLDER)
    return expanded.token_ids, expanded.spans


def test_nth_placeholder_takes_nth_item_and_spans_follow_the_prompt() -> None:
    tokens, spans = expand([1, 91, 2, 90, 90, 3], image=[2, 3], video=[4])
    assert tokens == [1, 91, 91, 91, 91, 2, 90, 90, 90, 90, 90, 3]
    assert spans == [
        PlaceholderSpan(1, 4, "video", 0),
        PlaceholderSpan(6, 2, "image", 0),
        PlaceholderSpan(8, 3, "image", 1),
    ]


def test_expanded_prompt_expands_to_itself() -> None:
    once, spans = expand([1, 91, 2, 90, 90, 3], image=[2, 3], video=[4])
    assert expand(once, image=[2, 3], video=[4]) == (once, spans)


def test_one_modality_may_be_expanded_and_another_not() -> None:
    assert expand([90, 90, 5, 91], image=[2], video=[3])[0] == [90, 90, 5, 91, 91, 91]


def test_no_media() -> None:
    assert expand([1, 2]) == ([1, 2], [])


@pytest.mark.parametrize(
    ("tokens", "num_embeds", "found"),
    [
        ([1, 90], [2, 2], 1),  # too few
        ([90, 90, 90], [5], 3),  # too many, no run of the right length
        ([90], [], 1),  # nothing to put there
        ([1, 2], [4], 0),
        ([90, 1, 90], [2], 2),  # as many placeholders as embeddings, but apart
    ],
)
def test_mismatch_names_modality_counts_placeholder_and_fix(
    tokens: list[int], num_embeds: list[int], found: int
) -> None:
    with pytest.raises(RequestError) as caught:
        expand(tokens, image=num_embeds)
    message = str(caught.value)
    assert caught.value.code == "placeholder_mismatch"
    assert f"{len(num_embeds)} image items" in message and f"found {found} " in message
    assert "'<img>'" in message and "To fix this" in message


def test_features_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        item("image", 2).features["pixels"][0] = 1
