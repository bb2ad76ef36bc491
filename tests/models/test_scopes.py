"""Programs name their parts, so that profiles and HLO dumps can be read: see jax.named_scope in every module."""

from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from mmjax import LLM
from mmjax.engine.programs import Decode, Encode, Prefill, ProgramInputs, ProgramKey

SMALL = {"block_size": 16, "max_num_seqs": 2, "max_num_batched_tokens": 32, "enforce_eager": True}
STEP = ("decoder/embed", "decoder/layer_0", "decoder/layer_1", "attn/", "mlp/", "kv_cache/write", "sampler/logits")
CASES: list[tuple[str, ProgramKey, tuple[str, ...]]] = [
    ("qwen2_vl", Prefill(32), (*STEP, "attn/rope", "attn/paged_prefill")),
    ("qwen2_vl", Decode(1, 1), (*STEP, "attn/rope", "attn/paged_decode")),
    (
        "qwen2_vl",
        Encode("vision", 256),
        ("vision/patch_embed", "layer/attn/segment_attention", "layer/mlp", "vision/merger"),
    ),
    ("qwen3_omni_moe", Decode(1, 1), (*STEP, "mlp/router", "mlp/experts")),
    ("qwen3_omni_moe", Encode("audio", 1), ("audio/conv", "layer/attn", "audio/projector")),
    ("whisper", Decode(1, 1), (*STEP, "cross_attn/paged_decode")),
    ("whisper", Encode("audio", 1), ("audio/conv1", "audio/conv2", "layer/attn", "decoder/layer_0", "kv_cache/write")),
]


@pytest.mark.parametrize("family", sorted({family for family, *_ in CASES}))
def test_programs_name_their_parts(family: str, tiny_dir: Callable[[str], Path]) -> None:
    runner = LLM(str(tiny_dir(family)), max_model_len=64, **SMALL).model.engines[0].runner  # type: ignore[arg-type]
    inputs = ProgramInputs(runner.functions, runner.params, runner.state, runner.dtype)
    for owner, key, scopes in CASES:
        if owner == family:
            program = key.program(inputs)
            with jax.set_mesh(runner.mesh):
                text = jax.jit(program.fn).lower(*program.args).as_text(debug_info=True)
            assert [scope for scope in scopes if scope not in text] == [], key
