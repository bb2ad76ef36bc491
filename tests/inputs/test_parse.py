"""Forms of prompts and media: one item or many, and every error message."""

import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmjax.inputs import parse
from mmjax.types import RequestError

PICTURE = Image.new("RGB", (4, 4))
IMAGE = np.zeros((4, 5, 3), np.uint8)
CLIP = np.zeros((2, 4, 5, 3), np.uint8)
SOUND = np.zeros(9, np.float32)


class Tensor:
    """An array of a library other than NumPy, like those of torch and JAX."""

    def __init__(self, *shape: int):
        self.array = np.zeros(shape, np.float32)
        self.shape, self.ndim, self.dtype = self.array.shape, self.array.ndim, self.array.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array

    def __iter__(self) -> Any:
        return (Tensor(*self.shape[1:]) for _ in range(self.shape[0]))


def count(kind: str, data: Any) -> int:
    return len(parse.split_items(kind, data))


def test_batches() -> None:
    assert parse.split_prompts("hello") == ["hello"]
    assert parse.split_prompts({"prompt": "x"}) == [{"prompt": "x"}]
    assert parse.split_prompts(b"x") == [b"x"]
    assert parse.split_prompts([1, 2]) == [[1, 2]]
    assert parse.split_prompts([]) == []
    assert parse.split_prompts(["a", [1, 2], {"prompt": "b"}]) == ["a", [1, 2], {"prompt": "b"}]
    assert parse.split_prompts(("a", "b")) == ["a", "b"]
    assert parse.split_prompts([[1], [2]]) == [[1], [2]]
    for wrong in (None, 3, object()):
        with pytest.raises(TypeError, match="Prompt should be a string, list of tokens, or dictionary"):
            parse.split_prompts(wrong)


