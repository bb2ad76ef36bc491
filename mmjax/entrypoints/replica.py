"""One replica of a model on a mesh: its sizes, its programs, its weights. The mesh may be of devices that this machine
does not have; then there are programs, but no weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mmjax import sharding
from mmjax.config import EngineArgs
from mmjax.engine.layouts import lay_out
from mmjax.engine.measured import Measured
from mmjax.engine.memory import Device, EngineMemory
from mmjax.engine.model_runner import ModelRunner
from mmjax.loader.checkpoint import Checkpoint
from mmjax.loader.params import ProgressBar, abstract_params, load_params, param_specs
from mmjax.loader.precision import Precision
from mmjax.models.base import Config
from mmjax.spec import ModelSpec

if TYPE_CHECKING:
    import jax

    from mmjax.distributed.hosts import Hosts

MEASURED_CACHE_BYTES = 1 << 30  # of the KV cache while programs are measured; they take no more with a larger one


@dataclasses.dataclass(frozen=True)
class Replica:
    """args, checkpoint: of the model. mesh: of the replica's devices. limits: most items of a modality in a prompt."""

    args: EngineArgs
    checkpoint: Checkpoint
    mesh: jax.sharding.Mesh
    limits: Mapping[str, int]

    @functools.cached_property
    def platform(self) -> str:
        platform = self.mesh.devices.flat[0].platform
        return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)

    @functools.cached_property
    def precision(self) -> Precision:
        return Precision.of(self.args.dtype, self.checkpoint.config, self.platform)

    @functools.cached_property
    def config(self) -> Config:
        """The model's configuration, for one device."""
        config = self.checkpoint.model_config(dummy=self._is_dummy, headless=self.args.pooling)
        if self.args.pooling and config.spec.is_encoder_decoder:
            raise ValueError("runner 'pooling' is for decoder-only models, not for encoder-decoder models")
        return config

    @functools.cached_property
    def encoders(self) -> frozenset[str]:
        """The encoders that requests may use."""
        return frozenset(
            name
            for name, encoder in self.config.spec.encoders.items()
            if any(self.limits.get(modality, 0) for modality in encoder.modalities)
        )

    @functools.cached_property
    def padded(self) -> Config:
        """The configuration, padded for the mesh."""
        return self.config.for_tp(sharding.tp_size(self.mesh))

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """The model's spec, with only the encoders that requests may use."""
        spec, args, encoders = self.padded.spec, self.args, self.encoders
        mm_embed_dim = spec.mm_embed_dim if encoders or args.enable_mm_embeds else 0
        if args.enable_prompt_embeds and not spec.is_encoder_decoder:
            mm_embed_dim = spec.mm_embed_dim or spec.hidden_size
        return dataclasses.replace(
            spec,
            encoders={name: encoder for name, encoder in spec.encoders.items() if name in encoders},
            mm_embed_dim=mm_embed_dim,
            pooling=args.pooling,
        )

    @property
    def _is_dummy(self) -> bool:
        return self.args.load_format == "dummy"

    @property
    def _options(self) -> dict[str, Any]:
        """Of `load_params` and `abstract_params`."""
        return {
            "int8": self.args.quantization == "int8",
            "text_only": not self.encoders and not self.config.spec.is_encoder_decoder,
        }

    @functools.cached_property
    def abstract_params(self) -> dict[str, Any]:
        """The shapes of the parameters."""
        return dict(abstract_params(self.checkpoint, self.config, self.mesh, self.precision, **self._options)[2])

    def load(self, progress: ProgressBar) -> dict[str, Any]:
        """The parameters, on the devices."""
        seed = self.args.seed if self._is_dummy else None
        _, _, params = load_params(
            self.checkpoint,
            self.config,
            self.mesh,
            self.precision,
            dummy_seed=seed,
            progress=progress,
            **self._options,
        )
        return dict(params)

    def memory(self, device: Device, measured: Measured | None = None) -> EngineMemory:
        """Sizes that fit into the memory of `device`; see `EngineMemory.plan`."""
        return EngineMemory.plan(
            self.args,
            self.spec,
            self.platform,
            kv_dtype=self.precision.kv_dtype,
            tp_size=sharding.tp_size(self.mesh),
            device=device,
            measured=measured,
        )

    def runner(
        self,
        params: Mapping[str, Any],
        memory: EngineMemory,
        measured: Measured | None = None,
        make: Callable[..., ModelRunner] = ModelRunner,
    ) -> ModelRunner:
        """The runner of these parameters, or of their shapes. Its programs are not compiled yet."""
        # the rotary frequencies of some models depend on max_model_len
        graph, _ = param_specs(self.checkpoint.family, self.padded.for_max_len(memory.max_model_len))
        layouts = measured.layouts if measured else ()
        return make(
            graph, params, self.spec, memory, self.mesh, self.precision, platform=self.platform, layouts=layouts
        )

    @property
    def is_measured(self) -> bool:
        """Whether the sizes are taken from compiled programs. On a CPU they are not, since its memory is shared; nor
        if programs are to be compiled only when they are used."""
        automatic = self.args.kv_cache_memory_bytes is None or self.platform == "tpu"
        return self.platform != "cpu" and automatic and not self.args.enforce_eager

    def measure(self, device: Device) -> tuple[Measured, ModelRunner]:
        """What the programs need, and an abstract runner that has compiled them, if no earlier start has. On a TPU the
        compiler also chooses the layouts of the weights."""
        memory = self.memory(device)
        blocks = max(MEASURED_CACHE_BYTES // self.block_bytes, memory.buckets.max_blocks_per_seq + 1)
        # independent of what is free at this moment, so that the next start finds the result
        memory = dataclasses.replace(memory, num_blocks=blocks)
        runner = self.runner(self.abstract_params, memory)
        cache = runner.program_cache
        known = cache and cache.read_measured("replica")
        if known:
            return known, self.runner(self.abstract_params, memory, known)
        if self.platform == "tpu":
            runner.choose_layouts()
        measured = runner.measure()
        if cache:
            cache.write_measured("replica", measured)
        return measured, runner

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of the KV cache over all layers, on one device."""
        return EngineMemory.block_bytes(
            self.args, self.spec, self.platform, kv_dtype=self.precision.kv_dtype, tp_size=sharding.tp_size(self.mesh)
        )

    def build(self, progress: ProgressBar, hosts: Hosts | None = None) -> tuple[ModelRunner, EngineMemory]:
        """The runner with its weights on the devices, and its sizes. Programs that serve requests are not compiled
        yet. hosts: those that the mesh spans."""
        device: Device = self.mesh.local_devices[0]
        measured = self.measure(device)[0] if self.is_measured else None
        params = self.load(progress)
        if measured:
            lay_out(params, measured.layouts)
        memory = self.memory(device if hosts is None else hosts.least_memory(device), measured)
        if hosts is None:
            return self.runner(params, memory, measured), memory
        runner = self.runner(params, memory, measured, hosts.make_runner)
        hosts.check_same(self.args, runner, memory)
        return runner, memory
