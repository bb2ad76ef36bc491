"""The page's section on image inputs, offline: prompts with images, conversations, transparent images, frames."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine_inputs import IMAGE, chat_text, greedy, output_ids
from mmjax import LLM, SamplingParams
from prompts import (
    base64_image,
    chat_one,
    encoder_embeds,
    generate_one,
    image_url_part,
    random_image,
    same_outputs,
    user_messages,
)
from web import Site, png, redirect

Shared = Callable[[str], LLM]


def test_single_image(shared_llm: Shared) -> None:
    """`multi_modal_data` with one image; then a batch in which every prompt has its own."""
    llm = shared_llm("llava")
    prompt = "USER: <image>\nWhat is the content of this image?\nASSISTANT:"
    alone = [generate_one(llm, {"prompt": prompt, "multi_modal_data": {"image": random_image(i)}}) for i in (1, 2)]
    batch = llm.generate(
        [
            {"prompt": prompt, "multi_modal_data": {"image": random_image(1)}},
            {"prompt": "USER: What's the color of the sky?\nASSISTANT:"},
            {"prompt": prompt, "multi_modal_data": {"image": random_image(2)}},
        ],
        greedy(6),
        use_tqdm=False,
    )
    assert same_outputs(alone[0], batch[0]) and same_outputs(alone[1], batch[2]) and not same_outputs(*alone)
    assert len(llm.generate("USER: hi ASSISTANT:", use_tqdm=False)[0].outputs[0].token_ids) <= 16  # no SamplingParams


def test_multi_image(qwen: LLM) -> None:
    """Several images in one prompt, one placeholder each; their order matters."""
    prompt = chat_text(IMAGE * 2 + "What is the content of each image?")
    there = generate_one(qwen, {"prompt": prompt, "multi_modal_data": {"image": [random_image(1), random_image(2)]}})
    back = generate_one(qwen, {"prompt": prompt, "multi_modal_data": {"image": [random_image(2), random_image(1)]}})
    assert there.prompt_token_ids == back.prompt_token_ids and not same_outputs(there, back)


def test_numbered_images(make_llm: Callable[..., LLM]) -> None:
    """The page's pair for Phi-3.5-vision: `<|image_1|>` and `<|image_2|>`, and `limit_mm_per_prompt={"image": 2}`."""
    llm = make_llm("phi3_v", trust_remote_code=True, limit_mm_per_prompt={"image": 2})
    prompt = "<|user|>\n<|image_1|>\n<|image_2|>\nWhat is the content of each image?<|end|>\n<|assistant|>\n"
    out = generate_one(llm, {"prompt": prompt, "multi_modal_data": {"image": [random_image(1), random_image(2)]}})
    talk = user_messages("What is the content of each image?", pil_part(1), pil_part(2))
    assert same_outputs(out, chat_one(llm, talk)) and out.prompt == prompt
    with pytest.raises(ValueError, match=r"At most 2 image\(s\).* Set `--limit-mm-per-prompt`"):
        generate_one(
            llm, {"prompt": prompt, "multi_modal_data": {"image": [random_image(1), random_image(2), random_image(3)]}}
        )


def test_images_from_the_web(qwen: LLM, site: Site) -> None:
    """`image_url` of `LLM.chat` over the network, behind a redirect, as on picsum.photos."""
    site.pages |= {"/a.png": png(np.asarray(random_image(1))), "/id/32": redirect("/a.png")}
    part = {"type": "image_url", "image_url": {"url": site.url("/id/32")}}
    assert same_outputs(
        chat_one(qwen, user_messages(part, "What?")),
        chat_one(qwen, user_messages(image_url_part(random_image(1)), "What?")),
    )
    assert [path for path, _ in site.seen] == ["/id/32", "/a.png"]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "minicpmv"])
