"""Tokens of a checkpoint directory, read from tokenizer.json alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import ValidationError

Make = Callable[[str], Path]


def copy(source: Path, target: Path, **config: object) -> Path:
    (target / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "whisper"])
def test_round_trip_and_roles(tiny_dir: Make, family: str) -> None:
    tokenizer = Tokenizer(tiny_dir(family))
    for text in ("Hello there", "a  b", "naïve 😀 界", ""):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)).strip() == text.strip()
    named = tokenizer.config["eos_token"]
    assert tokenizer.eos_id == tokenizer.id_of(named) and tokenizer.eos_id in tokenizer.special_ids
    assert tokenizer.token_of(tokenizer.eos_id or 0) == named and tokenizer.id_of("no such token") is None
    assert max(tokenizer.special_ids) < tokenizer.vocab_size


def test_roles_in_a_file_of_their_own(tiny_dir: Make, tmp_path: Path) -> None:
    copy(tiny_dir("llava"), tmp_path, bos_token=None)
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>"})
    )
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_id == tokenizer.id_of("</s>") and tokenizer.bos_id is None


def test_special_tokens(tiny_dir: Make) -> None:
    tokenizer = Tokenizer(tiny_dir("llava"))
    with_, without = tokenizer.encode("Hi"), tokenizer.encode("Hi", add_special_tokens=False)
    assert with_ == [tokenizer.bos_id, *without]
    assert tokenizer.decode(with_, skip_special_tokens=False).startswith("<s>")
    assert not tokenizer.decode(with_).startswith("<s>")


def test_text_that_cannot_fit_is_refused_before_tokenisation(tiny_dir: Make) -> None:
    tokenizer = Tokenizer(tiny_dir("qwen2_vl"))
    allowed = 10 * tokenizer.longest_token
    tokenizer.encode("x" * allowed, max_tokens=10)
    with pytest.raises(ValidationError, match="maximum context length is 10 tokens") as caught:
        tokenizer.encode("x" * (allowed + 1), max_tokens=10)
    assert caught.value.parameter == "input_text"


def test_missing_file_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json.*save_pretrained"):
        Tokenizer(tmp_path)


def test_roles_spelt_as_serialised_tokens(tiny_dir: Make, tmp_path: Path) -> None:
    copy(tiny_dir("llava"), tmp_path, eos_token={"__type": "AddedToken", "content": "</s>"}, bos_token=None)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_id == tokenizer.id_of("</s>") and tokenizer.bos_id is None


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "whisper"])
def test_the_hugging_face_object_agrees(tiny_dir: Make, family: str) -> None:
    tokenizer = Tokenizer(tiny_dir(family))
    for text in ("Hello  there\n naïve 😀", "<image> x", ""):
        assert tokenizer.hf(text).input_ids == tokenizer.encode(text)
    assert tokenizer.hf.eos_token_id == tokenizer.eos_id


def test_half_a_character_is_a_wrong_value(tiny_dir: Make) -> None:
    with pytest.raises(ValidationError, match="not valid Unicode: character 2 is a lone surrogate"):
        Tokenizer(tiny_dir("llava")).encode("ab\ud800")
