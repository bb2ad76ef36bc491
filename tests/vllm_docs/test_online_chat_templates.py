"""The page's section on chat templates, through a server: a model's own, a file's, a request's, and that of VLM2Vec."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine_inputs import IMAGE
from mmjax import LLM
from online_server import complete_chat, openai, openai_client, same_tokens
from prompts import chat_one, generate_one, image_url_part, random_image, user_messages

Shared = Callable[[str], LLM]
MakeOf = Callable[..., LLM]


def test_a_template_of_the_operator(make_llm_of: MakeOf, tmp_path: Path) -> None:
    """`--chat-template FILE` takes precedence over the model's; a request's is only used if trusted."""
    file = tmp_path / "short.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
        f"{{% if part.type == 'image' %}}{IMAGE}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
        "{% endfor %};{% endfor %}"
    )
    llm = make_llm_of("qwen2_vl", f"--chat-template {file}")
    prompt = {"prompt": f"user: {IMAGE}What?;", "multi_modal_data": {"image": random_image(1)}}
    offline = generate_one(llm, prompt)
    own = "{% for part in messages[0].content if part.type == 'text' %}{{ part.text }}{% endfor %}" + IMAGE
    brought = generate_one(llm, {**prompt, "prompt": f"What?{IMAGE}"})
    with openai_client(llm) as client:
        assert same_tokens(offline, complete_chat(client, user_messages(image_url_part(random_image(1)), "What?")))
        for body in ({"chat_template": own}, {"chat_template_kwargs": {"chat_template": own}}):
            with pytest.raises(openai.BadRequestError, match=r"chat.template"):
                complete_chat(client, user_messages(image_url_part(random_image(1)), "What?"), **body)
    with openai_client(llm, template_from_requests=True) as client:
        assert same_tokens(
            brought, complete_chat(client, user_messages(image_url_part(random_image(1)), "What?"), chat_template=own)
        )
        assert same_tokens(offline, complete_chat(client, user_messages(image_url_part(random_image(1)), "What?")))


def test_content_formats(shared_llm: Shared) -> None:
    """The format is detected from the template; the operator can override it, and a mismatch is a client
    error."""
    llm = shared_llm("minicpmv")
    messages = user_messages(image_url_part(random_image(1)), "What?")
    offline = chat_one(llm, messages)
    with openai_client(llm) as client:
        assert same_tokens(offline, complete_chat(client, messages))
    with openai_client(llm, content_format="openai") as client, pytest.raises(openai.BadRequestError):
        complete_chat(client, messages)
    with openai_client(llm, content_format="string") as client:
        assert same_tokens(offline, complete_chat(client, messages))


def test_vlm2vec_with_its_template(make_llm_of: MakeOf) -> None:
    """VLM2Vec: `--runner pooling --chat-template vlm2vec_phi3v.jinja`, then `messages` to /v1/embeddings."""
    flags = "--runner pooling --trust-remote-code --max-model-len 512 --chat-template examples/vlm2vec_phi3v.jinja"
    llm = make_llm_of("phi3_v", flags)
    seen = llm.embed(
        {"prompt": "<|image_1|> Represent the given image.", "multi_modal_data": {"image": random_image(1)}}
    )
    with openai_client(llm) as client:
        body = {
            "messages": user_messages(image_url_part(random_image(1)), "Represent the given image."),
            "encoding_format": "float",
        }
        told = client.post("/embeddings", cast_to=openai.types.CreateEmbeddingResponse, body=body)
        np.testing.assert_allclose(told.data[0].embedding, seen[0].outputs.embedding, atol=1e-5)
        assert told.usage.prompt_tokens == len(seen[0].prompt_token_ids)
        words = client.embeddings.create(model="tiny", input="A cat.", encoding_format="float")
        assert len(words.data[0].embedding) == len(told.data[0].embedding)
        with pytest.raises(openai.NotFoundError):
            complete_chat(client, user_messages("Hi"))
