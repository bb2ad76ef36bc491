"""Incremental text against the tokenizers' own full decode, and stop strings against their definition."""

import random
import time

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mmjax.outputs.detokenizer import Detokenizer
from mmjax.tokenizer.tokenizer import Tokenizer
from mmjax.types import SamplingParams

CORPUS = ["the quick brown fox jumps over the lazy dog", "stop, look and listen", "naïve café 你好 世界 🙂🙃"]
TEXTS = [*CORPUS, "a  b", " leading", "tail ", "日本語テキスト🦊🦊", "é", "x\ny\t z", ""]


def byte_level():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|start|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentence_piece():
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>"])}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz,é你"]:
        vocab[token] = len(vocab)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("o", "p"), ("s", "t"), ("▁", "s"), ("▁", "a")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Backend(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@pytest.fixture(scope="module", params=[byte_level, sentence_piece], ids=["byte_level", "sentence_piece"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param().save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def chunks(ids, generator):
    at = 0
    while at < len(ids):
        size = generator.randint(1, 4)
        yield ids[at : at + size]
        at += size


def stream(tokenizer, ids, generator, prompt=(), **params):
    """All deltas, joined, after checking that they agree with `.text`."""
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams(**params))
    pieces = []
    for chunk in chunks(ids, generator):
        pieces.append(detokenizer.push(chunk))
        assert detokenizer.text == "".join(pieces)
        if detokenizer.stopped is not None:
            break
        assert detokenizer.consumed == len(chunk)
    pieces.append(detokenizer.finish())
    assert detokenizer.finish() == ""
    assert detokenizer.text == "".join(pieces)
    return detokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    for seed in range(3):
        assert stream(tokenizer, ids, random.Random(seed)).text == tokenizer.decode(ids)


def random_ids(tokenizer, generator):
    """Any ids, unknown ones too; byte-fallback tokens only as whole characters (see the test on broken runs)."""
    ids = [generator.randrange(tokenizer.vocab_size + 3) for _ in range(generator.randint(1, 40))]
    if tokenizer.id_of("<0x00>") is None:
        return ids
    units = [[i] for i in ids if not (tokenizer.token_of(i) or "").startswith("<0x")]
    units += [
        [tokenizer.id_of(f"<0x{byte:02X}>") for byte in char.encode()] for char in generator.sample("aé你🙂\n\0 ", 4)
    ]
    generator.shuffle(units)
    return [i for unit in units for i in unit]


def assert_full_decode(tokenizer, seed, trials):
    generator = random.Random(seed)
    for _ in range(trials):
        ids = random_ids(tokenizer, generator)
        skip = generator.random() < 0.5
        got = stream(tokenizer, ids, generator, skip_special_tokens=skip).text
        assert got == tokenizer.decode(ids, skip), ids


def test_random_ids_equal_the_full_decode(tokenizer):
    assert_full_decode(tokenizer, 1, 150)


def test_published_tokenizers(shared):
    folders = [shared / "models" / "whisper-tiny.en", *sorted((shared / "reference").iterdir())]
    folders = [folder for folder in folders if (folder / "tokenizer.json").is_file()]
    assert folders
    for folder in folders:
        assert_full_decode(Tokenizer(folder), 2, 40)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fallback")
    sentence_piece().save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Byte-level tokenizer; any text can be cut into single bytes."""
    folder = tmp_path_factory.mktemp("letters")
    byte_level().save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def spell(tokenizer, text):
    """One token per byte of `text`."""
    alphabet = {tokenizer.decode([i]): i for i in range(tokenizer.vocab_size)}
    return [alphabet[char] for char in text]


def test_character_appears_when_its_last_byte_does(letters, fallback):
    for tokenizer in (letters, fallback):
        ids = tokenizer.encode("ß𝄞", add_special_tokens=False)[-6:]  # characters without tokens of their own
        detokenizer = Detokenizer(tokenizer, ids, SamplingParams())
        assert [detokenizer.push([i]) for i in ids] == ["", "ß", "", "", "", "𝄞"]


def test_incomplete_character_is_shown_at_the_end(letters, fallback):
    for tokenizer in (letters, fallback):
        ids = tokenizer.encode("𝄞", add_special_tokens=False)[-4:-1]
        detokenizer = Detokenizer(tokenizer, [], SamplingParams())
        assert detokenizer.push(ids) == ""
        assert detokenizer.finish() == tokenizer.decode(ids)


def test_broken_run_of_byte_tokens_keeps_its_valid_characters(fallback):
    ids = [
        fallback.id_of(token) for token in ("▁a", "<0xC3>", "<0xA9>", "<0xFF>", "<0xE4>", "<0xBD>", "b", "<0xA0>", "s")
    ]
    detokenizer = stream(fallback, ids, random.Random(0))
    assert detokenizer.text == "aé\ufffd\ufffd\ufffdb\ufffds"


def test_first_space_is_dropped_only_at_the_start_of_all_text(fallback):
    word, start, other = fallback.id_of("▁the"), fallback.id_of("<s>"), fallback.id_of("x")
    generator = random.Random(0)
    assert stream(fallback, [word, word], generator).text == "the the"
    assert stream(fallback, [start, word], generator, prompt=[start]).text == "the"
    assert stream(fallback, [word], generator, prompt=[start, other]).text == " the"
    assert stream(fallback, [word], generator, prompt=[start], skip_special_tokens=False).text == " the"
    assert stream(fallback, [fallback.id_of("▁"), word], generator).text == " the"


def test_special_tokens(letters):
    ids = [*spell(letters, "a"), letters.id_of("<|end|>"), letters.id_of("<|start|>"), *spell(letters, "b")]
    generator = random.Random(0)
    assert stream(letters, ids, generator).text == "ab"
    for spaces in (True, False):
        params = dict(skip_special_tokens=False, spaces_between_special_tokens=spaces)
        assert stream(letters, ids, generator, **params).text == "a<|end|><|start|>b"


def reference_stop(text, stops, keep, first=0):
    """Text, stop string and characters used, by trying every end in turn. Ends up to `first` do not count."""
    for end in range(first + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if keep else end - len(stop)], stop, end
    return text, None, len(text)


def test_stop_strings_equal_their_definition(letters):
    generator = random.Random(5)
    spelled = {char: spell(letters, char)[0] for char in "abc"}
    for _ in range(400):
        text = "".join(generator.choice("abc") for _ in range(generator.randint(1, 30)))
        stops = ["".join(generator.choice("abc") for _ in range(generator.randint(1, 5))) for _ in range(2)]
        keep, first = generator.random() < 0.5, generator.choice([0, 0, 3])
        expected, stop, used = reference_stop(text, stops, keep, first)
        params = SamplingParams(stop=stops, include_stop_str_in_output=keep, min_tokens=first, max_tokens=None)
        detokenizer = Detokenizer(letters, [], params)
        ids, consumed, deltas = [spelled[char] for char in text], 0, []
        for chunk in chunks(ids, generator):
            deltas.append(detokenizer.push(chunk))
            consumed += detokenizer.consumed
            assert expected.startswith("".join(deltas))  # released text is never changed
        deltas.append(detokenizer.finish())
        assert (detokenizer.text, detokenizer.stopped, consumed) == (expected, stop, used), (text, stops)
        assert "".join(deltas) == expected


def test_stop_inside_one_token_cuts_the_text_but_keeps_the_token(letters):
    ids = letters.encode("the lazy", add_special_tokens=False)
    detokenizer = Detokenizer(letters, [], SamplingParams(stop=["laz", "h"]))
    assert detokenizer.push([*ids, *ids]) == "t"
    assert detokenizer.stopped == "h"
    assert letters.decode(ids[: detokenizer.consumed]).startswith("th")
    assert detokenizer.push(ids) == "" and detokenizer.consumed == 0
    assert detokenizer.finish() == "" and detokenizer.text == "t"


def test_only_what_may_begin_a_stop_string_is_held_back(letters):
    detokenizer = Detokenizer(letters, [], SamplingParams(stop="xyz"))
    deltas = [detokenizer.push(spell(letters, char)) for char in "axxyaxy"]
    assert deltas == ["a", "", "x", "", "xya", "", ""]
    assert detokenizer.finish() == "xy" and detokenizer.stopped is None


def test_min_tokens_counts_tokens_not_characters(letters):
    ids = spell(letters, "..")
    for min_tokens, text in ((0, ""), (1, "."), (2, "..")):
        detokenizer = Detokenizer(letters, [], SamplingParams(stop=".", min_tokens=min_tokens))
        detokenizer.push(ids)
        detokenizer.finish()
        assert detokenizer.text == text
        assert detokenizer.consumed == min(2, min_tokens + 1)


def test_cost_is_linear(letters):
    """Ten times the tokens take less than 30 times as long; quadratic cost would make it 100."""
    times = []
    for count in (2000, 20000):
        ids = spell(letters, "abcab") * (count // 5)
        detokenizer = Detokenizer(letters, [], SamplingParams(stop=["ababab"], max_tokens=None))
        start = time.perf_counter()
        for token in ids:
            detokenizer.push([token])
        times.append(time.perf_counter() - start)
    assert times[1] < 30 * times[0]
