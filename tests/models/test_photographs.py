"""Real photographs of odd sizes, several per prompt: outputs must not depend on the other requests."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine_inputs import chat_text, greedy, output_ids
from mmjax import LLM
from models.questions import IMAGE
from models.tables import close, log_softmax

NEW = 8  # tokens per answer
ROWS = 40  # of the largest photograph, for Qwen2-VL: enough to be cut by every chunk size in use
LOGPROBS = 2e-4

PHOTOS: dict[str, tuple[str, ...]] = {  # by question
    "What is this animal?": ("chelsea.png",),
    "Where was it taken?": ("china.jpg", "flower.jpg"),
    "Hello, who are you?": (),
    "Which one flies?": ("rocket.jpg", "coffee.png", "astronaut.png"),
    "Read it to me.": ("text.png",),
    "And now?": (),
    "Compare the last with the first.": ("flower.jpg", "chelsea.png", "flower.jpg"),
}
ODD = {"What is transparent?": ("rgba_gradient_alpha.png", "palette_transparent.png"), "Up?": ("exif_orient_6.jpg",)}


def questions(family: str, folder: Path, photos: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """A prompt per question, its photographs as PIL opens them."""
    made = []
    for words, names in photos.items():
        question: dict[str, Any]
        if family == "llava":
            question = {"prompt": f"USER: {'<image>' * len(names)}\n{words} ASSISTANT:"}
        else:
            question = {"prompt": chat_text(IMAGE * len(names) + words)}
            question["mm_processor_kwargs"] = {"size": {"shortest_edge": 28 * 28, "longest_edge": ROWS * 28 * 28}}
        if names:
            question["multi_modal_data"] = {"image": [Image.open(folder / name) for name in names]}
        made.append(question)
    return made


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_packing_and_order_change_nothing(family: str, shared: Path, reference_llm: Callable[..., LLM]) -> None:
    llm = reference_llm(family)
    asked = questions(family, shared / "media/images", PHOTOS | ODD)

    def answers(*indices: int) -> dict[int, list[int]]:
        outputs = llm.generate([asked[i] for i in indices], greedy(NEW), use_tqdm=False)
        return dict(zip(indices, output_ids(outputs), strict=True))

    def forget() -> None:
        llm.reset_mm_cache()
        assert llm.reset_prefix_cache()

    forget()
    together = answers(*range(len(asked)))
    assert len({tuple(answer) for answer in together.values()}) == len(asked), "the photographs make no difference"
    assert answers(*range(len(asked))) == together, "from the caches"
    forget()
    assert answers(*reversed(range(len(asked)))) == together
    for index in range(len(asked)):
        forget()
        assert answers(index)[index] == together[index], "alone"
    forget()
    for pair in itertools.pairwise((3, 0, 6, 1, 4, 2, 7, 8)):
        for index, answer in answers(*pair).items():
            assert answer == together[index], f"in the company of {pair}"


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_transformers_sees_the_same(family: str, shared: Path, reference_llm: Callable[..., LLM]) -> None:
    from models.published import Published

    asked = questions(family, shared / "media/images", PHOTOS)
    outputs = reference_llm(family).generate(asked, greedy(NEW, logprobs=0), use_tqdm=False)
    model = Published(family, shared / "reference" / family)
    for question, output in zip(asked, outputs, strict=True):
        reply = model.ask(question, NEW)
        assert output.prompt_token_ids == reply.prompt_ids
        assert output_ids([output]) == [reply.ids], f"narrowest choice {reply.gap:.1e}"
        pairs = zip(output.outputs[0].logprobs or (), reply.ids, strict=True)
        found = np.array([entry[token].logprob for entry, token in pairs])
        chosen = log_softmax(reply.answer_logits)[np.arange(NEW), reply.ids]
        print(f"{family}: off by {np.abs(found - chosen).max():.1e}, gap {reply.gap:.3f}")
        close(found, chosen, LOGPROBS, question["prompt"])
