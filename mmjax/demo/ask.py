"""Questions about scenes, videos and recordings, with the right answers, by skill."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from mmjax.demo.scenes import COLORS, SHAPES, MovingScene, Scene, Thing

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (
    *("apple", "banana", "bread", "water", "coffee", "sugar", "house", "window", "garden", "kitchen", "table"),
    *("computer", "music", "doctor", "teacher", "school", "river", "mountain", "forest", "flower", "summer", "winter"),
    *("monday", "friday", "yellow", "orange", "purple", "circle", "dog", "cat", "horse", "elephant", "bird", "yes"),
    *("no", "hello", "goodbye", "thank you", "left", "right", "stop", "open"),
)
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
TALK = {
    "What can you do?": "I can look at pictures of shapes, watch short videos and listen to spoken digits and words.",
    "Who are you?": "I am a small model that shows what mmjax can do.",
    "Hello": "Hello! Show me a picture, a video or a sound.",
    "Help": "Ask me what is in a picture, what moves in a video, or which digits you hear.",
    "Thank you": "You are welcome.",
}


@dataclasses.dataclass(frozen=True)
class QuestionAnswer:
    """A question and the right answer. skill: one of SKILLS."""

    skill: str
    question: str
    answer: str


Maker = Callable[[np.random.Generator, Sequence[Scene]], "tuple[str, str] | None"]
"""Makes a question and its answer about one or two pictures; None where the scenes do not allow one."""


def _any(rng: np.random.Generator, *options: str) -> str:
    return options[int(rng.integers(len(options)))]


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _some(count: int, shape: str, color: str = "") -> str:
    """A sentence such as "There are two red circles."."""
    what = f"{color} {shape}".strip()
    if count == 1:
        return f"There is one {what}."
    return f"There are {COUNTS[count]} {what}{'es' if what.endswith('cross') else 's'}."


def _plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def only(things: Sequence[Thing], **wanted: str) -> bool:
    """Whether exactly one thing has these attributes."""
    return sum(all(getattr(thing, key) == value for key, value in wanted.items()) for thing in things) == 1


def one(rng: np.random.Generator, things: Sequence[Thing]) -> Thing:
    return things[int(rng.integers(len(things)))]


def listing(scene: Scene, order: Sequence[Thing] | None = None) -> str:
    """A sentence such as "A red circle, a blue square and a green star.", from left to right or in the given order."""
    names = [_a(thing.name) for thing in order or sorted(scene.things, key=lambda thing: thing.x)]
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return text[0].upper() + text[1:] + "."


def _describe(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str]:
    question = _any(
        rng,
        "What is in the picture?",
        "What is in this image?",
        "Describe the picture.",
        "Describe the image.",
        "What do you see?",
        "What does the picture show?",
        "What's in this picture?",
    )
    return question, listing(scenes[0])


def _color(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str] | None:
    things = scenes[0].things
    thing = one(rng, things)
    if not only(things, shape=thing.shape):
        return None
    spelled = _any(rng, "color", "color", "colour")
    questions = [f"What {spelled} is the {thing.shape}?", f"Which {spelled} does the {thing.shape} have?"]
    if len(things) == 1:
        questions += [f"What {spelled} is it?", f"What {spelled} is the shape?"]
    return _any(rng, *questions), f"The {thing.shape} is {thing.color}."


def _shape(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str] | None:
    things = scenes[0].things
    thing = one(rng, things)
    if not only(things, color=thing.color):
        return None
    questions = [f"What shape is {thing.color}?", f"Which shape is {thing.color}?", f"What is {thing.color}?"]
    if len(things) == 1:
        questions += ["What shape is it?", "What shape is this?", "Which shape is in the picture?"]
    return _any(rng, *questions), f"The {thing.shape} is {thing.color}."


def _count(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str]:
    things = scenes[0].things
    end = _any(rng, "?", " are there?", " are there?", " do you see?", " are in the picture?")
    form = rng.random()
    if form < 0.35:
        return f"How many {_any(rng, 'shapes', 'shapes', 'things', 'objects')}{end}", _some(len(things), "shape")
    if form < 0.75:
        shape = one(rng, things).shape if rng.random() < 0.8 else _any(rng, *SHAPES)
        number = sum(thing.shape == shape for thing in things)
        return f"How many {_plural(shape)}{end}", _some(number, shape)
    color = one(rng, things).color if rng.random() < 0.8 else _any(rng, *COLORS)
    number = sum(thing.color == color for thing in things)
    return f"How many {color} {_any(rng, 'shapes', 'things')}{end}", _some(number, "shape", color)


def _exists(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str]:
    things = scenes[0].things
    form, yes = rng.random(), rng.random() < 0.5
    thing = one(rng, things)
    what = thing.shape if yes else _any(rng, *SHAPES)
    found = any(other.shape == what for other in things)
    if form < 0.5:
        color = thing.color if yes or rng.random() < 0.5 else _any(rng, *COLORS)
        found = any(other.shape == what and other.color == color for other in things)
        what = f"{color} {what}"
    question = _any(rng, f"Is there {_a(what)}?", f"Do you see {_a(what)}?", f"Is there {_a(what)} in the picture?")
    return question, f"Yes, there is {_a(what)}." if found else f"No, there is no {what}."


SIDES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _side(a: Thing, b: Thing) -> str:
    """On which side of b a is; "" where it is on none clearly."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > 1.6 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.6 * abs(dx):
        return "above" if dy < 0 else "below"
    return ""


