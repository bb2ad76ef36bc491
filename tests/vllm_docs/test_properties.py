"""Properties of any mix of media: caches, batching and the form of an item do not change outputs."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_inputs import IMAGE, chat_text, greedy, output_ids
from mmjax import LLM
from mmjax.chat.conversation import read_messages, with_strings
from mmjax.types import RequestError
from prompts import encoder_embeds, generate_one, random_image

IMAGES = [random_image(1), random_image(2, 84, 56), random_image(3, 28, 140)]
FORMS = ("raw", "array", "named", "cached", "embeds", "named embeds")
SETTINGS = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

item = st.tuples(st.integers(0, len(IMAGES) - 1), st.sampled_from(FORMS))
piece = st.one_of(st.sampled_from(["What is", " it? ", "A cat", "\n"]), item)
prompts = st.lists(st.lists(piece, min_size=1, max_size=5), min_size=1, max_size=4)


@pytest.fixture
def known(qwen: LLM) -> tuple[LLM, list[dict[str, Any]]]:
    """The engine, and every image as embeddings."""
    made = []
    for image in IMAGES:
        (rows,) = encoder_embeds(qwen, {"prompt": chat_text(IMAGE), "multi_modal_data": {"image": image}})
        grid = [1, round(image.height / 28) * 2, round(image.width / 28) * 2]
        made.append({"image_embeds": rows, "image_grid_thw": np.array(grid)})
    return qwen, made


def prompt_of(pieces: list[Any], embeds: list[dict[str, Any]]) -> dict[str, Any]:
    words, data, names = "", [], []
    for one in pieces:
        if isinstance(one, str):
            words += one
            continue
        number, form = one
        words += IMAGE
        forms = {
            "raw": (IMAGES[number], None),
            "array": (np.asarray(IMAGES[number]), None),
            "named": (IMAGES[number], f"name {number}"),
            "cached": (None, f"name {number}"),
            "embeds": (embeds[number], None),
            "named embeds": (embeds[number], f"rows {number}"),
        }
        data.append(forms[form][0])
        names.append(forms[form][1])
    media = {"multi_modal_data": {"image": data}, "multi_modal_uuids": {"image": names}} if data else {}
    return {"prompt": chat_text(words), **media}


@SETTINGS
@given(prompts)
def test_caches_batch_and_form_change_nothing(known: tuple[LLM, list[dict[str, Any]]], mixes: list[Any]) -> None:
    llm, embeds = known
    plain = [[p if isinstance(p, str) else (p[0], "raw") for p in pieces] for pieces in mixes]
    alone = []
    for pieces in plain:  # nothing is cached: each computes everything
        llm.reset_mm_cache()
        assert llm.reset_prefix_cache()
        alone.append(generate_one(llm, prompt_of(pieces, embeds), 3))
    llm.reset_mm_cache()
    llm.reset_prefix_cache()
    generate_one(llm, prompt_of([(number, "named") for number in range(len(IMAGES))], embeds), 1)  # names become known
    for _ in range(2):  # then everything is cached
        together = llm.generate([prompt_of(pieces, embeds) for pieces in mixes], greedy(3), use_tqdm=False)
        assert output_ids(together) == output_ids(alone)
        assert [o.prompt_token_ids for o in together] == [o.prompt_token_ids for o in alone]


texts = st.text(st.sampled_from("a <img>12\n"), max_size=12)
parts = st.lists(st.one_of(texts, st.sampled_from(["image", "audio"])), max_size=6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(parts, min_size=1, max_size=3), st.booleans())
def test_one_placeholder_per_item(talk: list[list[str]], interleave: bool) -> None:
    """Contents contain exactly one placeholder per media item, or the conversation is refused."""
    marks = {"image": "<img>", "audio": "<snd>"}  # the latter cannot be typed with the letters of `texts`
    messages = [
        {
            "role": "user",
            "content": [
                {"type": f"{p}_url", f"{p}_url": {"url": "u"}} if p in marks else {"type": "text", "text": p}
                for p in content
            ],
        }
        for content in talk
    ]
    try:
        made = with_strings(read_messages(messages), lambda modality, _: marks[modality], interleave=interleave)
    except RequestError as error:
        assert "Found more '<img>' placeholders" in str(error) and not interleave
        return
    for content, message in zip(talk, made, strict=True):
        typed = sum(p.count("<img>") for p in content if p not in marks)
        images = content.count("image")
        expected = images + typed if interleave or not images else max(images, typed)
        assert message["content"].count("<img>") == expected
        assert message["content"].count("<snd>") == content.count("audio")