def test_generic_placeholders(family: str, shared_llm: Shared) -> None:
    """`<image><image>` stands for the model's own placeholders, as in one of the page's prompts."""
    llm = shared_llm(family)
    own = llm.model.input_processor.processor.placeholder_text["image"]  # type: ignore[union-attr]
    images = {"multi_modal_data": {"image": [random_image(1), random_image(2)]}}
    assert same_outputs(
        *(generate_one(llm, {"prompt": f"{mark}{mark}Compare.", **images}) for mark in (own, "<image>"))
    )


def test_chat_with_every_form_of_image(qwen: LLM) -> None:
    """The page's `LLM.chat` conversation: a URL, a PIL image and embeddings as a tensor, side by side."""
    (rows,) = encoder_embeds(qwen, {"prompt": chat_text(IMAGE), "multi_modal_data": {"image": random_image(3)}})
    embeds = {"image_embeds": rows, "image_grid_thw": np.array([1, 4, 6])}
    conversation = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I assist you today?"},
        {
            "role": "user",
            "content": [
                image_url_part(random_image(1)),
                {"type": "image_pil", "image_pil": random_image(2)},
                {"type": "image_embeds", "image_embeds": embeds},
                {"type": "text", "text": "What's in these images?"},
            ],
        },
    ]
    mixed = chat_one(qwen, conversation)
    for part, seed in zip(conversation[3]["content"], (1, 2, 3), strict=False):  # type: ignore[call-overload]
        part.clear()
        part |= {"type": "image_pil", "image_pil": random_image(seed)}
    assert same_outputs(mixed, chat_one(qwen, conversation))
    assert mixed.prompt is not None and mixed.prompt.count("<|image_pad|>") == 3


def test_chat_in_batches(qwen: LLM) -> None:
    """The outputs of a list of conversations are in order, and the same as alone."""
    talks = [
        user_messages(image_url_part(random_image(i)), "What?") if i % 2 else user_messages("Hello" * i)
        for i in range(1, 6)
    ]
    many = qwen.chat(talks, [greedy(4 + i) for i in range(5)], use_tqdm=False)
    assert output_ids(many) == [list(chat_one(qwen, talk, 4 + i).outputs[0].token_ids) for i, talk in enumerate(talks)]
    assert qwen.chat([], use_tqdm=False) == []
    with pytest.raises(ValueError, match=r"lengths of prompts \(5\) and params \(1\) must be the same"):
        qwen.chat(talks, [greedy(1)], use_tqdm=False)
    params = SamplingParams(temperature=0, max_tokens=2, n=1)
    assert len(qwen.chat(user_messages("x"), params, use_tqdm=False)[0].outputs[0].token_ids) <= 2


