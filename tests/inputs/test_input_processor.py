"""Input processing with tiny checkpoints: placeholders, cache, uuids, lengths, and every error message."""

import concurrent.futures
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from input_processors import load_processor, make_input_processor
from mmjax.inputs.input_processor import MAX_CONCURRENT, EngineInput, InputConfig, InputProcessor, ProcessingError
from mmjax.inputs.processor_cache import ProcessorCache
from mmjax.processors.base import MediaItem
from mmjax.types import RequestError, ValidationError

Make = Callable[[str], Path]
RED, BLUE = Image.new("RGB", (60, 60), "red"), Image.new("RGB", (60, 60), "blue")
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
CLIP = np.zeros((3, 56, 56, 3), np.uint8)


@pytest.fixture
def qwen(tiny_dir: Make) -> InputProcessor:
    return make_input_processor("qwen2_vl", tiny_dir("qwen2_vl"))


def process(input_processor: InputProcessor, prompt: Any, **options: Any) -> EngineInput:
    return input_processor.process(input_processor.parse(prompt), **options)


def image_prompt(*images: Any, uuids: Any = None, **more: Any) -> dict[str, Any]:
    names = {} if uuids is None else {"multi_modal_uuids": {"image": uuids}}
    return {"prompt": PLACEHOLDER * len(images) + "Hi", "multi_modal_data": {"image": list(images)}, **names, **more}


def keys(engine_input: EngineInput) -> list[str]:
    return [entry.item_hash for entry in engine_input.items]


def test_items_come_in_the_order_of_the_prompt(qwen: InputProcessor) -> None:
    video = PLACEHOLDER.replace("image", "video")
    data = {"image": [RED, BLUE], "video": CLIP}
    engine_input = process(
        qwen, {"prompt": f"a{PLACEHOLDER}b{video}{PLACEHOLDER}c", "multi_modal_data": data, "cache_salt": "s"}
    )
    assert [(span.modality, span.item_index) for span in engine_input.spans] == [
        ("image", 0),
        ("video", 0),
        ("image", 1),
    ]
    assert [entry.modality for entry in engine_input.items] == ["image", "video", "image"]
    for span, entry in zip(engine_input.spans, engine_input.items, strict=True):
        marker = qwen.tokenizer.id_of(f"<|{span.modality}_pad|>")  # type: ignore[union-attr]
        run = engine_input.token_ids[span.start : span.start + span.length]
        assert (run == marker).all() and span.length == entry.item.num_embeds == entry.item.num_inputs // 4
        assert marker not in engine_input.token_ids[[span.start - 1, span.start + span.length]]
    assert (
        engine_input.rope_positions.shape == (3, len(engine_input.token_ids))
        and engine_input.token_ids.dtype == np.int32
    )
    assert (engine_input.rope_positions[:, -1] + 1 == len(engine_input.token_ids) + engine_input.rope_delta).all()
    assert (engine_input.prompt, engine_input.cache_salt, engine_input.encoder_token_ids) == (
        f"a{PLACEHOLDER}b{video}{PLACEHOLDER}c",
        "s",
        None,
    )


