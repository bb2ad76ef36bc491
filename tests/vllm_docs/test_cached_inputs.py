"""The page's sections on stable UUIDs and cached inputs: uuids instead of media, three caches, and tenants."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine_inputs import IMAGE, chat_text, greedy
from mmjax import LLM
from prompts import (
    base64_image,
    base64_wav,
    chat_one,
    generate_one,
    image_url_part,
    random_chord,
    random_image,
    same_outputs,
    user_messages,
)

Shared = Callable[[str], LLM]
PROMPT = chat_text(IMAGE * 2 + "Compare.")
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
CLIP = np.random.default_rng(5).integers(0, 256, (4, 28, 56, 3), dtype=np.uint8)


def two(images: Any, uuids: Any = None, **more: Any) -> dict[str, Any]:
    names = {} if uuids is None else {"multi_modal_uuids": {"image": uuids}}
    return {"prompt": PROMPT, "multi_modal_data": {"image": images}, **names, **more}


def queries_and_hits(llm: LLM) -> tuple[float, float]:
    metrics = llm.counters()
    return metrics["mm_cache_queries"], metrics["mm_cache_hits"]


def test_stable_uuids(qwen: LLM) -> None:
    """The page's two prompts: both images with uuids, then the first from the cache and the second with its data."""
    first, second = random_image(1), random_image(2)
    full = generate_one(qwen, two([first, second], ["sku-1234-a", None]))
    assert same_outputs(full, generate_one(qwen, two([first, second])))
    assert same_outputs(full, generate_one(qwen, two([None, second], ["sku-1234-a", None])))
    qwen.reset_prefix_cache()
    assert same_outputs(full, generate_one(qwen, two([None, second], ["sku-1234-a", None])))
    everything = generate_one(qwen, two([first, second], ["a", "b"]))
    for data in (None, [None, None], []):
        assert same_outputs(everything, generate_one(qwen, two(data, ["a", "b"])))
    none_at_all = {"prompt": PROMPT, "multi_modal_uuids": {"image": ["a", "b"]}}
    assert same_outputs(everything, generate_one(qwen, none_at_all))
    alone = {"prompt": chat_text(IMAGE), "multi_modal_data": {"image": first}, "multi_modal_uuids": {"image": "a"}}
    assert same_outputs(generate_one(qwen, alone), generate_one(qwen, {**alone, "multi_modal_data": {"image": None}}))
    assert same_outputs(everything, generate_one(qwen, {**two([first, second]), "multi_modal_uuids": {}}))


def test_generic_placeholders_and_uuids(qwen: LLM) -> None:
    """The page's cached example writes `<image><image>`, which is not this model's placeholder."""
    asked = {**two([random_image(1), random_image(2)], ["a", "b"]), "prompt": chat_text("<image><image>Compare.")}
    assert same_outputs(generate_one(qwen, asked), generate_one(qwen, {**asked, "multi_modal_data": {"image": None}}))


def test_uuids_are_trusted(qwen: LLM) -> None:
    """Other data under a cached uuid are ignored."""
    known = generate_one(qwen, two([random_image(1), random_image(2)], ["a", "b"]))
    assert same_outputs(known, generate_one(qwen, two([random_image(3), random_image(4)], ["a", "b"])))
    qwen.reset_mm_cache()
    qwen.reset_prefix_cache()
    assert not same_outputs(known, generate_one(qwen, two([random_image(3), random_image(4)], ["a", "b"])))


def test_uuids_for_every_modality(qwen: LLM, shared_llm: Shared) -> None:
    asked = {"prompt": chat_text(VIDEO + IMAGE + "What?"), "multi_modal_uuids": {"video": ["v"], "image": ["i"]}}
    full = generate_one(qwen, {**asked, "multi_modal_data": {"video": [CLIP], "image": random_image(1)}})
    assert same_outputs(full, generate_one(qwen, {**asked, "multi_modal_data": {"video": [None], "image": None}}))
    assert same_outputs(full, generate_one(qwen, {**asked, "multi_modal_data": {"video": [CLIP], "image": [None]}}))
    # a uuid belongs to one modality
    with pytest.raises(ValueError, match="Cache miss for image at index 0"):
        generate_one(qwen, {**asked, "multi_modal_data": {}, "multi_modal_uuids": {"video": ["v"], "image": ["v"]}})
    whisper = shared_llm("whisper")
    asked = {"prompt": "", "multi_modal_uuids": {"audio": ["s"]}}
    full = generate_one(whisper, {**asked, "multi_modal_data": {"audio": (random_chord(1), 16000)}})
    assert same_outputs(full, generate_one(whisper, {**asked, "multi_modal_data": {"audio": None}}))
    assert same_outputs(full, generate_one(whisper, {**asked, "multi_modal_data": {"audio": [None]}}))


