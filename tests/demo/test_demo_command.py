"""`mmjax demo` without its model: files, flags, what is told and what is refused; and where "demo" leads."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mmjax.cli.main import main
from mmjax.demo import DIRECTORY, ask, heldout, measure, show
from mmjax.loader.checkpoint import find_model
from mmjax.multimodal.media import MediaConnector


class Parrot:
    """Answers everything alike, and remembers what it was asked."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []

    def _said(self) -> Any:
        return SimpleNamespace(outputs=[SimpleNamespace(text=self.answers.pop(0) if self.answers else "No.")])

    def chat(self, messages: Any, use_tqdm: bool) -> list[Any]:
        self.asked.append(messages)
        return [self._said()]

    def generate(self, prompts: Sequence[Any], params: Any, use_tqdm: bool) -> list[Any]:
        return [self._said() for _ in prompts]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little to draw."""
    monkeypatch.setattr(show, "SIDE", 112)


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    parrot = Parrot([])
    monkeypatch.setattr(show, "load", lambda **more: parrot)
    return parrot


def test_what_is_made_can_be_read(tmp_path: Path) -> None:
    made = show.make(tmp_path, seed=3)
    read = MediaConnector(allowed_local_media_path=str(tmp_path))
    picture, clip, sound = (each.file for each in made)
    assert read.fetch_image(picture.as_uri()).size == (149, 112)
    frames, facts = read.fetch_video(clip.as_uri())
    assert frames.shape == (heldout.FRAMES, 112, 112, 3) and facts["fps"] == show.RATE
    samples, rate = read.fetch_audio(sound.as_uri())
    assert rate == 16000 and len(samples) > 8000
    assert [[question.skill for question in each.questions] for each in made] == [
        list(show.ABOUT_PICTURE),
        ["motion"],
        ["digits"],
    ]


def test_the_same_seed_makes_the_same(tmp_path: Path) -> None:
    made = [show.make(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    one, same, other = ([each.file.read_bytes() for each in group] for group in made)
    assert one == same and all(a != b for a, b in zip(one, other, strict=True))


def test_the_show(tmp_path: Path, parrot: Parrot, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [one for each in show.make(tmp_path / "before", show.SEED) for one in each.questions]
    parrot.answers = [one.answer for one in asked[:-1]]
    assert main(["demo", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert all(one.question in told and one.answer in told for one in asked)
    assert told.count("[wrong: ") == 1, "the last one"
    assert str(tmp_path / "out") in told and "from mmjax import LLM" in told
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["clip.mp4", "picture.png", "sound.wav"]


def test_own_files(tmp_path: Path, parrot: Parrot, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (50, 60), "red").save(tmp_path / name)
    parrot.answers = ["Yes."]
    files = ["--image", str(tmp_path / "a.png"), f"--image={tmp_path / 'b.png'}"]
    assert main(["demo", *files, "Do both show the same shape?"]) == 0
    assert capsys.readouterr().out.endswith("Do both show the same shape?\n  Yes.\n")
    (message,) = parrot.asked[0]
    assert [part["type"] for part in message["content"]] == ["image_url", "image_url", "text"]


@pytest.mark.parametrize("kind", show.MODALITIES)
def test_own_files_without_a_question(
    kind: str, tmp_path: Path, parrot: Parrot, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {each.modality: each.file for each in show.make(tmp_path, 0)}
    assert main(["demo", f"--{kind}", str(files[kind])]) == 0
    assert show.DEFAULT_QUESTIONS[kind] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "nowhere.png"], "--image nowhere.png: there is no such file"),
        (["--audio", "."], "--audio .: there is no such file"),
        (["--image", "text.txt"], "--image text.txt: cannot be read as image: "),
        (["--audio", "picture.png"], "--audio picture.png: cannot be read as audio: "),
        (["--video", "picture.txt.png"], "--video picture.txt.png: cannot be read as video: "),
        (["--eval", "0"], "--eval takes a number of at least 1, got 0"),
    ],
)
def test_what_cannot_be_shown(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "picture.txt.png"):
        Path(name).write_text("words")
    Image.new("RGB", (50, 60), "red").save("picture.png")
    assert main(["demo", *words]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"mmjax: {message}") and told.out == ""


def test_figures() -> None:
    questions = {skill: heldout.questions(skill, 2) for skill in ask.SKILLS}
    right = [one.qa.answer for group in questions.values() for one in group]
    last = right.index(questions["digits"][1].qa.answer)
    right[last] = "nonsense"
    scores = measure.measure(2, lambda text: None, Parrot(right))
    assert {score.skill: score.accuracy for score in scores} == {
        skill: 1 - (skill == "digits") / 2 for skill in ask.SKILLS
    }
    said = sum(len(one.qa.answer.split()) for one in questions["digits"])
    lost = len(questions["digits"][1].qa.answer.split())
    table = measure.table(scores)
    assert f"| word error rate of digits | | 2 | {lost / said:.1%} |" in table
    assert table.count("| 100.0% |") == len(ask.SKILLS) - 1


def test_where_the_name_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name is the model only if it is one: `mmjax demo --out demo` hides nothing."""
    monkeypatch.chdir(tmp_path)
    assert find_model("demo") == DIRECTORY
    Path("demo").mkdir()
    assert find_model("demo") == DIRECTORY
    assert find_model("./demo") == Path("demo")
    Path("demo/config.json").write_text("{}")
    assert find_model("demo") == Path("demo")
