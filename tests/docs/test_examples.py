"""The examples of the documentation work: each Python block runs, and prints the output shown below it.

"demo" is the model that ships with mmjax; published models are stood in for by tiny ones of their families. A page's
`http://127.0.0.1:PORT` is the server that its `mmjax serve ... --port PORT` would start, and https://example.org a web
server on the loopback address.
"""

import contextlib
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from mmjax.serve.app import create_app
from mmjax.serve.context import ServerSettings
from PIL import Image

import mmjax
from doc_blocks import PAGES, Notebook, blocks_of, commands_of, sections_of
from http_server import listening_server
from mmjax import LLM, AsyncLLM, EngineArgs
from mmjax.cli import flags
from mmjax.cli.main import MAPPINGS, model_parser
from mmjax.demo import DIRECTORY, show
from prompts import encoder_embeds
from web import running_site

RUN = ("multimodal_inputs.md", "getting_started.md", "README.md")
ELSEWHERE = {
    ("getting_started.md", "Embedding vectors")
}  # tests/models/test_phi3_v.py asks the same, of an engine that pools
TINY = {
    "openai/whisper-small": "whisper",
    "llava-hf/llava-1.5-7b-hf": "llava",
    "Qwen/Qwen2-VL-2B-Instruct": "qwen2_vl",
}
SMALL: dict[str, Any] = {  # as in tests/engine and tests/vllm_docs, so that the compilation cache serves both
    "max_model_len": 384, "block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 128, "num_decode_steps": 4,
    "enforce_eager": True, "enable_mm_embeds": True,
}  # fmt: skip


def served_models(page: str) -> dict[int, str]:
    """The model on each port, for the servers that a page starts."""
    found = {}
    for command in commands_of(page) + re.findall(r"`(mmjax serve [^`]+)`", PAGES[page].read_text()):
        if command.startswith("mmjax serve"):
            given = model_parser("serve").parse_args(flags.fold(shlex.split(command)[2:], MAPPINGS))
            found.setdefault(given.port, given.model)
    return found


class Engines:
    """One engine per model, with the options of the example that opens it first."""

    def __init__(self, tiny_dir: Callable[[str], Path]) -> None:
        self.tiny_dir = tiny_dir
        self.made: dict[str, LLM] = {}

    def open(self, model: str, **kwargs: Any) -> LLM:
        """Replaces `LLM(model, **kwargs)`."""
        EngineArgs(model, **kwargs)
        if model not in self.made:
            if model not in TINY:
                self.made[model] = LLM(model, **kwargs)
            else:
                length = {"max_model_len": 64} if TINY[model] == "whisper" else {}
                self.made[model] = LLM(str(self.tiny_dir(TINY[model])), **(kwargs | SMALL | length))
        return self.made[model]


@pytest.fixture(scope="module")
def engines(tiny_dir: Callable[[str], Path]) -> Iterator[Engines]:
    if not (DIRECTORY / "model.safetensors").is_file():
        pytest.skip("the demo model's weights are not here: examples/train_demo makes them")
    yield Engines(tiny_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader's directory, with the files that `mmjax demo` writes and those that the pages mention."""
    home = tmp_path_factory.mktemp("reader")
    show.make(home / "mmjax-demo", show.SEED)
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    subprocess.run([*ffmpeg, "-i", "clip.mp4", "-i", "sound.wav", "talking.mp4"], cwd=home / "mmjax-demo", check=True)
    np.save(home / "image_rows.npy", np.zeros((4, 64), np.float32))
    Image.new("RGB", (112, 84), "gray").save(home / "photo.jpg")
    return home


@pytest.fixture(scope="module")
def notebooks(engines: Engines, folder: Path) -> Iterator[Callable[[str], Notebook]]:
    """`notebooks(page)`: the page's examples, and which of them have run."""
    made: dict[str, Notebook] = {}
    with running_site() as site, pytest.MonkeyPatch.context() as patch:
        site.pages = {f"/{file.name}": file.read_bytes() for file in (folder / "mmjax-demo").iterdir()}
        patch.setenv("MMJAX_MEDIA_EGRESS_BLOCK_PRIVATE", "0")
        patch.setattr(mmjax, "LLM", engines.open)
        patch.chdir(folder)
        encode_picture(engines, folder)

        @contextlib.contextmanager
        def serve(page: str, code: str) -> Iterator[str]:
            code = code.replace("https://example.org", site.url(""))
            with contextlib.ExitStack() as stack:
                for port, model in served_models(page).items():
                    if (address := f"http://127.0.0.1:{port}") in code:
                        code = code.replace(address, stack.enter_context(server(model, engines.open(model))))
                yield code

        def get(page: str) -> Notebook:
            return made.setdefault(page, Notebook(page, lambda code: serve(page, code)))

        yield get


@contextlib.contextmanager
def server(model: str, llm: LLM) -> Iterator[str]:
    """The address of a server over an engine, which must not be used in other ways meanwhile."""
    engine = AsyncLLM(llm)
    try:
        with listening_server(create_app(engine, ServerSettings(names=(model,)))) as address:
            yield address
    finally:
        engine.close()
        del engine.llm  # FastAPI caches the functions of every app, which would keep the model and its programs alive


def encode_picture(engines: Engines, folder: Path) -> None:
    """Write mmjax-demo/picture.npz: the output of the demo model's encoder for picture.png."""
    setup = next(block for block in blocks_of("multimodal_inputs.md") if block.language == "python")
    exec(setup.code, {})
    llm = engines.made["demo"]
    prompt = {"prompt": "<image>", "multi_modal_data": {"image": Image.open(folder / "mmjax-demo" / "picture.png")}}
    [rows] = encoder_embeds(llm, prompt)
    processor = llm.model.input_processor
    [entry] = processor.process(processor.parse(prompt)).items
    np.savez(
        folder / "mmjax-demo" / "picture.npz",
        image_embeds=rows,
        image_grid_thw=[(1, 2 * entry.item.grid[1], 2 * entry.item.grid[2])],
    )


@pytest.mark.parametrize(
    ("page", "section"),
    [(page, section) for page in RUN for section in sections_of(page) if (page, section) not in ELSEWHERE],
    ids=lambda part: part,
)
def test_examples(page: str, section: str, notebooks: Callable[[str], Notebook]) -> None:
    for block, printed in notebooks(page).run_to(section).items():
        if block.output is not None:
            assert printed == block.output, block.name
