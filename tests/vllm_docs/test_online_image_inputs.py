"""The page's section on image inputs through a server: by URL, as data, several, transparent ones, and their limits."""

from collections.abc import Callable

import httpx
import numpy as np
import pytest
from PIL import Image

from mmjax import LLM
from online_server import complete_chat, openai, openai_client, same_tokens, token_ids_of
from prompts import base64_image, chat_one, image_url_part, random_image, user_messages
from web import Site, png, redirect

Shared = Callable[[str], LLM]
MakeOf = Callable[..., LLM]


def test_the_server_of_the_page(make_llm_of: MakeOf, site: Site) -> None:
    """Phi-3.5-vision: one image by its URL, then as data, two at once, whole and streamed, with the client and without;
    the limit of two."""
    flags = "--runner generate --trust-remote-code --max-model-len 512 --limit-mm-per-prompt.image 2"
    llm = make_llm_of("phi3_v", flags)
    site.pages |= {
        "/a.png": png(np.asarray(random_image(1))),
        "/b.png": png(np.asarray(random_image(2))),
        "/new": redirect("/a.png"),
    }
    links = [{"type": "image_url", "image_url": {"url": site.url(path)}} for path in ("/a.png", "/b.png", "/new")]
    question = "What's in this image?"
    one = [chat_one(llm, user_messages(question, image_url_part(random_image(seed)))) for seed in (1, 2)]
    two = chat_one(
        llm,
        user_messages(
            "What are the animals in these images?", image_url_part(random_image(1)), image_url_part(random_image(2))
        ),
    )
    assert "<|user|>\n<|image_1|>\n<|image_2|>\nWhat are the animals" in str(two.prompt)
    with openai_client(llm) as client:
        forms = [
            links[0],
            links[2],
            image_url_part(random_image(1)),
            {**links[0], "image_url": {"url": site.url("/a.png"), "detail": "low"}},
        ]
        answers = [complete_chat(client, user_messages(question, form)) for form in forms]
        assert same_tokens(one[0], *answers) and not same_tokens(one[1], answers[0])
        assert answers[0].choices[0].message.content == one[0].outputs[0].text
        assert same_tokens(one[1], complete_chat(client, user_messages(question, links[1])))
        assert same_tokens(
            two, complete_chat(client, user_messages("What are the animals in these images?", *links[:2]))
        )
        chunks = client.chat.completions.create(
            model="tiny", messages=user_messages(question, links[0]), temperature=0, max_tokens=6, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == one[0].outputs[0].text
        body = {"messages": user_messages(question, links[0]), "temperature": 0, "max_tokens": 6, "ignore_eos": True}
        plain = httpx.post(f"{client.base_url}chat/completions", json=body, timeout=300).json()
        assert plain["choices"][0]["message"]["content"] == one[0].outputs[0].text
        assert plain["usage"]["prompt_tokens"] == len(one[0].prompt_token_ids or ())
        fetched = len(site.seen)
        with pytest.raises(openai.BadRequestError, match=r"At most 2 image\(s\) may be provided in one prompt"):
            complete_chat(client, user_messages(question, *links))
        assert len(site.seen) == fetched, "nothing is fetched for a conversation with too many images"
        assert same_tokens(one[0], complete_chat(client, user_messages(question, links[0])))
    assert all(headers["User-Agent"].startswith("mmjax/") for _, headers in site.seen)


def test_many_images_as_a_video(qwen: LLM) -> None:
    """Frames of a clip, one image part each."""
    frames = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64_image(random_image(i), 'JPEG')}"}}
        for i in range(5)
    ]
    messages = user_messages("These are the frames of a clip. Describe it.", *frames)
    offline = chat_one(qwen, messages)
    with openai_client(qwen) as client:
        assert same_tokens(offline, complete_chat(client, messages))


def test_custom_rgba_background_color(make_llm_of: MakeOf) -> None:
    """`--media-io-kwargs '{"image": {"rgba_background_color": [0, 0, 0]}}'`, and another colour in a request."""
    clear = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 4), dtype=np.uint8), "RGBA")
    flat = []
    for name in ("black", "red"):
        flat.append(Image.new("RGB", clear.size, name))
        flat[-1].paste(clear, mask=clear.getchannel("A"))
    llm = make_llm_of("qwen2_vl", """--media-io-kwargs '{"image": {"rgba_background_color": [0, 0, 0]}}'""")
    black, red = (chat_one(llm, user_messages(image_url_part(image), "What?")) for image in flat)
    with openai_client(llm) as client:
        assert same_tokens(black, complete_chat(client, user_messages(image_url_part(clear), "What?")))
        kwargs = {"image": {"rgba_background_color": [255, 0, 0]}}
        assert same_tokens(
            red, complete_chat(client, user_messages(image_url_part(clear), "What?"), media_io_kwargs=kwargs)
        )
        for wrong in ([255, 0], [0, 0, 256], "red"):
            with pytest.raises(openai.BadRequestError, match="3 integers in the range"):
                complete_chat(
                    client,
                    user_messages(image_url_part(clear)),
                    media_io_kwargs={"image": {"rgba_background_color": wrong}},
                )
        assert same_tokens(black, complete_chat(client, user_messages(image_url_part(clear), "What?")))


def test_processor_kwargs_of_a_request(qwen: LLM) -> None:
    """`mm_processor_kwargs` in `extra_body`: fewer pixels, fewer tokens, until the next request."""
    messages, fewer = user_messages(image_url_part(random_image(1, 112, 168)), "What?"), {"max_pixels": 56 * 84}
    large, small = chat_one(qwen, messages), chat_one(qwen, messages, mm_processor_kwargs=fewer)
    with openai_client(qwen) as client:
        assert same_tokens(large, complete_chat(client, messages))
        assert same_tokens(small, complete_chat(client, messages, mm_processor_kwargs=fewer))
        with pytest.raises(openai.BadRequestError, match="positive integer"):
            complete_chat(client, messages, mm_processor_kwargs={"max_pixels": -1})
        assert same_tokens(large, complete_chat(client, messages))
    (seen, _), (shrunk, _) = token_ids_of(large, small)
    assert len(shrunk) == len(seen) - 24 + 6


def test_positions_of_placeholders(make_llm_of: MakeOf, shared_llm: Shared) -> None:
    """For a template that prints strings: in front of the text; with `--interleave-mm-strings` where the image is; or
    where the text has them already."""
    mark, parts = (
        "(<image>./</image>)",
        ["Compare", image_url_part(random_image(1)), "with", image_url_part(random_image(2)), "now."],
    )
    front, between = shared_llm("minicpmv"), make_llm_of("minicpmv", "--interleave-mm-strings")
    for llm, words in (
        (front, f"{mark}\n{mark}\nCompare\nwith\nnow."),
        (between, f"Compare\n{mark}\nwith\n{mark}\nnow."),
    ):
        offline = chat_one(llm, user_messages(*parts))
        assert f"user\n{words}<|im_end|>" in str(offline.prompt)
        with openai_client(llm) as client:
            assert same_tokens(offline, complete_chat(client, user_messages(*parts)))
    typed = user_messages(
        f"Compare {mark} with {mark} now.", image_url_part(random_image(1)), image_url_part(random_image(2))
    )
    offline = chat_one(front, typed)
    assert str(offline.prompt).count(mark) == 2
    with openai_client(front) as client:
        assert same_tokens(offline, complete_chat(client, typed))
        with pytest.raises(openai.BadRequestError, match="Found more"):
            complete_chat(client, user_messages(f"Compare {mark} with {mark} now.", image_url_part(random_image(1))))