def test_concurrently_processed_prompts_are_limited(qwen: InputProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more would keep the thread that feeds the device from running; those that wait run later."""
    inside, most, plain = [0], [0], qwen._tokenize

    def slowly(*arguments: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1
        return plain(*arguments)

    monkeypatch.setattr(qwen, "_tokenize", slowly)
    with concurrent.futures.ThreadPoolExecutor(4 * MAX_CONCURRENT) as pool:
        engine_input = list(pool.map(lambda i: process(qwen, f"Hi {i}"), range(4 * MAX_CONCURRENT)))
    assert most == [MAX_CONCURRENT] and [one.prompt for one in engine_input] == [
        f"Hi {i}" for i in range(4 * MAX_CONCURRENT)
    ]
    for _ in range(MAX_CONCURRENT + 1):  # an error releases its slot
        with pytest.raises(RequestError):
            process(qwen, image_prompt(RED) | {"prompt": "no placeholder"})


def test_expanded_ids_may_be_sent_again(qwen: InputProcessor) -> None:
    once = process(qwen, image_prompt(RED, BLUE))
    again = process(qwen, {**image_prompt(RED, BLUE), "prompt_token_ids": once.token_ids.tolist()})
    np.testing.assert_array_equal(again.token_ids, once.token_ids)
    assert again.spans == once.spans and again.prompt == once.prompt and keys(again) == keys(once)


def test_generic_placeholders(qwen: InputProcessor, tiny_dir: Make) -> None:
    native = process(qwen, image_prompt(RED, BLUE))
    generic = process(qwen, {**image_prompt(RED, BLUE), "prompt": "<image><image>Hi"})
    np.testing.assert_array_equal(native.token_ids, generic.token_ids)
    assert generic.prompt == "<image><image>Hi"
    both = process(qwen, {"prompt": f"{PLACEHOLDER}<video>Hi", "multi_modal_data": {"image": RED, "video": CLIP}})
    assert [span.modality for span in both.spans] == ["image", "video"]
    # beside the model's own, or in another number, they are text
    for prompt in (f"{PLACEHOLDER}<image>Hi", "<image><image><image>Hi"):
        with pytest.raises(RequestError, match="2 prompt placeholders corresponding to 2 image items"):
            process(qwen, {**image_prompt(RED, BLUE), "prompt": prompt})
    assert process(qwen, {**image_prompt(RED), "prompt": f"{PLACEHOLDER}<image>Hi"}).spans
    llava = make_input_processor("llava", tiny_dir("llava"))
    engine_input = process(llava, {"prompt": "USER: <image>\nHi ASSISTANT:", "multi_modal_data": {"image": RED}})
    assert engine_input.spans[0].length == 16 and engine_input.token_ids[0] == llava.tokenizer.bos_id  # type: ignore[union-attr]
    assert engine_input.rope_positions.shape == (1, len(engine_input.token_ids)) and engine_input.rope_delta == 0


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"prompt": "Hi", "multi_modal_data": {"image": RED}}, "1 prompt placeholders corresponding to 1 image items"),
        ({"prompt": PLACEHOLDER * 2, "multi_modal_data": {"image": RED}}, "found 2 placeholder tokens"),
        ({"prompt": PLACEHOLDER}, "pass the image data it stands for"),
        (
            {"prompt": PLACEHOLDER + "<|video_pad|>", "multi_modal_data": {"image": RED}},
            "0 video items, but instead found 1",
        ),
        (
            {"prompt": "x", "multi_modal_data": {"audio": np.zeros(9)}},
            "At most 0 audio(s) may be provided in one prompt.",
        ),
        ({"prompt": ""}, "The decoder prompt cannot be empty"),
        ({"prompt_token_ids": []}, "The decoder prompt cannot be empty"),
        ({"prompt_token_ids": [1, 10**6]}, "Token id 1000000 is out of vocabulary"),
        ({"prompt_token_ids": [-1]}, "Token id -1 is out of vocabulary"),
        (image_prompt(None, uuids=["new"]), "Cache miss for image at index 0 but data is not provided."),
        (image_prompt(np.zeros((10, 4000, 3), np.uint8)), "aspect ratio must be smaller than 200"),
        (image_prompt(RED, mm_processor_kwargs={"max_pixels": -1}), "max_pixels must be a positive integer"),
        (image_prompt("cat.png"), "Open files first"),
        (image_prompt(object()), "Cannot identify"),
        (image_prompt(np.full((4, 4, 3), np.inf)), "must lie in 0..255"),
    ],
)
def test_refusals_leave_the_input_processor_usable(qwen: InputProcessor, prompt: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        process(qwen, prompt)
    assert words in str(caught.value)
    assert len(process(qwen, "Hello").token_ids)


def test_limits_of_the_operator(tiny_dir: Make) -> None:
    input_processor = make_input_processor(
        "qwen2_vl", tiny_dir("qwen2_vl"), limit_mm_per_prompt={"image": 1, "video": 0}
    )
    advice = r"Set `--limit-mm-per-prompt` to increase this limit\."
    with pytest.raises(RequestError, match=rf"At most 1 image\(s\) may be provided in one prompt\. {advice}"):
        process(input_processor, image_prompt(RED, None, uuids=[None, "a"]))
    with pytest.raises(RequestError, match=rf"At most 0 video\(s\) may be provided in one prompt\. {advice}"):
        process(input_processor, {"prompt": "x", "multi_modal_data": {"video": CLIP}})
    process(input_processor, image_prompt(RED))


def test_lengths(tiny_dir: Make) -> None:
    input_processor = make_input_processor("qwen2_vl", tiny_dir("qwen2_vl"), max_model_len=20, prompt_embeds_dim=32)
    assert len(process(input_processor, [3] * 19).token_ids) == 19
    for length in (20, 21, 500):
        with pytest.raises(
            RequestError, match=rf"decoder prompt \(length {length}\) is longer than the maximum model len"
        ):
            process(input_processor, [3] * length)
    with pytest.raises(RequestError, match="number of text tokens plus multimodal tokens"):
        process(input_processor, image_prompt(Image.new("RGB", (200, 200))))  # fits before expansion, not after
    wordy = image_prompt(Image.new("RGB", (200, 200)))
    for long in ([3] * 20, [3] * 500, wordy, {"prompt_embeds": np.zeros((21, 32), np.float32)}):
        with pytest.raises(ValidationError, match=r"^This model's maximum context length is 20 tokens\. ") as caught:
            process(input_processor, long)
        assert caught.value.code == "prompt_too_long"
    with pytest.raises(ValidationError, match=r"^This model's maximum context length is 20 tokens") as caught:
        process(input_processor, "# " * 40)
    assert caught.value.parameter == "input_tokens" and "is longer than the maximum model length" in str(caught.value)
    with pytest.raises(ValidationError, match=r"^This model's maximum context length is 20 tokens") as caught:
        process(input_processor, "x" * 100_000)
    assert caught.value.parameter == "input_text"


def test_truncation_and_special_tokens(tiny_dir: Make) -> None:
    input_processor = make_input_processor("llava", tiny_dir("llava"), max_model_len=10)
    text = "Hello there, how are you?"
    bare = make_input_processor("llava", tiny_dir("llava")).tokenizer.encode(text, False)  # type: ignore[union-attr]
    assert (
        process(input_processor, text, tokenization_kwargs={"truncate_prompt_tokens": 4}).token_ids.tolist()
        == bare[-4:]
    )
    assert len(process(input_processor, text, tokenization_kwargs={"truncate_prompt_tokens": -1}).token_ids) == 9
    roomy = make_input_processor("llava", tiny_dir("llava"))
    assert process(roomy, text, tokenization_kwargs={"add_special_tokens": False}).token_ids.tolist() == bare
    for wrong in ({"truncate_prompt_tokens": -2}, {"truncate_prompt_tokens": "4"}, {"padding": True}):
        with pytest.raises(ValidationError):
            process(roomy, text, tokenization_kwargs=wrong)


def test_item_larger_than_the_encoder_cache(tiny_dir: Make) -> None:
    input_processor = make_input_processor("qwen2_vl", tiny_dir("qwen2_vl"), max_item_embeds=3)
    with pytest.raises(RequestError) as caught:
        process(input_processor, image_prompt(RED))
    for words in (
        "image item",
        "length 4",
        "pre-allocated encoder cache size 3",
        "max_num_batched_tokens",
        "resolution",
    ):
        assert words in str(caught.value)


def test_an_item_is_not_enlarged_beyond_the_encoder_cache(tiny_dir: Make) -> None:
    input_processor = make_input_processor("qwen2_vl", tiny_dir("qwen2_vl"), max_item_embeds=4096)
    huge = {"min_pixels": 2**31 - 1, "max_pixels": 2**31 - 1}
    clip = {"prompt": "<video>", "multi_modal_data": {"video": np.zeros((8, 56, 56, 3), np.uint8)}}
    begin = time.monotonic()
    for prompt in (image_prompt(RED, mm_processor_kwargs=huge), {**clip, "mm_processor_kwargs": huge}):
        with pytest.raises(RequestError, match="exceeds the pre-allocated encoder cache size 4096"):
            process(input_processor, prompt)
    assert time.monotonic() - begin < 10
    for name in huge:
        with pytest.raises(RequestError, match=f"{name} must be at most"):
            process(input_processor, image_prompt(RED, mm_processor_kwargs={name: 10**400}))


def test_an_option_that_is_none_is_not_given(qwen: InputProcessor) -> None:
    plain = keys(process(qwen, image_prompt(RED)))
    assert keys(process(qwen, image_prompt(RED, mm_processor_kwargs={"do_resize": None, "size": {"a": None}}))) != plain
    assert keys(process(qwen, image_prompt(RED, mm_processor_kwargs={"do_resize": None, "min_pixels": None}))) == plain


@pytest.mark.parametrize(
    ("family", "name"), [("qwen2_5_vl", None), ("qwen3_vl", None), ("qwen2_5_omni", "videos_kwargs")]
)
def test_a_frame_rate_for_each_video(family: str, name: str | None, tiny_dir: Make) -> None:
    """qwen_vl_utils returns {"fps": [2.0]}, and {"fps": []} where there is no video."""
    input_processor = make_input_processor(family, tiny_dir(family))

    def clips(count: int, fps: Any) -> EngineInput:
        kwargs = {"fps": fps} if name is None else {name: {"fps": fps}}
        media = {"video": [CLIP] * count, "image": [RED]}
        prompt = "<video>" * count + "<image>"
        return process(input_processor, {"prompt": prompt, "multi_modal_data": media, "mm_processor_kwargs": kwargs})

    def each(engine_input: EngineInput) -> list[str]:
        return list(dict.fromkeys(keys(engine_input)))  # a video may have several spans

    one, half, both = clips(1, 1.0), clips(1, 0.5), clips(2, [1.0, 0.5])
    assert each(clips(1, [1.0]))[0] == each(one)[0] and clips(1, (1,)).items[0].item.frame_times
    assert each(both)[:2] == [each(one)[0], each(half)[0]]
    assert each(both)[2] == each(clips(0, []))[0] == each(clips(1, [3.0]))[1], "images have no rate"
    same, alone = clips(2, [1.0, 1.0]), clips(2, 1.0)
    assert same.token_ids.tolist() == alone.token_ids.tolist()
    np.testing.assert_array_equal(same.rope_positions, alone.rope_positions)
    for count, wrong in ((2, [1.0]), (1, []), (1, [1.0, 1.0])):
        with pytest.raises(RequestError, match=rf"fps has {len(wrong)} numbers for {count} videos"):
            clips(count, wrong)
    for wrong in ([0], ["2"], [None], [True], [float("nan")], [[1.0]], {"a": 1}):
        with pytest.raises(RequestError, match="fps must be a positive number, or a list with one for each video"):
            clips(1, wrong)


def test_statistics_of_the_cache(qwen: InputProcessor) -> None:
    def counts(picture: Image.Image) -> tuple[int, int]:
        process(qwen, image_prompt(picture))
        return qwen.cache.queries, qwen.cache.hits

    assert [counts(RED), counts(BLUE), counts(RED.copy())] == [(1, 0), (2, 0), (3, 1)]
    qwen.cache.clear()
    assert counts(RED) == (4, 1) and counts(RED) == (5, 2)


def test_uuids_replace_data(qwen: InputProcessor) -> None:
    first = process(qwen, image_prompt(RED, uuids=["sku-1234-a"]))
    later = process(qwen, image_prompt(None, BLUE, uuids=["sku-1234-a", None]))
    assert later.items[0].item is first.items[0].item and keys(later)[1] == keys(process(qwen, image_prompt(BLUE)))[0]
    # data under a cached uuid are ignored
    assert process(qwen, image_prompt(BLUE, uuids=["sku-1234-a"])).items[0].item is first.items[0].item
    for prompt in (
        image_prompt(None, uuids=["sku-1234-a"], cache_salt="other"),
        image_prompt(None, uuids=["sku-1234-a"], mm_processor_kwargs={"max_pixels": 4000}),
        image_prompt(None, uuids=[keys(process(qwen, image_prompt(BLUE)))[0]]),  # a content id of another item
    ):
        with pytest.raises(RequestError, match="Cache miss"):
            process(qwen, prompt)
    video = process(
        qwen, {"prompt": "<video>", "multi_modal_data": {"video": CLIP}, "multi_modal_uuids": {"video": "v"}}
    )
    again = process(
        qwen, {"prompt": "<video>", "multi_modal_data": {"video": None}, "multi_modal_uuids": {"video": "v"}}
    )
    assert keys(video) == keys(again)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_without_caches(tiny_dir: Make, prefix_caching: bool) -> None:
    input_processor = make_input_processor("qwen2_vl", tiny_dir("qwen2_vl"), cache_gb=0, prefix_caching=prefix_caching)
    one, two = (process(input_processor, image_prompt(RED, uuids=["a"])) for _ in range(2))
    assert (keys(one) == keys(two)) is prefix_caching
    assert input_processor.cache.hits == 0 and input_processor.cache.used_bytes == 0
    with pytest.raises(RequestError, match="Cache miss"):
        process(input_processor, image_prompt(None, uuids=["a"]))


def test_arrays_changed_after_the_call_do_not_change_the_cache(qwen: InputProcessor) -> None:
    array = np.full((56, 56, 3), 9, np.uint8)
    first = process(qwen, image_prompt(array)).items[0]
    before = first.item.features["pixels"].copy()
    array[:] = 200
    np.testing.assert_array_equal(first.item.features["pixels"], before)
    second = process(qwen, image_prompt(array)).items[0]
    assert second.item_hash != first.item_hash and (second.item.features["pixels"] == 200).all()
    array[:] = 9
    assert process(qwen, image_prompt(array)).items[0].item is first.item


def test_processor_kwargs_of_engine_and_prompt(tiny_dir: Make, caplog: pytest.LogCaptureFixture) -> None:
    big = np.zeros((280, 280, 3), np.uint8)
    small = {"max_pixels": 56 * 56}
    input_processor = make_input_processor("qwen2_vl", tiny_dir("qwen2_vl"), mm_processor_kwargs=small)
    assert process(input_processor, image_prompt(big)).spans[0].length == 4
    assert process(input_processor, image_prompt(big, mm_processor_kwargs={"max_pixels": 10**6})).spans[0].length == 100
    assert process(input_processor, image_prompt(big)).spans[0].length == 4
    with caplog.at_level(logging.WARNING):
        unknown = process(input_processor, image_prompt(big, mm_processor_kwargs={"num_crops": 4}))
    assert "'num_crops' is not used by this model" in caplog.text
    assert keys(unknown) == keys(process(input_processor, image_prompt(big)))


def test_background_of_transparent_images(tiny_dir: Make) -> None:
    clear = Image.new("RGBA", (56, 56), (9, 9, 9, 0))
    for options, value in (({}, 255), ({"media_io_kwargs": {"image": {"rgba_background_color": [7, 7, 7]}}}, 7)):
        input_processor = make_input_processor("qwen2_vl", tiny_dir("qwen2_vl"), **options)
        assert (process(input_processor, image_prompt(clear)).items[0].item.features["pixels"] == value).all()
    with pytest.raises(RequestError, match="rgba_background_color"):
        make_input_processor(
            "qwen2_vl", tiny_dir("qwen2_vl"), media_io_kwargs={"image": {"rgba_background_color": "red"}}
        )


def test_failures_of_a_processor_do_not_show_the_media(qwen: InputProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kind: str, media: Any, kwargs: Any) -> MediaItem:
        raise KeyError("secret pixels")

    monkeypatch.setattr(qwen.processor, "process_item", fail)
    with pytest.raises(ProcessingError, match=r"Failed to apply .*qwen2_vl on image item 0 \(KeyError\)") as caught:
        process(qwen, image_prompt(RED))
    assert "secret" not in str(caught.value) and not isinstance(caught.value, RequestError)


def test_whisper(tiny_dir: Make) -> None:
    input_processor = make_input_processor("whisper", tiny_dir("whisper"))
    start = input_processor.tokenizer.id_of("<|startoftranscript|>")  # type: ignore[union-attr]
    sound = {"audio": (np.zeros((2, 800), np.int16), 8000)}
    prefix = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
    expected = input_processor.tokenizer.encode(prefix, False)  # type: ignore[union-attr]
    for prompt, tokens in (
        ({"prompt": "", "multi_modal_data": sound}, [start]),
        ({"prompt": prefix, "multi_modal_data": sound}, expected),
        ({"prompt": prefix.removeprefix("<|startoftranscript|>"), "multi_modal_data": sound}, expected),
        ({"prompt_token_ids": expected, "multi_modal_data": sound}, expected),
        ({"encoder_prompt": {"prompt": "e", "multi_modal_data": sound}, "decoder_prompt": prefix}, expected),
        ({"encoder_prompt": {"prompt": "e", "multi_modal_data": sound}, "decoder_prompt": None}, [start]),
    ):
        engine_input = process(input_processor, prompt)
        assert engine_input.token_ids.tolist() == tokens and engine_input.rope_positions.tolist() == [
            list(range(len(tokens)))
        ]
        assert engine_input.spans == [] and [entry.modality for entry in engine_input.items] == ["audio"]
        assert engine_input.encoder_token_ids is not None and len(engine_input.encoder_token_ids) == 200
        assert engine_input.encoder_prompt == ("e" if "encoder_prompt" in prompt else None)
    with pytest.raises(RequestError, match=r"At most 1 audio\(s\) may be provided in one prompt\.$"):
        process(input_processor, {"prompt": "", "multi_modal_data": {"audio": [sound["audio"]] * 2}})
    with pytest.raises(RequestError, match="Expected 1 audio item"):
        process(input_processor, "")
    with pytest.raises(RequestError, match="maximum model length of 448"):
        process(input_processor, {"prompt_token_ids": [start] * 448, "multi_modal_data": sound})
    for bad, words in ((np.array([np.nan]), "NaN"), (np.zeros(0), "empty"), ("a.wav", "Read files first")):
        with pytest.raises(RequestError, match=words):
            process(input_processor, {"prompt": "", "multi_modal_data": {"audio": bad}})


def test_a_plain_language_model(tiny_dir: Make) -> None:
    _, tokenizer = load_processor("llava", tiny_dir("llava"))
    plain = InputProcessor(None, tokenizer, InputConfig(model_id="m", vocab_size=500, max_model_len=50))
    engine_input = process(plain, "Hi")
    assert (
        engine_input.rope_positions.tolist() == [list(range(len(engine_input.token_ids)))]
        and engine_input.rope_delta == 0
        and engine_input.items == []
    )
    with pytest.raises(RequestError, match=r"At most 0 image\(s\)"):
        process(plain, image_prompt(RED))
    ids_only = InputProcessor(None, None, InputConfig(model_id="m", vocab_size=500, max_model_len=50))
    assert process(ids_only, [1, 2]).token_ids.tolist() == [1, 2]
    with pytest.raises(RequestError, match="prompt_token_ids"):
        process(ids_only, "Hi")


def test_the_cache_evicts_the_least_recently_used() -> None:
    def item(size: int) -> MediaItem:
        return MediaItem("image", {"pixels": np.zeros((size, 1), np.uint8)}, num_inputs=size, num_embeds=size)

    cache = ProcessorCache(100)
    for key in "abc":
        cache.put(key, item(40))
        cache.get("a")
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True] and cache.used_bytes == 80
    cache.put("huge", item(101))
    assert cache.get("huge") is None and cache.used_bytes == 80
    cache.put("a", item(40))
    assert cache.used_bytes == 80


def test_many_threads(tiny_dir: Make) -> None:
    input_processor = make_input_processor("qwen2_vl", tiny_dir("qwen2_vl"), cache_gb=50_000 / 2**30)
    images = [Image.new("RGB", (28 * (1 + i % 5), 56), (i % 5, 0, 0)) for i in range(20)]
    expected = [process(input_processor, image_prompt(picture)) for picture in images]
    faults: list[Exception] = []

    def work() -> None:
        try:
            for picture, wanted in zip(images, expected, strict=True):
                engine_input = process(input_processor, image_prompt(picture))
                np.testing.assert_array_equal(engine_input.token_ids, wanted.token_ids)
                assert keys(engine_input) == keys(wanted)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and input_processor.cache.queries == 100 and input_processor.cache.used_bytes <= 50_000


def test_processing_imports_no_heavy_library(tiny_dir: Make) -> None:
    code = (
        "import sys; from input_processors import make_input_processor; import numpy as np; from pathlib import Path\n"
        f"r = make_input_processor('qwen2_vl', Path({str(tiny_dir('qwen2_vl'))!r}))\n"
        "r.process(r.parse({'prompt': '<image>', 'multi_modal_data': {'image': np.zeros((60, 60, 3), np.uint8)}}))\n"
        "print(*sorted({'jax', 'torch', 'transformers', 'scipy', 'numba', 'librosa'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root.parent,
        env={"PYTHONPATH": f"{root}:{root.parent}", "PATH": ""},
    )  # fmt: skip
    assert done.stdout.strip() == ""


def test_audio_libraries_are_imported_with_the_first_audio(tiny_dir: Make, tmp_path: Path) -> None:
    """And the code that numba compiles is cached in a writable folder."""
    code = (
        "import os, sys; import numpy as np; from pathlib import Path\n"
        "from input_processors import make_input_processor\n"
        f"r = make_input_processor('qwen2_audio', Path({str(tiny_dir('qwen2_audio'))!r}))\n"
        "loaded = lambda: sorted({'jax', 'scipy', 'numba', 'librosa', 'soxr'} & set(sys.modules))\n"
        "print(*loaded())\n"
        "audio = np.zeros(1600, np.float32), 16000\n"
        "r.process(r.parse({'prompt': '<|AUDIO|>', 'multi_modal_data': {'audio': audio}}))\n"
        "print(*loaded())\n"
        "print(os.environ['NUMBA_CACHE_DIR'])"
    )
    root = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root.parent,
        env={"PYTHONPATH": f"{root}:{root.parent}", "PATH": "", "MMJAX_CACHE_ROOT": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["", "librosa numba scipy", str(tmp_path / "numba")]
