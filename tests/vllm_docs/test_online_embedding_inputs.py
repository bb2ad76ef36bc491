"""The page's section on embedding inputs through a server: tensor files in base64, one part per item."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine_inputs import IMAGE, chat_text
from mmjax import LLM
from mmjax.utils.serial_utils import tensor2base64
from online_server import complete_chat, openai, openai_client, same_tokens
from prompts import chat_one, encoder_embeds, image_url_part, random_chord, random_image, same_outputs, user_messages

Shared = Callable[[str], LLM]


def rows_part(kind: str, value: Any, **more: Any) -> dict[str, Any]:
    name = f"{kind}_embeds"
    coded = {key: tensor2base64(array) for key, array in value.items()} if isinstance(value, dict) else value
    return {"type": name, name: coded if isinstance(value, dict) else tensor2base64(value), **more}


def test_one_tensor(shared_llm: Shared) -> None:
    """LLaVA: `image_embeds` is the tensor itself, beside others and beside a raw image."""
    llm = shared_llm("llava")
    prompt = {"prompt": "<image><image>", "multi_modal_data": {"image": [random_image(1), random_image(2)]}}
    first, second = encoder_embeds(llm, prompt)
    raw = chat_one(llm, user_messages(image_url_part(random_image(1)), "What?"))
    both = chat_one(llm, user_messages(image_url_part(random_image(1)), image_url_part(random_image(2)), "What?"))
    with openai_client(llm) as client:
        forms = [
            rows_part("image", first),
            rows_part("image", {"image_embeds": first}),
            rows_part("image", first[None]),
        ]
        assert same_tokens(raw, *(complete_chat(client, user_messages(form, "What?")) for form in forms))
        for pair in (
            [forms[0], rows_part("image", second)],
            [image_url_part(random_image(1)), rows_part("image", second)],
        ):
            assert same_tokens(both, complete_chat(client, user_messages(*pair, "What?")))


def test_tensors_with_sizes(qwen: LLM, shared_llm: Shared) -> None:
    """Qwen2-VL with `image_grid_thw` and MiniCPM-V with `image_sizes`, per item; wrong ones are refused."""
    (rows,) = encoder_embeds(qwen, {"prompt": chat_text(IMAGE), "multi_modal_data": {"image": random_image(1)}})
    raw, grid = chat_one(qwen, user_messages(image_url_part(random_image(1)), "What?")), np.array([1, 4, 6])
    good = {"image_embeds": rows, "image_grid_thw": grid}
    with openai_client(qwen) as client:
        messages = user_messages(rows_part("image", good), "What?")
        assert same_tokens(raw, complete_chat(client, messages))
        twice = user_messages(rows_part("image", good), "and", rows_part("image", good))
        assert complete_chat(client, twice).usage.prompt_tokens > len(raw.prompt_token_ids or ())
        for wrong, words in (
            ({**good, "image_embeds": rows[:, :9]}, "model expects 64"),
            ({**good, "image_embeds": rows[:5]}, "has 5 rows"),
            ({**good, "image_embeds": rows * np.nan}, "NaN"),
            ({"image_embeds": rows}, "should contain the fields"),
            ({**good, "image_grid_thw": np.array([1, 3, 8])}, "divisible"),
        ):
            with pytest.raises(openai.BadRequestError, match=words):
                complete_chat(client, user_messages(rows_part("image", wrong)))
        for garbage in ("@@@@", "QUJD", ""):
            part = {"type": "image_embeds", "image_embeds": {"image_embeds": garbage, "image_grid_thw": garbage}}
            with pytest.raises(openai.BadRequestError):
                complete_chat(client, user_messages(part))
        assert same_tokens(raw, complete_chat(client, messages))
    sliced = shared_llm("minicpmv")
    (rows,) = encoder_embeds(sliced, {"prompt": "(<image>./</image>)", "multi_modal_data": {"image": random_image(1)}})
    raw = chat_one(sliced, user_messages(image_url_part(random_image(1)), "What?"))
    with openai_client(sliced) as client:
        part = rows_part("image", {"image_embeds": rows, "image_sizes": np.array(random_image(1).size)})
        assert same_tokens(raw, complete_chat(client, user_messages(part, "What?")))


def test_audio_embeddings(shared_llm: Shared) -> None:
    """Ultravox: `audio_embeds`."""
    llm = shared_llm("ultravox")
    (rows,) = encoder_embeds(llm, {"prompt": "<|audio|>", "multi_modal_data": {"audio": (random_chord(1), 16000)}})
    prompt = "<|start_header_id|>user<|end_header_id|>\n\n<|audio|>\nWhat?<|eot_id|>"
    offline = chat_one(llm, user_messages({"type": "audio_embeds", "audio_embeds": rows}, "What?"))
    assert prompt in str(offline.prompt)
    with openai_client(llm) as client:
        assert same_tokens(offline, complete_chat(client, user_messages(rows_part("audio", rows), "What?")))


def test_embeds_must_be_allowed(make_llm_of: Callable[..., LLM]) -> None:
    llm = make_llm_of("llava", "--no-enable-mm-embeds")
    part = rows_part("image", np.zeros((4, 64), np.float32))
    good = chat_one(llm, user_messages("Hi"))
    with openai_client(llm) as client:
        for each in (part, {**part, "image_embeds": None, "uuid": "rows"}):
            with pytest.raises(
                openai.BadRequestError, match="You must set `--enable-mm-embeds` to input `image_embeds`"
            ):
                complete_chat(client, user_messages(each))
        assert same_tokens(good, complete_chat(client, user_messages("Hi")))
    assert same_outputs(good, chat_one(llm, user_messages("Hi")))