def test_cached_parts(qwen: LLM) -> None:
    """Parts with `uuid`, then without their payload, in every spelling; two messages, mixed with new ones."""
    image = f"data:image/png;base64,{base64_image(random_image(1))}"
    full = chat_one(qwen, user_messages({"type": "image_url", "image_url": {"url": image}, "uuid": "u"}, "What?"))
    for part in (
        {"type": "image_url", "image_url": None, "uuid": "u"},
        {"type": "image_url", "image_url": {}, "uuid": "u"},
        {"type": "image_url", "uuid": "u"},
        {"image_url": None, "uuid": "u"},
        {"type": "image_pil", "image_pil": None, "uuid": "u"},
        {"type": "image_url", "image_url": image, "uuid": "u"},
    ):
        assert same_outputs(full, chat_one(qwen, user_messages(part, "What?")))
    later = [
        *user_messages({"image_url": None, "uuid": "u"}, "A?"),
        {"role": "assistant", "content": "B"},
        *user_messages(image_url_part(random_image(2))),
    ]
    fresh = [
        *user_messages(image_url_part(random_image(1)), "A?"),
        {"role": "assistant", "content": "B"},
        *user_messages(image_url_part(random_image(2))),
    ]
    assert same_outputs(chat_one(qwen, later), chat_one(qwen, fresh))
    clip = {
        "type": "video_url",
        "video_url": {"url": f"data:video/jpeg;base64,{base64_image(random_image(1), 'JPEG')}"},
        "uuid": "c",
    }
    assert same_outputs(
        chat_one(qwen, user_messages(clip)),
        chat_one(qwen, user_messages({"type": "video_url", "video_url": None, "uuid": "c"})),
    )


def test_cached_audio(shared_llm: Shared) -> None:
    llm = shared_llm("qwen2_5_omni")
    payload = {"data": base64_wav(random_chord(2)), "format": "wav"}
    full = chat_one(llm, user_messages({"type": "input_audio", "input_audio": payload, "uuid": "x"}))
    assert same_outputs(full, chat_one(llm, user_messages({"type": "input_audio", "input_audio": None, "uuid": "x"})))


def test_statistics(qwen: LLM) -> None:
    """One query per item, also after a reset."""
    start = queries_and_hits(qwen)
    steps = []
    for image in (random_image(1), random_image(2), random_image(1), None, random_image(1)):
        if image is None:
            qwen.reset_mm_cache()
            continue
        generate_one(qwen, {"prompt": chat_text(IMAGE), "multi_modal_data": {"image": image}}, 1)
        now = queries_and_hits(qwen)
        steps.append((now[0] - start[0], now[1] - start[1]))
    assert steps == [(1, 0), (2, 0), (3, 1), (4, 1)]


def test_encoder_and_prefix_caches(qwen: LLM) -> None:
    """A cached image is not encoded again, whatever the question; equal prefixes are computed once."""

    def encoded() -> float:
        return qwen.counters()["encoded_items"]

    before = encoded()
    first = generate_one(
        qwen,
        {"prompt": chat_text(IMAGE * 2 + "One?"), "multi_modal_data": {"image": [random_image(1), random_image(2)]}},
    )
    assert encoded() - before == 2 and first.num_cached_tokens == 0
    other = generate_one(
        qwen,
        {
            "prompt": chat_text(IMAGE * 2 + "Another?"),
            "multi_modal_data": {"image": [random_image(1), random_image(2)]},
        },
    )
    assert encoded() - before == 2 and other.num_cached_tokens == 16
    swapped = generate_one(
        qwen,
        {"prompt": chat_text(IMAGE * 2 + "One?"), "multi_modal_data": {"image": [random_image(2), random_image(1)]}},
    )
    assert encoded() - before == 2 and swapped.num_cached_tokens == 0  # the same tokens, other pictures
    qwen.reset_mm_cache()
    generate_one(qwen, {"prompt": chat_text("Look: " + IMAGE), "multi_modal_data": {"image": random_image(1)}})
    assert encoded() - before == 3


