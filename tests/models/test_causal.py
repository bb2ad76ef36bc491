"""Text-only models of every architecture against transformers, with what their config.json may say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from engine_inputs import greedy, output_ids
from mmjax import LLM
from models.tables import answer_table, close, log_softmax, prompt_table

NEW = 8
SIZE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LONG = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [1.5, 2.0, 4.0], "short_factor": [1.0, 1.1, 1.2],
    "partial_rotary_factor": 0.75, "original_max_position_embeddings": 512, "attention_factor": 1.2,
}  # fmt: skip
ROUTED = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LONG}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 12}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("Mistral", {"sliding_window": 20, "rope_parameters": YARN}),
    "phi3": ("Phi3", {"sliding_window": None, "rope_parameters": LONGROPE}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "attention_bias": True, "hidden_act": "relu", "rope_parameters": DYNAMIC}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1], **ROUTED}),
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_against_transformers(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    kind, more = CASES[name]
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZE, **more)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.4 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(tmp_path)
    tiny.FAMILIES["qwen2_vl"](tiny.SIZES)[0].save(str(tmp_path / "tokenizer.json"))

    sizes = {"max_model_len": 512, "max_num_seqs": 2, "max_num_batched_tokens": 64}
    llm = LLM(str(tmp_path), **sizes, max_logprobs=-1, enforce_eager=True)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 300, n).tolist() for n in (1, 90, 33)]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(asked, greedy(NEW, logprobs=-1, prompt_logprobs=-1), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output_ids([output])[0]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:-1]])).logits[0].numpy()
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == answer
        close(answer_table(output), log_softmax(logits[len(prompt) - 1 :]), 2e-4, name)
        if len(prompt) > 1:
            close(prompt_table(output), log_softmax(logits[: len(prompt) - 1]), 2e-4, name)