def test_chat_is_generate_with_a_template(qwen: LLM) -> None:
    """The template prints the special tokens, so none are added; the expanded ids are returned."""
    out = chat_one(qwen, user_messages(pil_part(1), "What?"))
    assert same_outputs(out, generate_one(qwen, {"prompt": out.prompt, "multi_modal_data": {"image": random_image(1)}}))
    assert out.prompt == (
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{IMAGE}What?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    going = [*user_messages("Hi"), {"role": "assistant", "content": "I am"}]
    out = chat_one(qwen, going, add_generation_prompt=False, continue_final_message=True)
    assert str(out.prompt).endswith("<|im_start|>assistant\nI am")
    assert chat_one(qwen, user_messages("a"), chat_template="{{ messages[0].content[0].text }}!" * 2).prompt == "!!"


def pil_part(seed: int) -> dict[str, Any]:
    return {"type": "image_pil", "image_pil": random_image(seed)}


def test_llava_has_one_start_token(shared_llm: Shared) -> None:
    """A tokenizer that adds a start token does not do so after a chat template."""
    llm = shared_llm("llava")
    out = chat_one(llm, user_messages(pil_part(1), "What?"))
    tokens, bos = out.prompt_token_ids or [], llm.model.tokenizer.bos_id  # type: ignore[union-attr]
    assert tokens.count(bos) == str(out.prompt).count("<s>") == 0
    with_bos = chat_one(llm, user_messages("a"), chat_template="{{ bos_token }}{{ messages[0].content }}")
    assert (with_bos.prompt_token_ids or [])[:2].count(bos) == 1
    again = chat_one(
        llm, user_messages("a"), chat_template="x{{ 1 }}", tokenization_kwargs={"add_special_tokens": True}
    )
    assert (again.prompt_token_ids or [])[0] == bos


def test_string_contents(shared_llm: Shared) -> None:
    """A template that prints contents gets placeholders in front of the text, or where media are."""
    llm = shared_llm("minicpmv")
    mark = "(<image>./</image>)"
    out = chat_one(llm, user_messages("What is in", pil_part(1), pil_part(2), "there?"))
    assert f"user\n{mark}\n{mark}\nWhat is in\nthere?<|im_end|>" in str(out.prompt)
    assert same_outputs(
        out,
        generate_one(llm, {"prompt": out.prompt, "multi_modal_data": {"image": [random_image(1), random_image(2)]}}),
    )
    typed = chat_one(llm, user_messages(f"{mark} or {mark}?", pil_part(1), pil_part(2)))
    assert f"user\n{mark} or {mark}?<|im_end|>" in str(typed.prompt)


def test_custom_rgba_background_color(make_llm: Callable[..., LLM], qwen: LLM) -> None:
    """`media_io_kwargs={"image": {"rgba_background_color": ...}}`: of the engine, of a call, of a prompt."""
    rng = np.random.default_rng(0)
    clear = Image.fromarray(rng.integers(0, 256, (56, 84, 4), dtype=np.uint8), "RGBA")
    flat = {}
    for name in ("white", "black", "red"):
        flat[name] = Image.new("RGB", clear.size, name)
        flat[name].paste(clear, mask=clear.getchannel("A"))
    plain = {name: chat_one(qwen, user_messages(image_url_part(image), "What?")) for name, image in flat.items()}
    black, red = ({"image": {"rgba_background_color": color}} for color in ((0, 0, 0), [255, 0, 0]))
    part = {"type": "image_pil", "image_pil": clear}
    assert same_outputs(
        plain["white"],
        chat_one(qwen, user_messages(image_url_part(clear), "What?")),
        chat_one(qwen, user_messages(part, "What?")),
    )
    for kwargs, name in ((black, "black"), (red, "red")):
        for one in (image_url_part(clear), part):
            assert same_outputs(plain[name], chat_one(qwen, user_messages(one, "What?"), media_io_kwargs=kwargs))
    prompt = {"prompt": plain["red"].prompt, "multi_modal_data": {"image": clear}, "media_io_kwargs": red}
    assert same_outputs(plain["red"], generate_one(qwen, prompt))
    with pytest.raises(ValueError, match="rgba_background_color must be a list or tuple of 3 integers"):
        make_llm("qwen2_vl", media_io_kwargs={"image": {"rgba_background_color": (0, 0)}})


def test_many_images_as_a_video(qwen: LLM) -> None:
    """Frames of a clip, sent as one image part each."""
    frames = [random_image(i, 28, 56) for i in range(6)]
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64_image(frame, 'JPEG')}"}}
        for frame in frames
    ]
    out = chat_one(qwen, user_messages("These are frames of a clip.", *parts))
    assert str(out.prompt).count("<|image_pad|>") == 6 and len(out.outputs[0].token_ids) == 6


def test_processor_kwargs_of_a_call(qwen: LLM) -> None:
    """`mm_processor_kwargs` of a conversation: fewer pixels, fewer tokens."""
    parts = user_messages(image_url_part(random_image(1, 112, 168)), "What?")
    large, small = chat_one(qwen, parts), chat_one(qwen, parts, mm_processor_kwargs={"max_pixels": 56 * 84})
    assert len(small.prompt_token_ids or []) == len(large.prompt_token_ids or []) - 24 + 6