def test_uuids_belong_to_their_salt(qwen: LLM) -> None:
    """Tenants with different salts can neither read nor replace each other's items, nor share prefixes."""
    mine = generate_one(qwen, two([random_image(1), random_image(2)], ["a", "b"], cache_salt="mine"))
    with pytest.raises(ValueError, match="Cache miss for image at index 0"):
        generate_one(qwen, two(None, ["a", "b"], cache_salt="theirs"))
    with pytest.raises(ValueError, match="Cache miss for image at index 0"):
        generate_one(qwen, two(None, ["a", "b"]))
    theirs = generate_one(qwen, two([random_image(3), random_image(4)], ["a", "b"], cache_salt="theirs"))
    assert same_outputs(mine, generate_one(qwen, two(None, ["a", "b"], cache_salt="mine"))) and not same_outputs(
        mine, theirs
    )
    plain = two([random_image(1), random_image(2)])
    assert generate_one(qwen, {**plain, "cache_salt": "x"}).num_cached_tokens == 0
    assert generate_one(qwen, {**plain, "cache_salt": "y"}).num_cached_tokens == 0
    assert (generate_one(qwen, {**plain, "cache_salt": "y"}).num_cached_tokens or 0) > 0


def test_a_uuid_never_equals_a_hash(qwen: LLM) -> None:
    """The hash of cached content, used as a uuid, is a cache miss."""
    renderer = qwen.model.input_processor
    asked = {"prompt": chat_text(IMAGE), "multi_modal_data": {"image": random_image(1)}}
    generate_one(qwen, asked, 1)
    (entry,) = renderer.process(renderer.parse(asked)).items
    with pytest.raises(ValueError, match="Cache miss"):
        generate_one(qwen, {"prompt": chat_text(IMAGE), "multi_modal_uuids": {"image": [entry.item_hash]}})


def test_options_are_part_of_the_key(qwen: LLM) -> None:
    """The same image or uuid with other options of the processor or the decoder is another item."""
    small = {"mm_processor_kwargs": {"max_pixels": 56 * 56}}
    asked = {
        "prompt": chat_text(IMAGE),
        "multi_modal_data": {"image": random_image(1)},
        "multi_modal_uuids": {"image": ["a"]},
    }
    lengths = [len(generate_one(qwen, {**asked, **more}, 1).prompt_token_ids or []) for more in ({}, small, {})]
    assert lengths[0] == lengths[2] > lengths[1]
    with pytest.raises(ValueError, match="Cache miss"):
        generate_one(qwen, {**asked, "multi_modal_data": None, "mm_processor_kwargs": {"max_pixels": 60 * 60}})
    rgba = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 4), dtype=np.uint8), "RGBA")
    asked = {**asked, "multi_modal_data": {"image": rgba}, "multi_modal_uuids": {"image": ["clear"]}}
    black = {"media_io_kwargs": {"image": {"rgba_background_color": (0, 0, 0)}}}
    assert not same_outputs(generate_one(qwen, asked), generate_one(qwen, {**asked, **black}))


def test_a_cache_miss_fails_alone(qwen: LLM) -> None:
    """An unknown uuid is a bad request; the requests before and after it are served."""
    with pytest.raises(ValueError, match="Cache miss for image at index 1 but data is not provided"):
        qwen.generate(
            [two([random_image(1), random_image(2)]), two([random_image(1), None], [None, "gone"])],
            greedy(4),
            use_tqdm=False,
        )
    assert qwen.model.engines[0].num_unfinished == 0
    with pytest.raises(ValueError, match="Cache miss"):
        chat_one(qwen, user_messages({"type": "image_url", "image_url": None, "uuid": "gone"}))
    assert generate_one(qwen, two([random_image(1), random_image(2)])).finished


def test_without_caches_uuids_are_ignored(make_llm: Callable[..., LLM], qwen: LLM) -> None:
    llm = make_llm("qwen2_vl", mm_processor_cache_gb=0, enable_prefix_caching=False)
    asked = two([random_image(1), random_image(2)], ["a", "a"])  # two images under one name
    assert same_outputs(generate_one(llm, asked), generate_one(qwen, two([random_image(1), random_image(2)])))
    with pytest.raises(ValueError, match="Cache miss for image at index 0"):
        generate_one(llm, two(None, ["a", "a"]))
