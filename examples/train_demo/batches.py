"""Batches for training and testing, made in worker processes: token rows and the numbers that pictures are painted of.

Within a batch every picture has the same grid, every clip the same length and every sound the same number of frames,
so that nothing is padded but the ends of the token rows.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lessons
import numpy as np
import speech
from espeak import Espeak
from tokenizers import Tokenizer

from mmjax.demo import DIRECTORY, ask, paint, scenes

# (rows, columns) of tokens, as resizing to 24..36 units of 28 x 28 gives them
GRIDS = (
    *(((6, 6),) * 5 + ((5, 5),) * 3 + ((5, 6), (6, 5)) * 3 + ((5, 7), (7, 5), (4, 7), (7, 4)) * 2),
    *((4, 6), (6, 4), (4, 8), (8, 4), (4, 9), (9, 4), (3, 8), (8, 3)),
)
LARGE = ((11, 12), (12, 11), (10, 13), (13, 10), (9, 15), (15, 9))  # what other software makes of small clips
LENGTHS = (1, 2, 2, 3, 4, 4, 4, 4, 5, 6, 8)  # pairs of frames
LENGTH = 32  # rows are filled up to a multiple of it: few lengths make few programs
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
TRAIN, TEST = 1, 2  # first words of the seeds


@dataclasses.dataclass(frozen=True)
class Form:
    """What decides how a batch is computed, besides the shapes of its arrays; see `Batch`."""

    kind: str
    grid: tuple[int, int, int]


@dataclasses.dataclass
class Batch:
    """tokens i64[B, T]; wanted bool[B, T]: tokens to learn; lengths i64[B]. turns i8[B, T]: a token sees those of turn
    0 and of its own turn before it; places i64[B, T]: how many it sees, the media's included. Everything else by what
    is shown.

    pictures: things [N, MAX_THINGS, FIELDS], ground [N, GROUND_FIELDS], noise [N]: N frames in token order,
    two for each pair of a clip, `edges` wide and high in units of the shorter side. sounds i16[B, samples], to which
    noise is to be added unless `quiet`. named i64[K], spots f32[K, 2]: which of the flattened tokens name a thing of a
    single picture that can be no other, and where its centre is, 0..1. grid: tokens (time, rows, columns) of one item;
    `seconds` between pairs of frames. asked: what a test row is about.
    """

    kind: str
    tokens: np.ndarray
    wanted: np.ndarray
    lengths: np.ndarray
    turns: np.ndarray
    places: np.ndarray
    grid: tuple[int, int, int] = (1, 1, 1)
    seconds: float = 1.0
    things: np.ndarray | None = None
    ground: np.ndarray | None = None
    noise: np.ndarray | None = None
    edges: tuple[float, float] = (1.0, 1.0)
    sounds: np.ndarray | None = None
    quiet: bool = True
    named: np.ndarray | None = None
    spots: np.ndarray | None = None
    asked: list[ask.QuestionAnswer] = dataclasses.field(default_factory=list)

    @property
    def form(self) -> Form:
        return Form(self.kind, self.grid)


@dataclasses.dataclass
class Row:
    """One row of a batch, under construction; see `Batch`."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    wanted: list[bool] = dataclasses.field(default_factory=list)
    turns: list[int] = dataclasses.field(default_factory=list)
    places: list[int] = dataclasses.field(default_factory=list)

    def add(self, part: Sequence[int], turn: int, *, learn: bool = False) -> None:
        seen = self.turns.count(0) + (self.turns.count(turn) if turn else 0)
        self.tokens.extend(part)
        self.wanted.extend([learn] * len(part))
        self.turns.extend([turn] * len(part))
        self.places.extend(range(seen, seen + len(part)))


