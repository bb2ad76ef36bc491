"""The page's section on image inputs through a server: by URL, as data, several, transparent ones, and their limits."""

from collections.abc import Callable

import httpx
import numpy as np
import pytest
from PIL import Image

from mmjax import LLM
from online_server import alike, ask, heard, online, openai
from prompts import file_of, pil, reply, url, user
from web import Site, png, redirect

Shared = Callable[[str], LLM]
MakeOf = Callable[..., LLM]


def test_the_page_s_server(make_llm_of: MakeOf, site: Site) -> None:
    """Phi-3.5-vision: one image by its URL, then as data, two at once, whole and streamed, with the client and without;
    the limit of two."""
    flags = "--runner generate --trust-remote-code --max-model-len 512 --limit-mm-per-prompt.image 2"
    llm = make_llm_of("phi3_v", flags)
    site.pages |= {"/a.png": png(np.asarray(pil(1))), "/b.png": png(np.asarray(pil(2))), "/new": redirect("/a.png")}
    links = [{"type": "image_url", "image_url": {"url": site.url(path)}} for path in ("/a.png", "/b.png", "/new")]
    question = "What's in this image?"
    one = [reply(llm, user(question, url(pil(seed)))) for seed in (1, 2)]
    two = reply(llm, user("What are the animals in these images?", url(pil(1)), url(pil(2))))
    assert "<|user|>\n<|image_1|>\n<|image_2|>\nWhat are the animals" in str(two.prompt)
    with online(llm) as client:
        forms = [
            links[0],
            links[2],
            url(pil(1)),
            {**links[0], "image_url": {"url": site.url("/a.png"), "detail": "low"}},
        ]
        answers = [ask(client, user(question, form)) for form in forms]
        assert alike(one[0], *answers) and not alike(one[1], answers[0])
        assert answers[0].choices[0].message.content == one[0].outputs[0].text
        assert alike(one[1], ask(client, user(question, links[1])))
        assert alike(two, ask(client, user("What are the animals in these images?", *links[:2])))
        chunks = client.chat.completions.create(
            model="tiny", messages=user(question, links[0]), temperature=0, max_tokens=6, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == one[0].outputs[0].text
        body = {"messages": user(question, links[0]), "temperature": 0, "max_tokens": 6, "ignore_eos": True}
        plain = httpx.post(f"{client.base_url}chat/completions", json=body, timeout=300).json()
        assert plain["choices"][0]["message"]["content"] == one[0].outputs[0].text
        assert plain["usage"]["prompt_tokens"] == len(one[0].prompt_token_ids or ())
        fetched = len(site.seen)
        with pytest.raises(openai.BadRequestError, match=r"At most 2 image\(s\) may be provided in one prompt"):
            ask(client, user(question, *links))
        assert len(site.seen) == fetched, "nothing is fetched for a conversation with too many images"
        assert alike(one[0], ask(client, user(question, links[0])))
    assert all(headers["User-Agent"].startswith("mmjax/") for _, headers in site.seen)


def test_many_images_as_a_video(qwen: LLM) -> None:
    """Frames of a clip, one image part each."""
    frames = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{file_of(pil(i), 'JPEG')}"}}
        for i in range(5)
    ]
    messages = user("These are the frames of a clip. Describe it.", *frames)
    offline = reply(qwen, messages)
    with online(qwen) as client:
        assert alike(offline, ask(client, messages))


def test_custom_rgba_background_color(make_llm_of: MakeOf) -> None:
    """`--media-io-kwargs '{"image": {"rgba_background_color": [0, 0, 0]}}'`, and another colour in a request."""
    clear = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 4), dtype=np.uint8), "RGBA")
    flat = []
    for name in ("black", "red"):
        flat.append(Image.new("RGB", clear.size, name))
        flat[-1].paste(clear, mask=clear.getchannel("A"))
    llm = make_llm_of("qwen2_vl", """--media-io-kwargs '{"image": {"rgba_background_color": [0, 0, 0]}}'""")
    black, red = (reply(llm, user(url(image), "What?")) for image in flat)
    with online(llm) as client:
        assert alike(black, ask(client, user(url(clear), "What?")))
        kwargs = {"image": {"rgba_background_color": [255, 0, 0]}}
        assert alike(red, ask(client, user(url(clear), "What?"), media_io_kwargs=kwargs))
        for wrong in ([255, 0], [0, 0, 256], "red"):
            with pytest.raises(openai.BadRequestError, match="3 integers in the range"):
                ask(client, user(url(clear)), media_io_kwargs={"image": {"rgba_background_color": wrong}})
        assert alike(black, ask(client, user(url(clear), "What?")))


def test_processor_kwargs_of_a_request(qwen: LLM) -> None:
    """`mm_processor_kwargs` in `extra_body`: fewer pixels, fewer tokens, until the next request."""
    messages, fewer = user(url(pil(1, 112, 168)), "What?"), {"max_pixels": 56 * 84}
    large, small = reply(qwen, messages), reply(qwen, messages, mm_processor_kwargs=fewer)
    with online(qwen) as client:
        assert alike(large, ask(client, messages))
        assert alike(small, ask(client, messages, mm_processor_kwargs=fewer))
        with pytest.raises(openai.BadRequestError, match="positive integer"):
            ask(client, messages, mm_processor_kwargs={"max_pixels": -1})
        assert alike(large, ask(client, messages))
    (seen, _), (shrunk, _) = heard(large, small)
    assert len(shrunk) == len(seen) - 24 + 6


def test_where_placeholders_stand(make_llm_of: MakeOf, shared_llm: Shared) -> None:
    """Of a model whose template prints strings: in front of the text; with `--interleave-mm-strings` where the image
    stands; where the text has them already."""
    mark, parts = "(<image>./</image>)", ["Compare", url(pil(1)), "with", url(pil(2)), "now."]
    front, between = shared_llm("minicpmv"), make_llm_of("minicpmv", "--interleave-mm-strings")
    for llm, words in (
        (front, f"{mark}\n{mark}\nCompare\nwith\nnow."),
        (between, f"Compare\n{mark}\nwith\n{mark}\nnow."),
    ):
        offline = reply(llm, user(*parts))
        assert f"user\n{words}<|im_end|>" in str(offline.prompt)
        with online(llm) as client:
            assert alike(offline, ask(client, user(*parts)))
    typed = user(f"Compare {mark} with {mark} now.", url(pil(1)), url(pil(2)))
    offline = reply(front, typed)
    assert str(offline.prompt).count(mark) == 2
    with online(front) as client:
        assert alike(offline, ask(client, typed))
        with pytest.raises(openai.BadRequestError, match="Found more"):
            ask(client, user(f"Compare {mark} with {mark} now.", url(pil(1))))
