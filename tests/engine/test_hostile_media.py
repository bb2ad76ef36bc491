"""Hostile media, sent to running engines, are refused with a helpful message, in bounded time and memory.

Every case ends with a good request to the same engine, whose answer must be what it was before.
"""

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_inputs import IMAGE, chat_text, greedy, image_prompt, output_ids, random_pixels
from hostile import Case, Url
from hostile_cases import CASES
from mmjax import LLM
from mmjax.multimodal.media import MediaConnector
from web import Site, running_site

CPU_S = 20.0  # of this process and its children
MEMORY_KIB = 700_000  # by which the peak may grow
VARIABLES = {
    "MMJAX_MEDIA_FETCH_MAX_RETRIES": "1",
    "MMJAX_IMAGE_FETCH_TIMEOUT": "1",
    "MMJAX_AUDIO_FETCH_TIMEOUT": "1",
    "MMJAX_VIDEO_FETCH_TIMEOUT": "5",
    "MMJAX_MAX_MEDIA_DOWNLOAD_SIZE_MB": "4",
    "MMJAX_MAX_AUDIO_DECODE_DURATION_S": "30",
    "MMJAX_PROGRESS": "0",
}
TONE = (0.1 * np.sin(np.arange(16_000) / 9)).astype(np.float32)
GOOD: dict[str, Any] = {
    "qwen2_vl": image_prompt(random_pixels(0)),
    "whisper": {"prompt": "", "multi_modal_data": {"audio": (TONE, 16_000)}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Path]]:
    """A web site, and the folder from which files may be read."""
    with running_site() as site:
        yield site, tmp_path_factory.mktemp("allowed")


@pytest.fixture(scope="module")
def served(make_llm: Callable[..., LLM], place: tuple[Site, Path]) -> Iterator[Callable[[str], LLM]]:
    """`served(family)`: an engine that fetches from this machine and reads files from one folder."""
    rules = {"allowed_media_domains": ["127.0.0.1"], "allowed_local_media_path": str(place[1])}
    made: dict[str, LLM] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        sizes = {"whisper": {"max_model_len": 64}}
        yield (
            lambda family: (
                made.get(family) or made.setdefault(family, make_llm(family, **rules | sizes.get(family, {})))
            )
        )


@pytest.fixture(scope="module")
def answers() -> dict[str, list[list[int]]]:
    """The output of each engine for the good request."""
    return {}


def ask_well(llm: LLM, family: str) -> list[list[int]]:
    return output_ids(llm.generate(GOOD[family], greedy(2), use_tqdm=False))


def ask(llm: LLM, case: Case, sent: Any, place: tuple[Site, Path]) -> None:
    """Send what the case sends: URLs of pictures in a chat, other values in a prompt."""
    if case.kind == "audio":
        if isinstance(sent, Url):  # this model has no chat
            limits, folder = llm.model.input_processor.config.media_limits, str(place[1])
            rules = {"allowed_media_domains": ["127.0.0.1"], "allowed_local_media_path": folder}
            sent = MediaConnector(**rules, limits=limits).fetch_audio(sent)
        llm.generate({"prompt": "", "multi_modal_data": {"audio": sent}}, greedy(1), use_tqdm=False)
    elif isinstance(sent, Url):
        name = f"{case.kind}_url"
        content = [{"type": name, name: {"url": str(sent)}}, {"type": "text", "text": "What is this?"}]
        llm.chat([{"role": "user", "content": content}], greedy(1), use_tqdm=False)
    else:
        prompt = chat_text(IMAGE.replace("image", case.kind) + "What is this?")
        llm.generate({"prompt": prompt, "multi_modal_data": {case.kind: sent}}, greedy(1), use_tqdm=False)


def used() -> tuple[float, int]:
    """(CPU seconds of this process and its children, peak of memory in KiB). Waiting is not counted."""
    own, theirs = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in (own, theirs)), max(own.ru_maxrss, theirs.ru_maxrss)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_hostile_media(
    case: Case, served: Callable[[str], LLM], place: tuple[Site, Path], answers: dict[str, list[list[int]]]
) -> None:
    family = "whisper" if case.kind == "audio" else "qwen2_vl"
    llm = served(family)
    good = answers.get(family) or answers.setdefault(family, ask_well(llm, family))
    sent = case.make(*place)
    cpu, memory = used()
    with pytest.raises(ValueError) as caught:
        ask(llm, case, sent, place)
    cpu, memory = (now - before for now, before in zip(used(), (cpu, memory), strict=True))
    words = str(caught.value)
    assert case.words in words and len(words) < 1000
    assert " at 0x" not in words and "root:" not in words  # nothing of this process or of its files
    assert cpu < CPU_S and memory < MEMORY_KIB
    assert ask_well(llm, family) == good


def test_there_are_enough_cases() -> None:
    assert len({(case.kind, case.name) for case in CASES}) == len(CASES) >= 120
