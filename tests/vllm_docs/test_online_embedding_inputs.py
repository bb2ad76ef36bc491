"""The page's section on embedding inputs through a server: tensor files in base64, one part per item."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine_inputs import IMAGE, text
from mmjax import LLM
from mmjax.utils.serial_utils import tensor2base64
from online_server import alike, ask, online, openai
from prompts import pil, reply, rows_of, same, tone, url, user

Shared = Callable[[str], LLM]


def rows_part(kind: str, value: Any, **more: Any) -> dict[str, Any]:
    name = f"{kind}_embeds"
    coded = {key: tensor2base64(array) for key, array in value.items()} if isinstance(value, dict) else value
    return {"type": name, name: coded if isinstance(value, dict) else tensor2base64(value), **more}


def test_one_tensor(shared_llm: Shared) -> None:
    """LLaVA: `image_embeds` is the tensor itself, beside others and beside a raw image."""
    llm = shared_llm("llava")
    prompt = {"prompt": "<image><image>", "multi_modal_data": {"image": [pil(1), pil(2)]}}
    first, second = rows_of(llm, prompt)
    raw = reply(llm, user(url(pil(1)), "What?"))
    both = reply(llm, user(url(pil(1)), url(pil(2)), "What?"))
    with online(llm) as client:
        forms = [
            rows_part("image", first),
            rows_part("image", {"image_embeds": first}),
            rows_part("image", first[None]),
        ]
        assert alike(raw, *(ask(client, user(form, "What?")) for form in forms))
        for pair in ([forms[0], rows_part("image", second)], [url(pil(1)), rows_part("image", second)]):
            assert alike(both, ask(client, user(*pair, "What?")))


def test_tensors_with_sizes(qwen: LLM, shared_llm: Shared) -> None:
    """Qwen2-VL with `image_grid_thw` and MiniCPM-V with `image_sizes`, per item; wrong ones are refused."""
    (rows,) = rows_of(qwen, {"prompt": text(IMAGE), "multi_modal_data": {"image": pil(1)}})
    raw, grid = reply(qwen, user(url(pil(1)), "What?")), np.array([1, 4, 6])
    good = {"image_embeds": rows, "image_grid_thw": grid}
    with online(qwen) as client:
        messages = user(rows_part("image", good), "What?")
        assert alike(raw, ask(client, messages))
        twice = user(rows_part("image", good), "and", rows_part("image", good))
        assert ask(client, twice).usage.prompt_tokens > len(raw.prompt_token_ids or ())
        for wrong, words in (
            ({**good, "image_embeds": rows[:, :9]}, "model expects 64"),
            ({**good, "image_embeds": rows[:5]}, "has 5 rows"),
            ({**good, "image_embeds": rows * np.nan}, "NaN"),
            ({"image_embeds": rows}, "should contain the fields"),
            ({**good, "image_grid_thw": np.array([1, 3, 8])}, "divisible"),
        ):
            with pytest.raises(openai.BadRequestError, match=words):
                ask(client, user(rows_part("image", wrong)))
        for garbage in ("@@@@", "QUJD", ""):
            part = {"type": "image_embeds", "image_embeds": {"image_embeds": garbage, "image_grid_thw": garbage}}
            with pytest.raises(openai.BadRequestError):
                ask(client, user(part))
        assert alike(raw, ask(client, messages))
    sliced = shared_llm("minicpmv")
    (rows,) = rows_of(sliced, {"prompt": "(<image>./</image>)", "multi_modal_data": {"image": pil(1)}})
    raw = reply(sliced, user(url(pil(1)), "What?"))
    with online(sliced) as client:
        part = rows_part("image", {"image_embeds": rows, "image_sizes": np.array(pil(1).size)})
        assert alike(raw, ask(client, user(part, "What?")))


def test_sound_as_rows(shared_llm: Shared) -> None:
    """Ultravox: `audio_embeds`."""
    llm = shared_llm("ultravox")
    (rows,) = rows_of(llm, {"prompt": "<|audio|>", "multi_modal_data": {"audio": (tone(1), 16000)}})
    prompt = "<|start_header_id|>user<|end_header_id|>\n\n<|audio|>\nWhat?<|eot_id|>"
    offline = reply(llm, user({"type": "audio_embeds", "audio_embeds": rows}, "What?"))
    assert prompt in str(offline.prompt)
    with online(llm) as client:
        assert alike(offline, ask(client, user(rows_part("audio", rows), "What?")))


def test_embeds_must_be_allowed(make_llm_of: Callable[..., LLM]) -> None:
    llm = make_llm_of("llava", "--no-enable-mm-embeds")
    part = rows_part("image", np.zeros((4, 64), np.float32))
    good = reply(llm, user("Hi"))
    with online(llm) as client:
        for each in (part, {**part, "image_embeds": None, "uuid": "rows"}):
            with pytest.raises(
                openai.BadRequestError, match="You must set `--enable-mm-embeds` to input `image_embeds`"
            ):
                ask(client, user(each))
        assert alike(good, ask(client, user("Hi")))
    assert same(good, reply(llm, user("Hi")))
