"""Engines for the examples of the page on multimodal inputs: one tiny model per family, shared by all tests.

A file is named after the page's section; `test_online_*` do through a server what the page does with OpenAI's client.
"""

import argparse
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest

from engine_inputs import SMALL
from mmjax import LLM
from mmjax.cli import flags
from web import Site, running_site

WITH_EMBEDS = SMALL | {"enforce_eager": True, "enable_mm_embeds": True}


@pytest.fixture(scope="session")
def make_llm(tiny_dir: Callable[[str], Path]) -> Callable[..., LLM]:
    """`make_llm(family, **kwargs)`: a small engine that takes embeddings and compiles on demand."""

    def make(family: str, **kwargs: Any) -> LLM:
        return LLM(str(tiny_dir(family)), **(WITH_EMBEDS | kwargs))

    return make


@pytest.fixture(scope="session")
def shared_llm(make_llm: Callable[..., LLM]) -> Callable[[str], LLM]:
    """`shared_llm(family)`: the engine that tests share. Each test must leave it idle."""
    made: dict[str, LLM] = {}
    limits = {"whisper": {"max_model_len": 64}}
    return lambda family: made.get(family) or made.setdefault(family, make_llm(family, **limits.get(family, {})))


@pytest.fixture
def qwen(shared_llm: Callable[[str], LLM]) -> LLM:
    """The shared Qwen2-VL, its caches empty."""
    llm = shared_llm("qwen2_vl")
    llm.reset_mm_cache()
    assert llm.reset_prefix_cache(), "an earlier test left pages in use"
    return llm


@pytest.fixture(scope="session")
def web() -> Iterator[Site]:
    """A web server on the loopback address."""
    with running_site() as made:
        yield made


@pytest.fixture
def site(web: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The web server, empty, on an address from which media may be fetched."""
    monkeypatch.setenv("VLLM_MEDIA_EGRESS_BLOCK_PRIVATE", "0")
    web.pages, web.seen = {}, []
    return web


@pytest.fixture(scope="session")
def make_llm_of(make_llm: Callable[..., LLM]) -> Callable[..., LLM]:
    """`make_llm_of(family, "--flag value ...")`: the engine that `mmjax serve` makes with these flags."""

    def make(family: str, line: str) -> LLM:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        flags.add_engine_flags(parser)
        return make_llm(family, **flags.engine_kwargs(parser.parse_args(flags.fold(shlex.split(line)))))

    return make


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """`film(17)`: 26 frames of 56 x 84, a JPEG each, in a QuickTime file; those named are overwritten by zeros."""
    frames = np.random.default_rng(7).integers(0, 256, (26, 7, 12, 3), dtype=np.uint8).repeat(8, 1).repeat(7, 2)
    file = tmp_path_factory.mktemp("film") / "film.mov"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "84x56"]
    coded = ["-r", "10", "-i", "-", "-c:v", "mjpeg", "-q:v", "1", "-pix_fmt", "yuvj420p", str(file)]
    subprocess.run([*command, *coded], input=frames.tobytes(), check=True)
    whole = file.read_bytes()
    starts = [match.start() for match in re.finditer(b"\xff\xd8\xff", whole)]
    ends = [*starts[1:], whole.index(b"moov") - 4]
    assert len(starts) == len(frames)

    def make(*broken: int) -> bytes:
        data = bytearray(whole)
        for index in broken:
            data[starts[index] : ends[index]] = bytes(ends[index] - starts[index])
        return bytes(data)

    return make
