"""`mmjax demo`: the model that ships with mmjax looks and listens, at what is made up here or at your own files."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmjax.demo import DIRECTORY, ask, heldout, paint, scenes

KINDS = ("image", "video", "audio")
ASKED = {"image": "What is in the picture?", "video": "What happens in the video?", "audio": "What is said?"}
ABOUT_PICTURE = ("describe", "color", "count")
SEED = 3  # of what is made unless told otherwise
SIDE = 336  # pixels on the shorter edge of what is drawn
RATE = 4  # frames of the clip per second
LONGEST = 1024  # tokens of prompt and answer
# few programs, each compiled when it is first needed: on two cores that is half a minute, once
ENGINE: Mapping[str, Any] = {
    "max_model_len": LONGEST,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 1,
    "enforce_eager": True,
    "media_io_kwargs": {"video": {"num_frames": heldout.FRAMES}},
}


@dataclasses.dataclass(frozen=True)
class Shown:
    """A file that was made for the show, and what is asked about it."""

    kind: str
    file: Path
    asked: list[ask.Asked]


def make(folder: Path, seed: int) -> list[Shown]:
    """Draw a picture and a clip and take a recording, all of which the model has never met; write them as files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([heldout.FIRST, 100, seed])
    return [_picture(rng, folder), _clip(rng, folder), _sound(rng, folder)]


def _picture(rng: np.random.Generator, folder: Path) -> Shown:
    while True:
        scene = scenes.draw_scene(rng, 4 / 3, 1.0, things=3)
        asked = [one for skill in ABOUT_PICTURE if (one := ask.about_picture(rng, [scene], skill))]
        if len(asked) == len(ABOUT_PICTURE):
            break
    file = folder / "picture.png"
    paint.pictures([scene], SIDE, rng)[0].save(file)
    return Shown("image", file, asked)


def _clip(rng: np.random.Generator, folder: Path) -> Shown:
    clip = scenes.draw_clip(rng, heldout.FRAMES)
    while not clip.direction:
        clip = scenes.draw_clip(rng, heldout.FRAMES)
    file = folder / "clip.mp4"
    write_video(file, heldout.frames(rng, clip, SIDE))
    return Shown("video", file, [ask.about_clip(rng, clip)])


def _sound(rng: np.random.Generator, folder: Path) -> Shown:
    import soundfile

    digits = [pair for pair in heldout.recordings() if 2 < len(pair[0].split()) < 6]
    said, recording = digits[int(rng.integers(len(digits)))]
    file = folder / "sound.wav"
    soundfile.write(file, *heldout.read(recording))
    return Shown("audio", file, ask.about_speech(rng, said)[:1])


def write_video(file: Path, frames: np.ndarray) -> None:
    """uint8 [frames, height, width, 3], of even height and width, as an MP4 that browsers play."""
    from imageio_ffmpeg import get_ffmpeg_exe

    height, width = frames.shape[1:3]
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(RATE), "-i", "pipe:"]
    wanted = ["-c:v", "libx264", "-crf", "12", "-preset", "fast", "-pix_fmt", "yuv420p", "-threads", "1"]
    command = [get_ffmpeg_exe(), "-v", "error", "-y", *given, *wanted, str(file)]
    subprocess.run(command, input=frames.tobytes(), check=True)


def own(given: Mapping[str, Sequence[Path]]) -> list[dict[str, Any]]:
    """A caller's files as the parts of a message. ValueError for one that is missing or is not of its kind."""
    from mmjax.chat.parts import media_part
    from mmjax.multimodal.media import MediaConnector

    connector = MediaConnector({"video": ENGINE["media_io_kwargs"]["video"]})
    fetch: Mapping[str, Callable[[str], Any]] = {
        "image": connector.fetch_image,
        "video": connector.fetch_video,
        "audio": connector.fetch_audio,
    }
    parts = []
    for kind in KINDS:
        for file in given.get(kind, ()):
            if not file.is_file():
                raise ValueError(f"--{kind} {file}: there is no such file")
            made = media_part(kind, str(file))
            try:
                fetch[kind](made[f"{kind}_url"]["url"])
            except ValueError as error:
                raise ValueError(f"--{kind} {file}: cannot be read as {kind}: {error}") from error
            parts.append(made)
    return parts


def conversation(parts: Sequence[Mapping[str, Any]], question: str) -> list[dict[str, Any]]:
    """One question about what the parts show."""
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def load(**more: Any) -> Any:
    """The packaged model, with as little to compile as can be."""
    from mmjax.entrypoints.llm import LLM

    print("Loading the demo model; the first time its programs are compiled, which takes a while ...", flush=True)
    return LLM(str(DIRECTORY), **{**ENGINE, **more})


def show(folder: Path, seed: int) -> None:
    """Make something to see and hear, save it, and ask about it."""
    from mmjax.chat.parts import media_part

    begin = time.perf_counter()
    shown = make(folder, seed)
    llm = load()
    for each in shown:
        print(f"\n{each.file}")
        media = [media_part(each.kind, str(each.file))]
        for asked in each.asked:
            (output,) = llm.chat(conversation(media, asked.question), use_tqdm=False)
            answer = output.outputs[0].text
            note = "" if ask.correct(asked, answer) else f"   [wrong: {asked.answer}]"
            print(f"  {asked.question}\n    {answer}{note}", flush=True)
    print(f"\n{time.perf_counter() - begin:.1f} s in all. The files are in {folder.resolve()}")
    print("\nThe same in Python:\n")
    print("\n".join(f"    {line}" for line in lines(shown[0])))
    print('\nYour own: mmjax demo --image FILE "How many circles are there?", or --video, or --audio.')


def lines(shown: Shown) -> list[str]:
    """Four lines of Python that ask the first question about a file."""
    folder = str(shown.file.resolve().parent)
    url = {"type": "image_url", "image_url": {"url": shown.file.resolve().as_uri()}}
    return [
        "from mmjax import LLM",
        f"llm = LLM('demo', max_model_len={LONGEST}, enforce_eager=True, allowed_local_media_path={folder!r})",
        f"content = [{url}, {{'type': 'text', 'text': {shown.asked[0].question!r}}}]",
        "print(llm.chat([{'role': 'user', 'content': content}])[0].outputs[0].text)",
    ]


def answer(given: Mapping[str, Sequence[Path]], question: str | None) -> None:
    """Ask about a caller's own files."""
    parts = own(given)
    counts = {kind: len(given.get(kind, ())) for kind in KINDS}
    kind = next((kind for kind in KINDS if counts[kind]), "")
    llm = load(limit_mm_per_prompt=counts)
    (output,) = llm.chat(conversation(parts, question or ASKED[kind]), use_tqdm=False)
    print(f"{question or ASKED[kind]}\n  {output.outputs[0].text}")


def run(
    given: Mapping[str, Sequence[Path]], question: str | None, out: Path, seed: int | None, measured: int | None
) -> None:
    """What `mmjax demo` does. ValueError for flags that do not go together, and for files that cannot be used."""
    if measured is not None:
        from mmjax.demo import measure

        if measured < 1:
            raise ValueError(f"--eval takes a number of at least 1, got {measured}")
        print(measure.table(measure.measure(measured, lambda text: print(text, file=sys.stderr))))
    elif any(given.values()) or question:
        answer(given, question)
    else:
        show(out, SEED if seed is None else seed)