class Rows:
    """Conversations as token rows."""

    def __init__(self, directory: Path = DIRECTORY) -> None:
        self.backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.encode: Callable[[str], tuple[int, ...]] = functools.lru_cache(20000)(self._encode)
        self.shapes, self.colors = (
            {self.encode(f" {name}")[0]: name for name in names} for names in (scenes.SHAPES, scenes.COLORS)
        )

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.backend.encode(text).ids)

    def media(self, kind: str, count: int, each: int) -> tuple[int, ...]:
        """`count` items of `each` tokens."""
        marks = {"image": ("vision", "IMAGE"), "video": ("vision", "VIDEO"), "audio": ("audio", "AUDIO")}
        if kind == "text":
            return ()
        place, token = marks[kind]
        start, pad, end = (self.encode(t)[0] for t in (f"<|{place}_bos|>", f"<|{token}|>", f"<|{place}_eos|>"))
        return (start, *[pad] * each, end) * count

    def row(
        self,
        media: Sequence[int],
        turns: Sequence[ask.QuestionAnswer],
        *,
        last: bool = False,
        system: bool = True,
        apart: bool = False,
    ) -> Row:
        """last: the question stands before what it is about. apart: every question is the first about the media, and
        none is seen by another; what was answered before would otherwise be looked up there, and not in the media."""
        row = Row()
        if system:
            row.add(self.encode(SYSTEM), 0)
        if apart:
            row.add((*self.encode("<|im_start|>user\n"), *media), 0)
        for index, asked in enumerate(turns):
            turn = index + 1 if apart else 0
            question = self.encode(asked.question)
            if not apart:
                row.add(self.encode("<|im_start|>user\n"), 0)
            parts = [media, question] if index == 0 and not apart else [question]
            for part in reversed(parts) if last else parts:
                row.add(part, turn)
            row.add(self.encode("<|im_end|>\n<|im_start|>assistant\n"), turn)
            row.add(self.encode(asked.answer) + self.encode("<|im_end|>"), turn, learn=True)
            if not apart and index + 1 < len(turns):
                row.add(self.encode("\n"), 0)
        return row

    def named(self, row: Row, scene: scenes.Scene) -> Iterator[tuple[int, float, float]]:
        """The tokens of a row that complete the name of one thing of a scene and of no other, and where that is."""
        for index, token in enumerate(row.tokens):
            if token in self.shapes:
                color = self.colors.get(row.tokens[index - 1])
                meant = [t for t in scene.things if t.shape == self.shapes[token] and color in (None, t.color)]
                if len(meant) == 1:
                    yield index, meant[0].x / scene.width, meant[0].y / scene.height


