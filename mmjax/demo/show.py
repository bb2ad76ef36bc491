"""`mmjax demo`: asks the demo model about generated media, or about the user's own files."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmjax.demo import DIRECTORY, ask, heldout, paint, scenes

if TYPE_CHECKING:
    from mmjax.entrypoints.llm import LLM

DEFAULT_QUESTIONS = {
    "image": "What is in the picture?",
    "video": "What happens in the video?",
    "audio": "What is said?",
}
MODALITIES = tuple(DEFAULT_QUESTIONS)
ABOUT_PICTURE = ("describe", "color", "count")
SEED = 3  # the default of --seed
SIDE = 336  # pixels on the shorter edge of pictures and videos
RATE = 4  # frames of the video per second
MAX_MODEL_LEN = 1024
# few programs, each compiled on first use: half a minute on two cores, once
ENGINE: Mapping[str, Any] = {
    "max_model_len": MAX_MODEL_LEN,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 1,
    "enforce_eager": True,
    "media_io_kwargs": {"video": {"num_frames": heldout.FRAMES}},
}


@dataclasses.dataclass(frozen=True)
class DemoFile:
    """A generated file, and questions about it."""

    modality: str
    file: Path
    questions: list[ask.QuestionAnswer]


def make(folder: Path, seed: int) -> list[DemoFile]:
    """Write a picture, a video and a recording that are not in the training set."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([heldout.FIRST, 100, seed])
    return [_picture(rng, folder), _clip(rng, folder), _recording(rng, folder)]


def _picture(rng: np.random.Generator, folder: Path) -> DemoFile:
    while True:
        scene = scenes.draw_scene(rng, 4 / 3, 1.0, things=3)
        questions = [qa for skill in ABOUT_PICTURE if (qa := ask.about_picture(rng, [scene], skill))]
        if len(questions) == len(ABOUT_PICTURE):
            break
    file = folder / "picture.png"
    paint.pictures([scene], SIDE, rng)[0].save(file)
    return DemoFile("image", file, questions)


def _clip(rng: np.random.Generator, folder: Path) -> DemoFile:
    clip = scenes.draw_clip(rng, heldout.FRAMES)
    while not clip.direction:
        clip = scenes.draw_clip(rng, heldout.FRAMES)
    file = folder / "clip.mp4"
    write_video(file, heldout.frames(rng, clip, SIDE))
    return DemoFile("video", file, [ask.about_clip(rng, clip)])


def _recording(rng: np.random.Generator, folder: Path) -> DemoFile:
    import soundfile

    digits = [pair for pair in heldout.recordings() if 2 < len(pair[0].split()) < 6]
    transcript, recording = digits[int(rng.integers(len(digits)))]
    file = folder / "sound.wav"
    soundfile.write(file, *heldout.read(recording))
    return DemoFile("audio", file, ask.about_speech(rng, transcript)[:1])


def write_video(file: Path, frames: np.ndarray) -> None:
    """Write uint8 [frames, height, width, 3], of even height and width, as an MP4 file that browsers play."""
    from imageio_ffmpeg import get_ffmpeg_exe

    height, width = frames.shape[1:3]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(RATE), "-i", "pipe:"]
    codec = ["-c:v", "libx264", "-crf", "12", "-preset", "fast", "-pix_fmt", "yuv420p", "-threads", "1"]
    command = [get_ffmpeg_exe(), "-v", "error", "-y", *source, *codec, str(file)]
    subprocess.run(command, input=frames.tobytes(), check=True)


def media_parts(files: Mapping[str, Sequence[Path]]) -> list[dict[str, Any]]:
    """Files by modality as the parts of a message. ValueError for a file that is missing or cannot be decoded."""
    from mmjax.chat.parts import media_part
    from mmjax.multimodal.media import MediaConnector

    connector = MediaConnector({"video": ENGINE["media_io_kwargs"]["video"]})
    parts = []
    for modality in MODALITIES:
        for file in files.get(modality, ()):
            if not file.is_file():
                raise ValueError(f"--{modality} {file}: there is no such file")
            part = media_part(modality, str(file))
            try:
                connector.fetch(modality, part[f"{modality}_url"]["url"])
            except ValueError as error:
                raise ValueError(f"--{modality} {file}: cannot be read as {modality}: {error}") from error
            parts.append(part)
    return parts


def conversation(parts: Sequence[Mapping[str, Any]], question: str) -> list[dict[str, Any]]:
    """One question about media."""
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def load(**kwargs: Any) -> LLM:
    """The demo model, with as few programs to compile as possible."""
    from mmjax.entrypoints.llm import LLM

    print("Loading the demo model; the first time its programs are compiled, which takes a while ...", flush=True)
    return LLM(str(DIRECTORY), **{**ENGINE, **kwargs})


def show(folder: Path, seed: int) -> None:
    """Generate media, save them, and ask the model about them."""
    from mmjax.chat.parts import media_part

    begin = time.perf_counter()
    files = make(folder, seed)
    llm = load()
    for each in files:
        print(f"\n{each.file}")
        media = [media_part(each.modality, str(each.file))]
        for qa in each.questions:
            (output,) = llm.chat(conversation(media, qa.question), use_tqdm=False)
            answer = output.outputs[0].text
            note = "" if ask.correct(qa, answer) else f"   [wrong: {qa.answer}]"
            print(f"  {qa.question}\n    {answer}{note}", flush=True)
    print(f"\n{time.perf_counter() - begin:.1f} s in all. The files are in {folder.resolve()}")
    print("\nThe same in Python:\n")
    print("\n".join(f"    {line}" for line in python_lines(files[0])))
    print('\nYour own files: mmjax demo --image FILE "How many circles are there?", or --video, or --audio.')


def python_lines(picture: DemoFile) -> list[str]:
    """Four lines of Python that ask the first question about a picture."""
    folder = str(picture.file.resolve().parent)
    url = {"type": "image_url", "image_url": {"url": picture.file.resolve().as_uri()}}
    return [
        "from mmjax import LLM",
        f"llm = LLM('demo', max_model_len={MAX_MODEL_LEN}, enforce_eager=True, allowed_local_media_path={folder!r})",
        f"content = [{url}, {{'type': 'text', 'text': {picture.questions[0].question!r}}}]",
        "print(llm.chat([{'role': 'user', 'content': content}])[0].outputs[0].text)",
    ]


def answer(files: Mapping[str, Sequence[Path]], question: str | None) -> None:
    """Ask the model about the user's own files."""
    parts = media_parts(files)
    counts = {modality: len(files.get(modality, ())) for modality in MODALITIES}
    first = next((modality for modality in MODALITIES if counts[modality]), "")
    llm = load(limit_mm_per_prompt=counts)
    question = question or DEFAULT_QUESTIONS[first]
    (output,) = llm.chat(conversation(parts, question), use_tqdm=False)
    print(f"{question}\n  {output.outputs[0].text}")


def run(
    files: Mapping[str, Sequence[Path]], question: str | None, out: Path, seed: int | None, num_eval: int | None
) -> None:
    """`mmjax demo`. ValueError for wrong flags and for files that cannot be used."""
    if num_eval is not None:
        from mmjax.demo import measure

        if num_eval < 1:
            raise ValueError(f"--eval takes a number of at least 1, got {num_eval}")
        print(measure.table(measure.measure(num_eval, lambda text: print(text, file=sys.stderr))))
    elif any(files.values()) or question:
        answer(files, question)
    else:
        show(out, SEED if seed is None else seed)
