"""Bad requests: each is refused with a message that says what to change, and a good request follows."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from engine_inputs import IMAGE, chat_text, greedy
from mmjax import LLM
from prompts import chat_one, generate_one, image_url_part, random_image, same_outputs, user_messages

ROWS = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
GRID = np.array([[1, 4, 6]])
TALK: list[dict[str, Any]] = user_messages(image_url_part(random_image(1)), "What?")
PNG = "data:image/png;base64,"


def embeds(rows: Any, grid: Any = GRID, **more: Any) -> dict[str, Any]:
    return {
        "prompt": chat_text(IMAGE),
        "multi_modal_data": {"image": {"image_embeds": rows, "image_grid_thw": grid}},
        **more,
    }


def image(value: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": chat_text(IMAGE), "multi_modal_data": {"image": value}, **more}


def part(**fields: Any) -> list[dict[str, Any]]:
    return user_messages({"type": next(iter(fields)), **fields}, "What?")


# name -> (prompt, error, words)
PROMPTS: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (None, TypeError, "Prompt should be a string, list of tokens, or dictionary"),
    "number": (3, TypeError, "Prompt should be a string, list of tokens, or dictionary"),
    "empty_dict": ({}, TypeError, "must contain text, tokens, or embeddings"),
    "mixed_ids": ([1, "a"], TypeError, "Prompt should be a string|list of integers"),
    "encoder": ({"encoder_prompt": "a", "decoder_prompt": None}, TypeError, "to decoder-only models"),
    "empty": ("", ValueError, "prompt cannot be empty"),
    "vocabulary": ({"prompt_token_ids": [10**7]}, ValueError, "out of vocabulary"),
    "long": ("word " * 5000, ValueError, "maximum context length"),
    "modality": ({"prompt": "x", "multi_modal_data": {"smell": 1}}, ValueError, "Unsupported modality: smell"),
    "audio": ({"prompt": "x", "multi_modal_data": {"audio": np.zeros(9)}}, ValueError, "At most 0 audio"),
    "data_list": ({"prompt": "x", "multi_modal_data": [random_image(1)]}, TypeError, "dictionary by modality"),
    "no_placeholder": (
        {"prompt": "x", "multi_modal_data": {"image": random_image(1)}},
        ValueError,
        "exactly once per image",
    ),
    "two_placeholders": (image(random_image(1), prompt=chat_text(IMAGE * 2)), ValueError, "found 2 placeholder"),
    "no_image": ({"prompt": chat_text(IMAGE)}, ValueError, "pass the image data"),
    "salt": ({"prompt": "x", "cache_salt": ""}, ValueError, "cache_salt must be a non-empty string"),
    "salt_kind": ({"prompt": "x", "cache_salt": 7}, ValueError, "cache_salt must be a non-empty string"),
    "path": (image("cat.png"), ValueError, "Open files first"),
    "bytes": (image(b"\x89PNG"), ValueError, "must be a PIL image or an array"),
    "object": (image(object()), ValueError, "Cannot identify"),
    "nan": (image(np.full((4, 4, 3), np.nan)), ValueError, "must lie in 0..255"),
    "five_axes": (image(np.zeros((1, 1, 1, 1, 3), np.uint8)), ValueError, "one item has 3 axes"),
    "no_channels": (image(np.zeros((30, 40, 7), np.uint8)), ValueError, "1, 3 or 4 channels"),
    "no_pixels": (image(np.zeros((0, 40, 3), np.uint8)), ValueError, "is empty"),
    "thin": (image(np.zeros((2, 900, 3), np.uint8)), ValueError, "Crop or pad"),
    "kwargs": (image(random_image(1), mm_processor_kwargs={"max_pixels": -3}), ValueError, "positive integer"),
    "kwargs_kind": (
        image(random_image(1), mm_processor_kwargs=[1]),
        TypeError,
        "mm_processor_kwargs should be a dictionary",
    ),
    "io_kind": (image(random_image(1), media_io_kwargs=3), TypeError, "media_io_kwargs should be a dictionary"),
    "io_inner": (image(random_image(1), media_io_kwargs={"image": 3}), ValueError, "must be a dictionary"),
    "io_color": (
        image(random_image(1), media_io_kwargs={"image": {"rgba_background_color": (0, 0, 256)}}),
        ValueError,
        "3 integers in the range",
    ),
    "uuid_count": (
        image(random_image(1), multi_modal_uuids={"image": ["a", "b"]}),
        ValueError,
        "must have same length",
    ),
    "uuid_kind": (image(random_image(1), multi_modal_uuids={"image": [3]}), ValueError, "list of non-empty strings"),
    "uuid_empty": (image(random_image(1), multi_modal_uuids={"image": [""]}), ValueError, "list of non-empty strings"),
    "uuid_list": (image(random_image(1), multi_modal_uuids=["a"]), TypeError, "dictionary by modality"),
    "uuid_missing": (image(None), ValueError, r"multi_modal_uuids\['image'\] is missing"),
    "uuid_hole": (image([None, random_image(1)]), ValueError, r"multi_modal_uuids\['image'\]\[0\] is missing"),
    "uuid_unknown": (image(None, multi_modal_uuids={"image": "?"}), ValueError, "data is not provided"),
    "too_large": (image(np.zeros((800, 800, 3), np.uint8)), ValueError, "Reduce the input resolution"),
    "embeds_width": (embeds(ROWS[:, :32]), ValueError, "got 32, but model expects 64"),
    "embeds_rows": (embeds(ROWS[:5]), ValueError, "has 5 rows, but its `image_grid_thw`"),
    "embeds_many": (embeds(np.vstack([ROWS, ROWS])), ValueError, "has 12 rows"),
    "embeds_axes": (embeds(ROWS[0]), ValueError, r"must be 2D \(seq_len, hidden_size\) or 3D"),
    "embeds_four": (embeds(ROWS[None, None]), ValueError, "must be 2D"),
    "embeds_ints": (embeds(ROWS.astype(np.int32)), ValueError, "must hold floats, got int32"),
    "embeds_nan": (embeds(ROWS * np.nan), ValueError, "NaN or infinite"),
    "embeds_inf": (embeds(ROWS + np.inf), ValueError, "NaN or infinite"),
    "embeds_empty": (embeds(ROWS[:0], [[1, 0, 0]]), ValueError, "positive sizes|is empty"),
    "embeds_text": (embeds("rows"), ValueError, "must be an array"),
    "embeds_no_grid": (image({"image_embeds": ROWS}), ValueError, "should contain the fields"),
    "embeds_no_rows": (image({"image_grid_thw": GRID}), ValueError, "should contain the fields"),
    "embeds_alone": (image(jnp.asarray(ROWS)), ValueError, "should contain the fields"),
    "embeds_other_key": (image({"embeds": ROWS}), ValueError, "only found the following keys"),
    "grid_odd": (embeds(ROWS, [[1, 3, 8]]), ValueError, "divisible by 2"),
    "grid_zero": (embeds(ROWS, [[0, 4, 6]]), ValueError, "positive sizes"),
    "grid_negative": (embeds(ROWS, [[1, -4, -6]]), ValueError, "positive sizes"),
    "grid_float": (embeds(ROWS, [[1.0, 4.0, 6.0]]), ValueError, "array of integers"),
    "grid_short": (embeds(ROWS, [[4, 6]]), ValueError, r"must be \(t, h, w\) in patches"),
    "grid_long": (embeds(ROWS, [[2, 4, 6]]), ValueError, "t 1"),
    "grid_huge": (embeds(ROWS, [[1, 2**30, 2**30]]), ValueError, "positive sizes"),
    "grid_items": (embeds([ROWS, ROWS]), ValueError, "holds 2 items, but `image_grid_thw` has 1 rows"),
    "grid_sum": (embeds(ROWS, [[1, 4, 6]] * 2), ValueError, "describes 2 items of"),
    "grid_text": (embeds(ROWS, "1,4,6"), ValueError, "array of integers"),
    "grid_ragged": (embeds(ROWS, [[1, 4, 6], [1]]), ValueError, "array of integers"),
    "embeds_audio": (
        {"prompt": "x", "multi_modal_data": {"audio": jnp.zeros((1, 4, 64))}},
        ValueError,
        "takes no audio embeddings",
    ),
    "embeds_count": (embeds(ROWS, prompt=chat_text(IMAGE * 2)), ValueError, "found 2 placeholder"),
    "prompt_embeds": ({"prompt_embeds": ROWS}, ValueError, "pass `prompt` or `prompt_token_ids`"),
}

# name -> (messages, keywords, error, words)
TALKS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "text": ("Hello", {}, TypeError, "messages should be a list"),
    "one_message": (TALK[0], {}, TypeError, "messages should be a list"),
    "mixed": ([TALK, TALK[0]], {}, TypeError, "mixes messages and conversations"),
    "empty_talk": ([[]], {}, ValueError, "at least one message"),
    "no_role": ([{"content": "x"}], {}, ValueError, "'role' must be a string"),
    "bad_content": ([{"role": "user", "content": 5}], {}, TypeError, "string or a list of parts"),
    "bad_part": (user_messages(7), {}, TypeError, "should be a string or a dictionary"),
    "no_type": (user_messages({"image": 3}), {}, ValueError, "Missing 'type' field"),
    "video_part": (user_messages({"type": "video", "video": "x.mp4"}), {}, NotImplementedError, "video_url"),
    "bare_url": (part(image_url="https://example.org/a.png"), {}, ValueError, "without the dictionary"),
    "no_payload": (part(image_url=None), {}, ValueError, "no `uuid`"),
    "scheme": (part(image_url={"url": "ftp://example.org/a.png"}), {}, ValueError, "HTTP, data or file URL"),
    "file": (part(image_url={"url": "file:///etc/passwd"}), {}, ValueError, "--allowed-local-media-path"),
    "no_comma": (part(image_url={"url": "data:image/png;base64"}), {}, ValueError, "comma"),
    "not_base64": (part(image_url={"url": PNG + "@@@@"}), {}, ValueError, "base64"),
    "not_png": (part(image_url={"url": PNG + "QUJD"}), {}, ValueError, "Failed to load image"),
    "audio_part": (part(input_audio={"data": "QUJD", "format": "wav"}), {}, ValueError, "At most 0 audio"),
    "pil_text": (part(image_pil="x"), {}, ValueError, "a PIL image"),
    "embeds_garbage": (part(image_embeds={"image_embeds": "QUJD", "image_grid_thw": GRID}), {}, ValueError, "tensor"),
    "embeds_part_width": (
        part(image_embeds={"image_embeds": ROWS[:, :9], "image_grid_thw": GRID[0]}),
        {},
        ValueError,
        "model expects 64",
    ),
    "embeds_part_grid": (part(image_embeds=ROWS), {}, ValueError, "image_grid_thw"),
    "typed_placeholder": (user_messages(image_url_part(random_image(1)), IMAGE), {}, ValueError, "found 2 placeholder"),
    "placeholder_alone": (user_messages(IMAGE), {}, ValueError, "pass the image data"),
    "format": (TALK, {"chat_template_content_format": "xml"}, ValueError, "auto, string, openai"),
    "wrong_format": (
        TALK,
        {"chat_template": "{{ messages[0].content + '' }}", "chat_template_content_format": "openai"},
        ValueError,
        "chat_template_content_format",
    ),
    "both": (TALK, {"continue_final_message": True}, ValueError, "add_generation_prompt=False"),
    "nothing_to_continue": (
        user_messages(image_url_part(random_image(1))),
        {"continue_final_message": True, "add_generation_prompt": False},
        ValueError,
        "text to continue",
    ),
    "template_file": (TALK, {"chat_template": "nowhere.jinja"}, ValueError, "failed to be opened"),
    "template_syntax": (TALK, {"chat_template": "{% for"}, ValueError, "not valid Jinja"),
    "template_refuses": (TALK, {"chat_template": "{{ raise_exception('no images') }}"}, ValueError, "no images"),
    "template_bomb": (TALK, {"chat_template": "{{ 'x' * 10**11 }}"}, ValueError, "too large"),
    "template_prints_nothing": (user_messages("a"), {"chat_template": "{{ '' }}"}, ValueError, "cannot be empty"),
    "template_kwargs": (TALK, {"chat_template_kwargs": {"chat_template": "x"}}, ValueError, "argument of its own"),
    "tools": (TALK, {"tools": "search"}, TypeError, "list of dictionaries"),
    "io_kwargs": (TALK, {"media_io_kwargs": {"image": {"rgba_background_color": 3}}}, ValueError, "3 integers"),
    "num_frames": (
        part(video_url={"url": "data:video/jpeg;base64,QUJD"}),
        {"media_io_kwargs": {"video": {"num_frames": 0}}},
        ValueError,
        "greater than 0",
    ),
    "processor_kwargs": (TALK, {"mm_processor_kwargs": {"min_pixels": "x"}}, ValueError, "positive integer"),
    "tokenization": (TALK, {"tokenization_kwargs": {"padding": True}}, ValueError, "tokenization_kwargs"),
    "lora": (TALK, {"lora_request": object()}, ValueError, "lora_request=None"),
}


@pytest.fixture(scope="module")
def good(shared_llm: Callable[[str], LLM]) -> tuple[LLM, Any]:
    """The engine, and its output for a good request."""
    llm = shared_llm("qwen2_vl")
    return llm, chat_one(llm, TALK, 2)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str, good: tuple[LLM, Any]) -> None:
    llm, before = good
    prompt, error, words = PROMPTS[name]
    with pytest.raises(error, match=words):
        llm.generate([before.prompt_token_ids[:5], prompt], greedy(2), use_tqdm=False)
    assert llm.model.engines[0].num_unfinished == 0 and same_outputs(before, chat_one(llm, TALK, 2))


@pytest.mark.parametrize("name", TALKS)
def test_conversations(name: str, good: tuple[LLM, Any]) -> None:
    llm, before = good
    messages, kwargs, error, words = TALKS[name]
    with pytest.raises(error, match=words) as caught:
        llm.chat(messages, greedy(2), use_tqdm=False, **kwargs)
    assert isinstance(caught.value, ValueError | TypeError)
    assert llm.model.engines[0].num_unfinished == 0 and same_outputs(before, chat_one(llm, TALK, 2))


def test_one_bad_conversation_among_good_ones(qwen: LLM) -> None:
    with pytest.raises(ValueError, match="Failed to load image"):
        qwen.chat([TALK, part(image_url={"url": PNG + "QUJD"}), TALK], greedy(4), use_tqdm=False)
    assert qwen.model.engines[0].num_unfinished == 0
    assert same_outputs(*qwen.chat([TALK, TALK], greedy(4), use_tqdm=False))


def test_errors_contain_no_media_and_no_addresses(qwen: LLM) -> None:
    for prompt in (image(Image.new("RGB", (1, 900))), image(object()), embeds(ROWS[:2])):
        with pytest.raises(ValueError) as caught:
            generate_one(qwen, prompt)
        assert "0x" not in str(caught.value) and "array(" not in str(caught.value) and len(str(caught.value)) < 400
