"""Timestamp rules: by themselves, compared with transformers, and followed by a random model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.test_sampler import rows_of
from engine_inputs import output_ids
from input_processors import load_processor
from mmjax import SamplingParams
from mmjax.engine import sampler as sampler
from mmjax.engine.logits.bias import LogitsBias
from mmjax.engine.logits.timestamp_rules import TimestampRules
from mmjax.processors.base import TimestampTokens
from prompts import random_chord

VOCAB, END, PLAIN, FIRST, LAST = 40, 10, 19, 20, 35
START = "<|startoftranscript|>"


def rules_of(*prefix: int, latest: int = 5, **params: Any) -> TimestampRules:
    rules = TimestampTokens(FIRST, LAST, END, no_timestamps_id=PLAIN, max_initial_index=latest, prefix_ids=prefix)
    return TimestampRules(rules, VOCAB, LogitsBias(SamplingParams(**params), VOCAB, None))


def allowed(*output: int, prefix: Sequence[int] = (), **params: Any) -> list[int]:
    return np.flatnonzero(np.isfinite(rules_of(*prefix, **params).bias_row(output))).tolist()


WORDS = [token for token in range(FIRST) if token != PLAIN]


def times(least: int) -> list[int]:
    return list(range(least, LAST + 1))


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ((), list(range(FIRST, FIRST + 6))),  # a timestamp starts the transcript, and not too late
        ((22,), WORDS),
        ((22, 1), WORDS + times(23)),  # text takes time
        ((22, 1, 2, 25), [END, *times(25)]),  # closed: the next segment may start at once
        ((22, 1, 2, 25, 25), WORDS),
        ((22, 1, 25, 27, 3), WORDS + times(28)),
        ((22, 1, LAST), [END, LAST]),
        ((1,), WORDS + times(FIRST)),  # continuing a prompt
    ],
)
def test_allowed_next_tokens(prefix: tuple[int, ...], expected: list[int]) -> None:
    assert allowed(*prefix) == expected
    assert allowed(*prefix[1:], prefix=prefix[:1]) == expected  # in the prompt or in the output


def test_other_biases_apply_too() -> None:
    assert allowed(22, 1, allowed_token_ids=[3, 4, 30]) == [3, 4, 30]
    assert allowed(22, allowed_token_ids=[30]) == WORDS  # if no token is left, the rules win
    assert rules_of(logit_bias={3: 2.0}).bias_row([22])[3] == 2
    assert rules_of().dynamic and rules_of().first_timestamp == FIRST


def test_a_timestamp_follows_when_all_together_are_likeliest() -> None:
    """Ten timestamps with logit 0 weigh as much as one token with 2.3."""
    logits = np.full((3, VOCAB), -9.0, np.float32)
    logits[:, 3] = [2.2, 2.4, 2.2]
    logits[:, 22:32] = 0
    rows = rows_of(3, has_bias=True, first_timestamp=np.array([FIRST, FIRST, 0]), row=np.arange(3))
    tables = np.zeros((3, VOCAB), np.int32), np.zeros((3, VOCAB), np.float32)
    found = jax.jit(lambda *args: sampler.sample(*args, num_logprobs=1))(jnp.asarray(logits), rows, *tables)
    assert found.token_ids.tolist() == [22, 3, 3]


@pytest.mark.parametrize(
    ("prompt", "prefix"),
    [
        (f"{START}<|de|><|transcribe|>", []),
        (f"{START}<|de|><|translate|><|0.00|>", ["<|0.00|>"]),
        (f"{START}<|0.04|>", ["<|0.04|>"]),  # the prompt of English-only models
        (f"<|startofprev|> x<|transcribe|>{START}<|en|><|transcribe|><|0.00|>a<|0.10|>", ["<|0.00|>", "a", "<|0.10|>"]),
        (f"{START}<|de|><|transcribe|><|notimestamps|>", None),
        (f"{START}<|de|>", None),
        ("", None),
        (f"<|startofprev|><|0.00|>{START}", None),
    ],
)
def test_prompts_that_request_timestamps(
    prompt: str, prefix: list[str] | None, tiny_dir: Callable[[str], Path]
) -> None:
    processor, tokenizer = load_processor("whisper", tiny_dir("whisper"))
    item = processor.process_item("audio", random_chord(1, 0.5), {})
    found = processor.expand_prompt(tokenizer.encode(prompt, add_special_tokens=False), {"audio": [item]}).timestamps
    if prefix is None:
        assert found is None
    else:
        assert found is not None and [tokenizer.token_of(token) for token in found.prefix_ids] == prefix
        assert tokenizer.token_of(found.first_id) == "<|0.00|>" and tokenizer.token_of(found.last_id) == "<|4.00|>"
        assert tokenizer.token_of(found.eos_id) == "<|endoftext|>" and found.max_initial_index == 50


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_a_random_model_follows_the_rules(shared_llm: Any, temperature: float) -> None:
    llm = shared_llm("whisper")
    tokenizer = llm.model.tokenizer
    first, last, end = (tokenizer.id_of(f"<|{name}|>") for name in ("0.00", "4.00", "endoftext"))
    params = SamplingParams(temperature=temperature, max_tokens=40, seed=3)
    prompts = [
        {"prompt": f"{START}<|{name}|><|transcribe|>", "multi_modal_data": {"audio": random_chord(2, 1.0)}}
        for name in ("en", "de", "fr")
    ]
    silent = {
        "prompt": f"{START}<|en|><|transcribe|><|notimestamps|>",
        "multi_modal_data": {"audio": random_chord(2, 1.0)},
    }
    *answers, plain = output_ids(llm.generate([*prompts, silent], params, use_tqdm=False))
    assert output_ids(llm.generate(silent, params, use_tqdm=False)) == [plain]  # whatever else is in the batch
    num_timestamps = 0
    for answer in answers:
        timestamps = [token for token in answer if first <= token <= last]
        assert first <= answer[0] <= first + 50 and timestamps == sorted(timestamps)
        kinds = "".join("t" if first <= token <= last else "e" if token == end else "w" for token in answer)
        assert set(kinds) <= set("twe") and "ttt" not in kinds
        assert all(kinds.replace("tt", "|").strip("t").split("|")[:-1]), "only the last may hold nothing"
        num_timestamps += len(timestamps)
    assert temperature == 0 or num_timestamps > 6


@pytest.mark.parity
def test_the_rules_are_those_of_transformers() -> None:
    import torch
    from transformers import GenerationConfig, WhisperTimeStampLogitsProcessor

    config = GenerationConfig(eos_token_id=FIRST - 2, no_timestamps_token_id=PLAIN, max_initial_timestamp_index=5)
    theirs = WhisperTimeStampLogitsProcessor(config, begin_index=2)
    vocab = LAST + 1
    rules = TimestampTokens(FIRST, LAST, FIRST - 2, no_timestamps_id=PLAIN, max_initial_index=5, prefix_ids=())
    ours = TimestampRules(rules, vocab, LogitsBias(SamplingParams(), vocab, None))
    draw = jax.jit(lambda *args: sampler.sample(*args, num_logprobs=1).token_ids[0])
    rng = np.random.default_rng(0)
    for _ in range(30):
        answer: list[int] = []
        for _ in range(12):
            logits = rng.normal(size=vocab).astype(np.float32) * 2
            expected = theirs(torch.tensor([[7, 7, *answer]]), torch.from_numpy(logits)[None])[0].numpy()
            rows = rows_of(1, has_bias=True, first_timestamp=FIRST)
            tables = np.zeros((1, vocab), np.int32), ours.bias_row(answer)[None]
            answer.append(int(np.argmax(expected)))
            assert int(draw(jnp.asarray(logits[None]), rows, *tables)) == answer[-1]
            if answer[-1] == FIRST - 2:
                break
