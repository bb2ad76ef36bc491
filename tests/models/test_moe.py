"""Experts against the definition, token by token, on one device and on several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax import sharding
from mmjax.hf_config import canonical
from mmjax.nn.moe import (
    Experts,
    GroupedMlp,
    MoeConfig,
    block_rows,
    blockwise_mlp,
    ragged_dot_mlp,
    routed_experts,
)

D, F, E, TOP = 12, 10, 7, 3


def weights(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(s).astype(np.float32) / 3 for s in ((E, D, 2 * F), (E, F, D)))  # type: ignore[return-value]


def plainly(
    x: np.ndarray, expert_weights: np.ndarray, expert_ids: np.ndarray, gate_up: np.ndarray, down: np.ndarray
) -> np.ndarray:
    out = np.zeros_like(x, np.float64)
    for t, j in np.ndindex(expert_ids.shape):
        if 0 <= (e := expert_ids[t, j]) < len(down):
            gate, up = np.split(x[t].astype(np.float64) @ gate_up[e], 2)
            out[t] += expert_weights[t, j] * ((gate / (1 + np.exp(-gate)) * up) @ down[e])
    return out


def spread(kind: str, tokens: int) -> np.ndarray:
    rng = np.random.default_rng(tokens)
    if kind == "one expert":
        return np.full((tokens, TOP), 4, np.int32)
    if kind == "elsewhere":  # some on the device before, some on the one after
        return rng.integers(-E, 2 * E, (tokens, TOP)).astype(np.int32)
    if kind == "nowhere":
        return np.full((tokens, TOP), E, np.int32)
    return np.stack([rng.permutation(E)[:TOP] for _ in range(tokens)]).astype(np.int32)


@pytest.mark.parametrize("kind", ["even", "one expert", "elsewhere", "nowhere"])
@pytest.mark.parametrize(
    ("grouped_mlp", "tokens", "block"),
    [
        (blockwise_mlp, 1, 1),
        (blockwise_mlp, 33, 8),
        (blockwise_mlp, 5, 128),
        (ragged_dot_mlp, 33, 8),
    ],
)
def test_mix(grouped_mlp: GroupedMlp, kind: str, tokens: int, block: int) -> None:
    rng = np.random.default_rng(1)
    x, expert_weights = (
        rng.standard_normal((tokens, D)).astype(np.float32),
        rng.random((tokens, TOP)).astype(np.float32),
    )
    expert_ids, (gate_up, down) = spread(kind, tokens), weights()
    found = jax.jit(functools.partial(routed_experts, block=block, grouped_mlp=grouped_mlp))(
        x, expert_weights, expert_ids, gate_up, down
    )
    np.testing.assert_allclose(found, plainly(x, expert_weights, expert_ids, gate_up, down), atol=2e-5)


def test_accelerators_run_a_fixed_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is enough for any assignment of tokens to experts, and surplus blocks change nothing."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for kind in ("even", "one expert", "nowhere"):
        test_mix(blockwise_mlp, kind, 33, 8)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_router_and_shards(tp_size: int, norm_topk_prob: bool) -> None:
    """Seven experts on four devices: the eighth is padding, and no token is routed to it."""
    config = MoeConfig(E, TOP, F, norm_topk_prob, E).for_tp(tp_size)
    graph, _ = nnx.split(Experts(D, config))
    rng = np.random.default_rng(2)
    x, router = rng.standard_normal((9, D)).astype(np.float32), rng.standard_normal((D, E)).astype(np.float32)
    gate_up, down = (np.pad(w, [(0, config.padded_num_experts - E)] + [(0, 0)] * (w.ndim - 1)) for w in weights())
    probs = np.exp(x @ router) / np.exp(x @ router).sum(1, keepdims=True)
    expert_ids = np.argsort(-probs, axis=1)[:, :TOP].astype(np.int32)
    expert_weights = np.take_along_axis(probs, expert_ids, axis=1)
    expert_weights = expert_weights / expert_weights.sum(1, keepdims=True) if norm_topk_prob else expert_weights

    mesh = sharding.mesh(jax.devices()[:tp_size])
    axes = {"router": ("embed", "router"), "gate_up": ("experts", "embed", "expert_mlp")}
    axes["down"] = ("experts", "expert_mlp", "embed")
    params = {
        name: jax.device_put(value, sharding.named_sharding(mesh, axes[name]))
        for name, value in (("router", router), ("gate_up", gate_up), ("down", down))
    }
    assert params["down"].addressable_shards[0].data.shape[0] == config.padded_num_experts // tp_size
    with jax.set_mesh(mesh):
        found = jax.jit(lambda params, x: nnx.merge(graph, params)(x))(params, jnp.asarray(x))
    np.testing.assert_allclose(found, plainly(x, expert_weights, expert_ids, gate_up, down), atol=2e-5)


@pytest.mark.parametrize(("platform", "expected"), [("cpu", (1, 1, 32, 2)), ("gpu", (1, 4, 128, 8))])
def test_block_rows(platform: str, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert tuple(block_rows(*sizes) for sizes in ((8, 128), (128, 128), (2048 * 8, 128), (3, 2))) == expected


def test_layers_without_experts() -> None:
    text = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_hidden_layers": 6}
    assert MoeConfig.from_hf({**text, "num_experts": 0}) is None and MoeConfig.from_hf({}) is None
    assert MoeConfig.from_hf(canonical({"num_local_experts": 4, **text, "num_experts": None})) == MoeConfig.from_hf(
        text
    )
    found = MoeConfig.from_hf({**text, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert found is not None and found.dense_layers == (0, 2, 3, 4) and not found.norm_topk_prob
    assert MoeConfig.from_hf(text, norm_topk_prob=True) == MoeConfig(4, 2, 8, True, 4)