def together(kind: str, rows: Sequence[Row], **fields: Any) -> Batch:
    """Rows of equal length; what fills them up is seen by nobody."""
    longest = -(-max(len(row.tokens) for row in rows) // LENGTH) * LENGTH
    tokens, turns, places = (np.zeros((len(rows), longest), dtype) for dtype in (np.int64, np.int8, np.int64))
    wanted = np.zeros((len(rows), longest), bool)
    for index, row in enumerate(rows):
        count = len(row.tokens)
        tokens[index, :count], wanted[index, :count] = row.tokens, row.wanted
        turns[index, :count], places[index, :count] = row.turns, row.places
    lengths = np.array([len(row.tokens) for row in rows])
    return Batch(kind, tokens, wanted, lengths, turns, places, **fields)


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _edges(rng: np.random.Generator, rows: int, columns: int) -> tuple[float, float]:
    """Width and height in units of the shorter side; resizing to a grid distorts pictures a little."""
    ratio = columns / rows * float(np.exp(rng.uniform(-0.12, 0.12)))
    return max(1.0, ratio), max(1.0, 1 / ratio)


def _painted(drawn: Sequence[scenes.Scene]) -> dict[str, np.ndarray]:
    things, ground = zip(*map(paint.table, drawn), strict=True)
    return {
        "things": np.stack(things),
        "ground": np.stack(ground),
        "noise": np.array([s.noise for s in drawn], np.float32),
    }


def _loose(rng: np.random.Generator, turns: Sequence[ask.QuestionAnswer]) -> list[ask.QuestionAnswer]:
    return [dataclasses.replace(turn, question=lessons.loosely(rng, turn.question)) for turn in turns]


def pictures(rng: np.random.Generator, rows: Rows, size: int, *, skill: str | None = None) -> Batch:
    """Questions about single pictures, or about pairs: a batch is all of one sort. With a skill: a test batch."""
    pairs = skill == "compare" if skill else rng.random() < 0.22
    height, width = _pick(rng, GRIDS)
    edges = _edges(rng, height, width)
    last, system = (False, True) if skill else (rng.random() < 0.12, rng.random() > 0.1)
    apart = not skill and not last and rng.random() < 0.9
    out: list[Row] = []
    drawn: list[scenes.Scene] = []
    questions: list[ask.QuestionAnswer] = []
    media = rows.media("image", 1 + pairs, height * width)
    while len(out) < (size // 2 if pairs else size):
        most = 1 if pairs and rng.random() < 0.4 else None
        shown = [scenes.draw_scene(rng, *edges, things=most) for _ in range(1 + pairs)]
        if pairs and rng.random() < 0.3:  # alike more often than chance has it
            thing = dataclasses.replace(shown[1].things[0], shape=shown[0].things[0].shape)
            shown[1] = dataclasses.replace(shown[1], things=(thing, *shown[1].things[1:]))
        if skill:
            turns = [tested] if (tested := ask.about_picture(rng, shown, skill)) else []
        else:
            turns = _loose(rng, lessons.about_picture(rng, shown, int(rng.integers(2, 7))))
        if not turns:
            continue
        questions.append(turns[0])
        out.append(rows.row(media, turns, last=last, system=system, apart=apart))
        drawn += shown
    batch = together("image", out, grid=(1, height, width), edges=edges, asked=questions, **_painted(drawn))
    if not pairs and not skill and not last:  # words before the picture cannot know
        both = enumerate(zip(out, drawn, strict=True))
        if told := [(index, *each) for index, (row, scene) in both for each in rows.named(row, scene)]:
            indices, places, x, y = zip(*told, strict=True)
            batch.named = np.array(indices) * batch.tokens.shape[1] + np.array(places)
            batch.spots = np.array([x, y], np.float32).T
    return batch


def clips(rng: np.random.Generator, rows: Rows, size: int, *, test: bool = False) -> Batch:
    """Questions about what moves. `size` is in pictures' worth of tokens."""
    large = not test and rng.random() < 0.12
    height, width = _pick(rng, LARGE if large else GRIDS)
    pairs = 4 if test else _pick(rng, LENGTHS[:7] if large else LENGTHS)
    edges = _edges(rng, height, width)
    count = size if test else max(4, size * 32 // (pairs * height * width))
    media = rows.media("video", 1, pairs * height * width)
    last, system = (False, True) if test else (rng.random() < 0.12, rng.random() > 0.1)
    seconds = 1.0 if test or rng.random() < 0.45 else float(np.exp(rng.uniform(np.log(0.06), np.log(4))))
    out, drawn, questions = [], [], []
    for _ in range(count):
        clip = scenes.draw_clip(rng, 2 * pairs - int(not test and pairs > 1 and rng.random() < 0.2), *edges)
        frames = clip.frames()
        drawn += frames + frames[-1:] * (2 * pairs - len(frames))
        asked = ask.about_clip(rng, clip)
        questions.append(asked)
        out.append(rows.row(media, [asked] if test else _loose(rng, [asked]), last=last, system=system))
    grid = (pairs, height, width)
    return together("video", out, grid=grid, seconds=seconds, edges=edges, asked=questions, **_painted(drawn))


def talk(rng: np.random.Generator, rows: Rows, size: int) -> Batch:
    chosen = [list(ask.TALK.items())[int(i)] for i in rng.integers(len(ask.TALK), size=size)]
    return together(
        "text",
        [rows.row((), _loose(rng, [ask.QuestionAnswer("talk", *pair)]), system=rng.random() > 0.1) for pair in chosen],
    )


def audio_tokens(frames: int) -> int:
    """Tokens of a sound of so many mel frames."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def hear(rng: np.random.Generator, rows: Rows, heard: Sequence[tuple[str, np.ndarray]], *, test: bool = False) -> Batch:
    """Questions about sounds, all made as long as the longest, or a little longer: few lengths make few programs."""
    frames = max(-(-len(sound) // speech.HOP) for _, sound in heard)
    frames = frames if test else -(-frames // 16) * 16
    sounds = np.zeros((len(heard), frames * speech.HOP), np.float32)
    media = rows.media("audio", 1, audio_tokens(frames))
    last, system = (False, True) if test else (rng.random() < 0.12, rng.random() > 0.1)
    out, questions = [], []
    for row, (said, sound) in zip(sounds, heard, strict=True):
        row[: len(sound)] = sound
        turns = ask.about_speech(rng, said)
        questions.append(turns[0])
        out.append(rows.row(media, turns[:1] if test else _loose(rng, turns), last=last, system=system))
    if test:
        sounds = speech.noisy(rng, sounds)
    whole = np.clip(sounds * 32767, -32768, 32767).astype(np.int16)
    return together("audio", out, grid=(frames, 1, 1), sounds=whole, quiet=test, asked=questions)


def sounds(rng: np.random.Generator, rows: Rows, espeak: Espeak, budget: int) -> Iterator[Batch]:
    """Batches of sounds of about the same length, `budget` mel frames each."""
    shelves: dict[int, list[tuple[str, np.ndarray]]] = {}
    while True:
        said = speech.utterance(rng)
        sound = speech.spoil(rng, speech.varied(rng, speech.say(espeak, rng, said, speech.VOICES)))
        frames = len(sound) // speech.HOP
        if not 40 < frames < speech.LONGEST * 100:
            continue
        shelf = shelves.setdefault(frames // 32, [])
        shelf.append((said, sound))
        if len(shelf) * (frames // 32 + 1) * 32 >= budget:
            yield hear(rng, rows, shelf)
            shelf.clear()


def tests(espeak: Espeak | None, size: int) -> list[Batch]:
    """The held-out sets: scenes from seeds of their own, sounds of voices never trained on."""
    rows, out = Rows(), []
    for index, skill in enumerate(ask.PICTURE):
        for part in range(2):
            double = 2 if skill == "compare" else 1
            out.append(pictures(np.random.default_rng([TEST, index, part]), rows, size * double, skill=skill))
    out += [clips(np.random.default_rng([TEST, 50, part]), rows, size, test=True) for part in range(2)]
    for digits in (True, False) if espeak is not None else ():
        rng = np.random.default_rng([TEST, 60, digits])
        made: list[tuple[str, np.ndarray]] = []
        while espeak is not None and len(made) < size * 2:
            said = speech.utterance(rng)
            if (said.split()[0] in ask.DIGITS) == digits and len(said.split()) < 7:
                sound = speech.spoil(rng, speech.say(espeak, rng, said, speech.TEST_VOICES))
                if len(sound) < speech.LONGEST * speech.RATE:
                    made.append((said, sound))
        made.sort(key=lambda pair: len(pair[1]))
        out += [hear(rng, rows, made[i : i + size // 2], test=True) for i in range(0, len(made), size // 2)]
    return out


class Makers:
    """Worker processes that keep a queue of each kind of batch full."""

    def __init__(
        self, seed: int, workers: int, sizes: dict[str, int], folder: Path | None, each: dict[str, float]
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.queues = {kind: context.Queue(max(4, workers)) for kind in sizes}
        cost = {"image": 0.26, "video": 0.14, "audio": 0.6}  # of a batch
        shares = {kind: share * cost[kind] for kind, share in each.items()}
        shares = {kind: share / sum(shares.values()) for kind, share in shares.items()}
        self.processes = []
        for kind, share in shares.items():
            for index in range(max(1, round(share * workers))) if kind in sizes else ():
                arguments = (
                    kind,
                    [TRAIN, seed, list(shares).index(kind), index],
                    sizes[kind],
                    folder,
                    self.queues[kind],
                )
                self.processes.append(context.Process(target=_work, args=arguments, daemon=True))
        for process in self.processes:
            process.start()
        self.recent: collections.deque[Batch] = collections.deque(maxlen=16)
        self.again = 0
        self.ready: dict[str, queue.Queue[Batch]] = {kind: queue.Queue(3) for kind in sizes}
        for kind in sizes:  # unpacking a batch takes as long as a part of a step
            threading.Thread(target=self._fetch, args=(kind,), daemon=True).start()

    def _fetch(self, kind: str) -> None:
        while True:
            self.ready[kind].put(self.queues[kind].get())

    def take(self, kind: str) -> Batch:
        """The next batch; of sounds, one of the last few again (with other noise) rather than wait for a new one.
        Raises RuntimeError when its makers have died."""
        while True:
            if kind == "audio" and self.ready[kind].empty() and len(self.recent) == self.recent.maxlen:
                self.again += 1
                return self.recent[self.again % len(self.recent)]
            try:
                batch = self.ready[kind].get(timeout=20)
                if kind == "audio":
                    self.recent.append(batch)
                return batch
            except queue.Empty:
                if not all(process.is_alive() for process in self.processes):
                    raise RuntimeError("a worker process has died; its error is above") from None

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()


def _work(kind: str, seed: list[int], size: int, folder: Path | None, out: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    rng, rows = np.random.default_rng(seed), Rows()
    if kind == "audio":
        for batch in sounds(rng, rows, Espeak(folder), size):
            out.put(batch)
    while True:
        out.put(pictures(rng, rows, size) if kind == "image" else clips(rng, rows, size))
