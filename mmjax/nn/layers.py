"""Equal blocks run in order: traced once, whatever their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx


def shared(blocks: Sequence[nnx.Module], method: Callable[..., Any]) -> list[Callable[..., Any]]:
    """For each block a function like `method(block, *arrays)`; the blocks differ in their weights only.

    All of them are one inner jit, so that the Python of a block is traced once per program instead of once per layer
    (28 layers: a warm start in a third of the time). XLA inlines the calls, and sees what it would have seen.
    """
    graph, _ = nnx.split(blocks[0])
    run = jax.jit(lambda weights, *arrays: method(nnx.merge(graph, weights), *arrays))
    return [_bind(run, nnx.split(block)[1]) for block in blocks]


def _bind(run: Callable[..., Any], weights: Any) -> Callable[..., Any]:
    return lambda *arrays: run(weights, *arrays)