@pytest.mark.parametrize(
    ("prompt", "encoder_decoder", "words"),
    [
        ([1, "a"], False, "Token prompt should be a list of integers"),
        ([1.0], False, "Token prompt should be a list of integers"),
        ([True], False, "Token prompt should be a list of integers"),
        ({"prompt_token_ids": "12"}, False, "Token prompt should be a list of integers"),
        ({}, False, "Prompt dictionary must contain text, tokens, or embeddings"),
        ({"prompt": None}, False, "Prompt dictionary must contain text, tokens, or embeddings"),
        ({"multi_modal_data": {"image": PICTURE}}, False, "Prompt dictionary must contain text, tokens, or embeddings"),
        ({"prompt": 3}, False, "Prompt should be a string, list of tokens, or dictionary"),
        (3, False, "Prompt should be a string, list of tokens, or dictionary"),
        (None, False, "Prompt should be a string, list of tokens, or dictionary"),
        (b"x", False, "Prompt should be a string, list of tokens, or dictionary"),
        (object(), False, "Prompt should be a string, list of tokens, or dictionary"),
        (
            {"encoder_prompt": "a", "decoder_prompt": "b"},
            False,
            "Cannot pass encoder-decoder prompt to decoder-only models",
        ),
        ({"encoder_prompt": "a"}, True, "needs the key `decoder_prompt`"),
        (
            {"encoder_prompt": "a", "decoder_prompt": {"prompt": "", "multi_modal_data": {"audio": SOUND}}},
            True,
            "Cannot pass multi-modal inputs to decoder prompt",
        ),
        ({"prompt_embeds": IMAGE}, True, "Cannot pass embeddings prompt to encoder-decoder models"),
        (
            {"encoder_prompt": {"prompt_embeds": IMAGE}, "decoder_prompt": None},
            True,
            "Cannot pass embeddings prompt to encoder-decoder models",
        ),
        ({"prompt": "x", "multi_modal_data": [PICTURE]}, False, "multi_modal_data should be a dictionary"),
        ({"prompt": "x", "mm_processor_kwargs": ["a"]}, False, "mm_processor_kwargs should be a dictionary"),
    ],
)
def test_wrong_types_are_type_errors(prompt: Any, encoder_decoder: bool, words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        parse.parse_prompt(prompt, encoder_decoder=encoder_decoder)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"multi_modal_data": {"smell": 1}}, "Unsupported modality: smell"),
        (
            {"multi_modal_data": {"image": PICTURE}, "multi_modal_uuids": {"smell": ["a"]}},
            "Unsupported modality: smell",
        ),
        ({"multi_modal_data": {"image": None}}, "multi_modal_data['image'] is empty but multi_modal_uuids['image'] is"),
        (
            {"multi_modal_data": {"audio": None}, "multi_modal_uuids": {"audio": []}},
            "multi_modal_data['audio'] is empty but multi_modal_uuids['audio'] is missing.",
        ),
        *(
            (
                {"multi_modal_data": {"image": [PICTURE]}, "multi_modal_uuids": {"image": uuids}},
                f"must have same length as multi_modal_data['image'], but got {len(uuids)} vs 1.",
            )
            for uuids in ([], ["a", "b"], [None] * 3)
        ),
        ({"multi_modal_uuids": {"image": ""}}, "list of non-empty strings"),
        (
            {"multi_modal_data": {"image": [PICTURE] * 2}, "multi_modal_uuids": {"image": ["a"]}},
            "multi_modal_uuids['image'] must have same length as multi_modal_data['image'], but got 1 vs 2.",
        ),
        (
            {"multi_modal_data": {"image": [PICTURE, None]}, "multi_modal_uuids": {"image": ["a", None]}},
            "multi_modal_data['image'][1] is empty but multi_modal_uuids['image'][1] is missing.",
        ),
        (
            {"multi_modal_data": {"audio": [None]}},
            "multi_modal_data['audio'][0] is empty but multi_modal_uuids['audio'][0] is missing.",
        ),
        ({"multi_modal_data": {"image": PICTURE}, "multi_modal_uuids": {"image": [3]}}, "list of non-empty strings"),
        ({"multi_modal_data": {"image": PICTURE}, "multi_modal_uuids": {"image": [""]}}, "list of non-empty strings"),
        ({"multi_modal_data": {"image": np.zeros((4, 5))}}, "An array of shape (4, 5) cannot be read as image"),
        ({"multi_modal_data": {"image": np.zeros((1, 1, 4, 5, 3))}}, "cannot be read as image: one item has 3 axes"),
        ({"multi_modal_data": {"video": IMAGE}}, "cannot be read as video: one item has 4 axes, several have 5"),
        ({"multi_modal_data": {"audio": IMAGE}}, "cannot be read as audio"),
        ({"multi_modal_data": {"audio": [SOUND, 16000]}}, "must be a tuple (array, rate), not a list"),
        ({"multi_modal_data": {"image": Tensor(1, 5, 8)}}, "--enable-mm-embeds` to input `image_embeds`"),
        ({"multi_modal_data": {"image": Tensor(5, 8)}}, "--enable-mm-embeds` to input `image_embeds`"),
        ({"multi_modal_data": {"image": [Tensor(5, 8)]}}, "--enable-mm-embeds` to input `image_embeds`"),
        ({"multi_modal_data": {"image": [np.zeros((5, 8))]}}, "--enable-mm-embeds` to input `image_embeds`"),
        ({"multi_modal_data": {"image": {"image_embeds": IMAGE}}}, "--enable-mm-embeds` to input `image_embeds`"),
        ({"multi_modal_data": {"video": Tensor(1, 5, 8)}}, "--enable-mm-embeds` to input `video_embeds`"),
        ({"multi_modal_data": {"audio": [Tensor(5, 8)]}}, "--enable-mm-embeds` to input `audio_embeds`"),
        ({"multi_modal_data": {"audio": Tensor(1, 5, 8)}}, "--enable-mm-embeds` to input `audio_embeds`"),
        ({"prompt_embeds": Tensor(5, 8)}, "You must set `--enable-prompt-embeds`"),
        ({"cache_salt": ""}, "cache_salt must be a non-empty string"),
        ({"cache_salt": "\ud800"}, "cache_salt must be valid Unicode"),
        ({"cache_salt": 3}, "cache_salt must be a non-empty string"),
    ],
)
def test_wrong_values_are_request_errors(prompt: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse.parse_prompt({"prompt": "x", **prompt})
    assert words in str(caught.value) and caught.value.code != "invalid_request"


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
@pytest.mark.parametrize("uuids", [{}, {"multi_modal_uuids": None}, []])
def test_an_empty_list_is_no_media(modality: str, uuids: Any) -> None:
    named = uuids if isinstance(uuids, dict) else {"multi_modal_uuids": {modality: uuids}}
    assert not parse.parse_prompt({"prompt": "x", "multi_modal_data": {modality: []}, **named}).media
    asked = {"prompt": "x", "multi_modal_data": {modality: []}, "multi_modal_uuids": {modality: ["a"]}}
    assert [item.uuid for item in parse.parse_prompt(asked).media[modality]] == ["a"], "which the cache may have"


@pytest.mark.parametrize(
    ("data", "items"),
    [
        (PICTURE, 1),
        (IMAGE, 1),
        ([PICTURE], 1),
        ([IMAGE, PICTURE, None], 3),
        ((PICTURE, PICTURE), 2),
        (np.stack([IMAGE] * 3), 3),
        (Tensor(3, 3, 4, 5), 3),
        ([Tensor(3, 4, 5)] * 2, 2),
        (None, 0),
    ],
)
def test_image_items(data: Any, items: int) -> None:
    assert count("image", data) == items


@pytest.mark.parametrize(
    ("data", "items"),
    [
        (CLIP, 1),
        (Tensor(2, 3, 4, 5), 1),
        ([PICTURE, PICTURE], 1),
        ([IMAGE, IMAGE], 1),  # a flat list of frames is one video
        ([Tensor(3, 4, 5)] * 2, 1),
        ([CLIP, CLIP], 2),
        ([Tensor(2, 3, 4, 5)], 1),
        ([[PICTURE], [PICTURE]], 2),
        (np.stack([CLIP] * 3), 3),
        ((CLIP, {"fps": 2}), 1),
        (([PICTURE], {"fps": 2}), 1),
        ([(CLIP, {"fps": 2})] * 2, 2),
        ([CLIP, None], 2),
    ],
)
def test_video_items(data: Any, items: int) -> None:
    assert count("video", data) == items


@pytest.mark.parametrize(
    ("data", "items"),
    [
        (SOUND, 1),
        (Tensor(9), 1),
        ([0.0, 0.5], 1),
        ([0, 1], 1),
        ((SOUND, 16000), 1),
        ((SOUND, 16000.0), 1),
        ((SOUND, np.int64(16000)), 1),
        ((SOUND, None), 1),
        (([0.0], 8000), 1),
        ((np.zeros((2, 9)), 8000), 1),
        ((Tensor(9), 8000), 1),
        ([SOUND, SOUND], 2),
        ((SOUND, SOUND), 2),
        ([(SOUND, 16000)] * 2, 2),
        ([[0.0], [0.5]], 2),
        (np.zeros((3, 9)), 3),
        (Tensor(3, 9), 3),
        ([np.zeros((2, 9))], 1),
        ([None, SOUND], 2),
    ],
)
def test_audio_items(data: Any, items: int) -> None:
    assert count("audio", data) == items


def test_text_and_token_prompts() -> None:
    assert parse.parse_prompt("hi").text == "hi" and parse.parse_prompt("hi").token_ids is None
    assert parse.parse_prompt([1, 2]).token_ids == (1, 2)
    assert parse.parse_prompt({"prompt_token_ids": [np.int32(4)], "prompt": "told", "other": 1}).token_ids == (4,)
    whole = parse.parse_prompt(
        {"prompt": "x", "multi_modal_data": None, "mm_processor_kwargs": {"a": 1}, "cache_salt": "s", "other": 1}
    )
    assert (whole.media, whole.processor_kwargs, whole.cache_salt) == ({}, {"a": 1}, "s")
    assert parse.parse_prompt({"prompt": "x", "multi_modal_data": {}}).media == {}


def test_names() -> None:
    def media(**given: Any) -> list[tuple[bool, str | None]]:
        parsed = parse.parse_prompt(
            {"prompt": "x", **{f"multi_modal_{name}": value for name, value in given.items()}}
        ).media
        return [(entry.data is None, entry.uuid) for entry in parsed["image"]]

    assert media(data={"image": PICTURE}, uuids={"image": "a"}) == [(False, "a")]
    assert media(data={"image": [None, PICTURE]}, uuids={"image": ["a", None]}) == [(True, "a"), (False, None)]
    assert media(data={"image": None}, uuids={"image": ["a", "b"]}) == [(True, "a"), (True, "b")]
    assert media(data={"image": []}, uuids={"image": ["a"]}) == [(True, "a")]
    assert media(uuids={"image": "a"}) == [(True, "a")]
    # optional if there are data
    lenient: tuple[Any, ...] = (None, {}, {"image": None}, {"video": None}, {"video": []})
    for uuids in lenient:
        assert media(data={"image": PICTURE}, uuids=uuids) == [(False, None)]


def test_encoder_decoder_prompts() -> None:
    sound = {"prompt": "of the encoder", "multi_modal_data": {"audio": SOUND}, "cache_salt": "s"}
    pair = parse.parse_prompt({"encoder_prompt": sound, "decoder_prompt": "start"}, encoder_decoder=True)
    assert (pair.text, pair.encoder_text, pair.cache_salt, len(pair.media["audio"])) == (
        "start",
        "of the encoder",
        "s",
        1,
    )
    pair = parse.parse_prompt({"encoder_prompt": sound, "decoder_prompt": None}, encoder_decoder=True)
    assert pair.text == "" and pair.token_ids is None
    pair = parse.parse_prompt({"encoder_prompt": sound, "decoder_prompt": [5]}, encoder_decoder=True)
    assert pair.text is None and pair.token_ids == (5,)


def test_limits() -> None:
    assert parse.mm_limits(None) == {"image": 999, "video": 999, "audio": 999}
    assert parse.mm_limits({"image": 2, "video": {"count": 0, "num_frames": 8}, "audio": {"length": 9}}) == {
        "image": 2, "video": 0, "audio": 999,
    }  # fmt: skip
    for wrong in ({"smell": 1}, {"image": -1}, {"image": 1.5}, {"image": True}, {"image": {"length": 3}},
                  {"image": {"width": 0}}):  # fmt: skip
        with pytest.raises(RequestError, match="limit_mm_per_prompt"):
            parse.mm_limits(wrong)


def test_counts() -> None:
    parse.check_count("image", 2, 2, None)
    more = "Set `--limit-mm-per-prompt` to increase this limit."
    for count_, limit, hard, words in (
        (3, 2, None, f"At most 2 image(s) may be provided in one prompt. {more}"),
        (2, 1, 5, f"At most 1 image(s) may be provided in one prompt. {more}"),
        (2, 999, 1, "At most 1 image(s) may be provided in one prompt."),
        (1, 0, None, f"At most 0 image(s) may be provided in one prompt. {more}"),
        (1, 999, 0, "At most 0 image(s) may be provided in one prompt."),
    ):
        with pytest.raises(RequestError) as caught:
            parse.check_count("image", count_, limit, hard)
        assert str(caught.value) == words
