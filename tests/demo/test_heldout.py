"""What the demo model is asked: made alike every time, right, and never met in training."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from mmjax.demo import ask, heldout, paint, scenes

TRAINER = Path(__file__).resolve().parents[2] / "examples" / "train_demo"


@pytest.fixture
def speech(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The trainer's voices."""
    monkeypatch.syspath_prepend(str(TRAINER))
    return importlib.import_module("speech")


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What training draws."""
    monkeypatch.syspath_prepend(str(TRAINER))
    return importlib.import_module("batches")


def shown(question: heldout.MediaQuestion) -> list[bytes]:
    return [np.asarray(item[0] if question.modality == "audio" else item).tobytes() for item in question.media]


@pytest.mark.parametrize("skill", ask.SKILLS)
def test_the_same_every_time(skill: str) -> None:
    first, second = heldout.questions(skill, 2), heldout.questions(skill, 2)
    assert [one.qa for one in first] == [one.qa for one in second]
    assert [shown(one) for one in first] == [shown(one) for one in second]
    assert {one.qa.skill for one in first} == {skill}
    assert len({shown(one)[0] for one in first}) == 2
    assert [one.qa for one in heldout.questions(skill, 1)] == [one.qa for one in first[:1]]


def test_no_seed_is_one_of_training(batches: ModuleType) -> None:
    assert heldout.FIRST not in (batches.TRAIN, batches.TEST, 3)  # 3: the tokenizer's sentences
    seen = {
        scenes.draw_scene(np.random.default_rng([first, step, kind, worker]))
        for first in (batches.TRAIN, batches.TEST)
        for step in range(4)
        for kind in range(2)
        for worker in range(8)
    }
    fresh = {
        scenes.draw_scene(np.random.default_rng([heldout.FIRST, number, seed]))
        for number in range(len(ask.SKILLS))
        for seed in range(10)
    }
    assert len(fresh) == 100 and not seen & fresh


def test_recordings_are_of_voices_that_training_never_hears(speech: ModuleType) -> None:
    files = [file for _, file in heldout.recordings()]
    voices = {file.suffixes[0].removeprefix(".") for file in files}
    assert voices <= set(speech.TEST_VOICES) and not voices & set(speech.VOICES)
    assert len(voices) > 10
    assert sum(file.stat().st_size for file in files) < 1.5e6


def test_recordings_say_what_the_model_was_taught() -> None:
    said = [words for words, _ in heldout.recordings()]
    digits = [words for words in said if words.split()[0] in ask.DIGITS]
    assert said[: len(digits)] == digits and len(digits) == 80
    assert all(set(words.split()) <= set(ask.DIGITS) for words in digits)
    assert sorted(said[len(digits) :]) == sorted(ask.WORDS)


def test_recordings_can_be_read() -> None:
    for _, file in heldout.recordings()[::20]:
        samples, rate = heldout.read(file)
        assert rate == 16000 and samples.ndim == 1
        assert 0.3 < len(samples) / rate < 6.5
        assert np.abs(samples).max() > 0.02


def test_pictures_show_what_scenes_say() -> None:
    rng = np.random.default_rng([heldout.FIRST, 200])
    for _ in range(20):
        scene = scenes.draw_scene(rng, *heldout.edges(rng))
        (picture,) = paint.pictures([scene], 120, rng)
        pixels = np.asarray(picture) / 255
        for thing in scene.things:
            if thing.shape == "ring":  # has nothing in the middle
                continue
            found = pixels[round(thing.y * 120 - 0.5), round(thing.x * 120 - 0.5)]
            assert np.abs(found - thing.rgb).max() < 5 * scene.noise + 0.01


def test_clips_move_the_way_they_say() -> None:
    rng = np.random.default_rng([heldout.FIRST, 201])
    for _ in range(20):
        clip = scenes.draw_clip(rng, heldout.FRAMES)
        (dx, dy), (last_x, last_y) = scenes.DIRECTIONS.get(clip.direction, (0, 0)), clip.paths[-1]
        assert np.sign(round(last_x, 1)) == dx or abs(last_x) < 0.1
        assert (last_x * dx + last_y * dy > 0.1) == bool(clip.direction)
        assert all(0 < thing.x < 1 and 0 < thing.y < 1 for frame in clip.frames() for thing in frame.things)


def test_counts_are_of_what_is_there() -> None:
    for question in heldout.questions("count", 5):
        (picture,) = question.media
        assert isinstance(picture, Image.Image)
        assert question.qa.answer.startswith(("There is one ", "There are "))


@pytest.mark.parametrize(
    ("wanted", "given", "right"),
    [
        ("The star is red.", "the star is red", True),
        ("The star is red.", "The star is blue.", False),
        ("A red star and a blue ring.", "A blue ring and a red star.", True),
        ("A red star, a blue ring and a white cross.", "A white cross, a blue ring and a red star.", True),
        ("A red star and a blue ring.", "A red star.", False),
        ("one two", "one two", True),
        ("one two", "two one", False),
    ],
)
def test_right_answers(wanted: str, given: str, right: bool) -> None:
    assert ask.correct(ask.QuestionAnswer("any", "?", wanted), given) is right


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [("one two three", "one two three", 0), ("one two", "one", 1), ("one", "two one", 1), ("one", "", 1)],
)
def test_word_errors(said: str, heard: str, errors: int) -> None:
    assert ask.word_errors(said, heard) == errors
