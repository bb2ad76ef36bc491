"""Gradients of a step, on a GPU by replaying what was recorded.

A step of a small batch is some two thousand kernels, which take Python several times as long to launch as the GPU to
run. So a step of a shape that has come before is recorded as a CUDA graph, and replayed from then on.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from batches import Form
from forward import Tensors

FIRST = 2  # steps of a shape before it is recorded: libraries make their plans in them

Key = tuple[Form, tuple[tuple[str, torch.Size], ...]]
Run = Callable[[Form, Tensors], torch.Tensor]


class Recording:
    """One recorded step: the tensors that it reads, and its result, which the next replay of any overwrites."""

    def __init__(self, run: Run, form: Form, given: Tensors, pool: Any) -> None:
        self.given = {name: tensor.clone() for name, tensor in given.items()}
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=torch.cuda.current_stream()):
            self.out = run(form, self.given)

    def replay(self, given: Tensors) -> torch.Tensor:
        for name, tensor in self.given.items():
            tensor.copy_(given[name])
        self.graph.replay()
        return self.out


class Replay:
    """Calls `run(form, given)`, which must add gradients to tensors that stay where they are, and returns its result
    (to be read before the next call). On a GPU the current stream must not be the default one, and `run` must use
    nothing that may be gone later, as cuFFT's plans are: PyTorch keeps 4096 of them."""

    def __init__(self, run: Run, gpu: bool) -> None:
        self.run = run
        self.pool = torch.cuda.graph_pool_handle() if gpu else None
        self.met: collections.Counter[Key] = collections.Counter()
        self.recordings: dict[Key, Recording] = {}

    def __call__(self, form: Form, given: Tensors) -> torch.Tensor:
        key = form, tuple((name, tensor.shape) for name, tensor in given.items())
        if (recording := self.recordings.get(key)) is None:
            if self.pool is None or self.met[key] < FIRST:
                self.met[key] += 1
                return self.run(form, given)
            recording = self.recordings[key] = Recording(self.run, form, given, self.pool)
        return recording.replay(given)