def _where(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str] | None:
    things = scenes[0].things
    if len(things) < 2:
        return None
    first, second = (things[int(i)] for i in rng.permutation(len(things))[:2])
    side = _side(first, second)
    if not side or not all(only(things, shape=thing.shape, color=thing.color) for thing in (first, second)):
        return None
    short = all(only(things, shape=thing.shape) for thing in (first, second)) and rng.random() < 0.4
    a, b = (thing.shape if short else thing.name for thing in (first, second))
    if rng.random() < 0.5:
        question = _any(
            rng,
            f"Where is the {a}, seen from the {b}?",
            f"Where is the {a} relative to the {b}?",
            f"Is the {a} left of, right of, above or below the {b}?",
        )
        return question, f"The {a} is {side} the {b}."
    guess = side if rng.random() < 0.5 else _any(rng, SIDES[side], *SIDES)
    phrase = f"to the {guess}" if guess.endswith("of") and rng.random() < 0.5 else guess
    return f"Is the {a} {phrase} the {b}?", f"{'Yes' if guess == side else 'No'}, the {a} is {side} the {b}."


def _compare(rng: np.random.Generator, scenes: Sequence[Scene]) -> tuple[str, str] | None:
    if len(scenes) < 2:
        return None
    first, second = scenes[0].things, scenes[1].things
    form = rng.random()
    if len(first) == len(second) == 1 and form < 0.6:
        a, b = first[0], second[0]
        if rng.random() < 0.5:
            same = f"Yes, both are {_plural(a.shape)}."
            differ = f"No, the first is {_a(a.shape)} and the second is {_a(b.shape)}."
            question = _any(rng, "Do both pictures show the same shape?", "Is the shape the same in both pictures?")
            return question, same if a.shape == b.shape else differ
        same, differ = f"Yes, both are {a.color}.", f"No, the first is {a.color} and the second is {b.color}."
        question = _any(rng, "Are both shapes of the same color?", "Is the color the same in both pictures?")
        return question, same if a.color == b.color else differ
    if form < 0.35:
        word = _any(rng, "more", "fewer")
        question = _any(rng, f"Which picture has {word} shapes?", f"Which image shows {word} shapes?")
        gap = (len(first) - len(second)) * (1 if word == "more" else -1)
        if gap == 0:
            return question, "Both pictures have the same number of shapes."
        return question, f"The {'first' if gap > 0 else 'second'} picture has {word} shapes."
    if form < 0.65:
        which = int(rng.integers(2))
        place = ("first", "second")[which]
        question = _any(rng, f"What is in the {place} picture?", f"Describe the {place} image.")
        return question, listing(scenes[which])
    shape = one(rng, first if rng.random() < 0.5 else second).shape if rng.random() < 0.85 else _any(rng, *SHAPES)
    here, there = (any(thing.shape == shape for thing in things) for things in (first, second))
    question = _any(rng, f"Which picture shows {_a(shape)}?", f"Which picture has {_a(shape)}?")
    if here != there:
        return question, f"The {'first' if here else 'second'} picture shows {_a(shape)}."
    return question, f"Both pictures show {_a(shape)}." if here else f"No picture shows {_a(shape)}."


PICTURE: dict[str, Maker] = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "exists": _exists,
    "where": _where,
    "describe": _describe,
    "compare": _compare,
}
SKILLS = (*PICTURE, "motion", "digits", "words")
TRIES = 6  # to make a question: not every choice that a maker draws allows one


def about_picture(rng: np.random.Generator, scenes: Sequence[Scene], skill: str) -> QuestionAnswer | None:
    """A question of one skill about one or two pictures. None where the scenes do not allow one."""
    for _ in range(TRIES):
        if (made := PICTURE[skill](rng, scenes)) is not None:
            return QuestionAnswer(skill, *made)
    return None


def about_clip(rng: np.random.Generator, clip: MovingScene) -> QuestionAnswer:
    """A question about what moves, and in which direction."""
    thing = clip.scene.things[0]
    questions = ["What moves?", "What happens in the video?", "Describe the video.", "What does the video show?"]
    for name in (thing.name, thing.shape):
        if only(clip.scene.things, **({"shape": name} if name == thing.shape else {"shape": thing.shape})):
            questions += [f"Which way does the {name} move?", f"In which direction does the {name} move?"]
    if len(clip.scene.things) == 1:
        questions += ["Which way does it move?", "Which way does the shape move?", "In which direction does it move?"]
    ways = {"": "does not move", "up": "moves up", "down": "moves down"}
    way = ways.get(clip.direction, f"moves to the {clip.direction}")
    return QuestionAnswer("motion", _any(rng, *questions), f"The {thing.name} {way}.")


def about_speech(rng: np.random.Generator, transcript: str) -> list[QuestionAnswer]:
    """Questions about a recording of a word or of digits."""
    words = transcript.split()
    if words[0] not in DIGITS:
        questions = ("What is said?", "Which word is spoken?", "Which word do you hear?", "Transcribe the audio.")
        return [QuestionAnswer("words", _any(rng, *questions, "What do you hear?"), transcript)]
    questions = ("What is said?", "Which digits are spoken?", "What digits do you hear?", "Transcribe the audio.")
    out = [QuestionAnswer("digits", _any(rng, *questions, "What do you hear?"), transcript)]
    if rng.random() < 0.3:
        number = f"There {'is one digit' if len(words) == 1 else f'are {COUNTS[len(words)]} digits'}."
        out.append(
            QuestionAnswer("digits", _any(rng, "How many digits are spoken?", "How many digits do you hear?"), number)
        )
    return out


def correct(qa: QuestionAnswer, answer: str) -> bool:
    """Whether an answer is right. Lists may come in any order, and case and punctuation do not matter."""
    given, wanted = (re.sub(r"[^\w\s,]", "", text.lower()).strip() for text in (answer, qa.answer))
    if given == wanted:
        return True
    separator = re.compile(r",\s*|\s+and\s+")
    is_list = wanted.startswith(("a ", "an "))
    return is_list and sorted(separator.split(given)) == sorted(separator.split(wanted))


def word_errors(reference: str, transcript: str) -> int:
    """Substitutions, insertions and deletions of words that turn one text into the other."""
    a, b = reference.lower().split(), re.sub(r"[^\w\s]", "", transcript.lower()).split()
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]
