"""A family's model on abstract arrays: traced and lowered for any platform, without weights and without a device.

Of programs that differ in widths and depth only, one is lowered: widths are what XLA is for, heads what kernels refuse.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh

from mmjax import kernels, sharding
from mmjax.batch import Batch, KVCache, nest
from mmjax.cli.bench.published_configs import PUBLISHED
from mmjax.engine.memory import kv_block_shape
from mmjax.loader.family import Family
from mmjax.loader.params import param_specs
from mmjax.spec import EncoderSpec, ModelSpec

KINDS = {"cpu": "cpu", "gpu": "NVIDIA H200", "tpu": "TPU v5 lite"}
CORES = {"cpu": None, "gpu": 132, "tpu": 1}
LOWERED = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
DTYPE = {"cpu": jnp.float32, "gpu": jnp.bfloat16, "tpu": jnp.bfloat16}
BLOCK_SIZE, TABLE, CACHE_BLOCKS = 256, 16, 32  # a large block keeps the kernels of a TPU small


def mesh(platform: str) -> AbstractMesh:
    """One device of a platform."""
    try:
        device = AbstractDevice(KINDS[platform], CORES[platform], platform)
    except TypeError:  # jax 0.10.0
        device = AbstractDevice(KINDS[platform], CORES[platform])
    return AbstractMesh((1,), (sharding.MODEL,), abstract_device=device)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, and the shapes of its arguments."""

    function: Any
    arguments: tuple[Any, ...]

    def trace(self, platform: str) -> Any:
        """Traced; `out_info` has the shapes of what it returns."""
        with jax.sharding.use_abstract_mesh(mesh(platform)):
            return jax.jit(self.function).trace(*self.arguments)

    def lower(self, platform: str) -> str:
        """The text of the program."""
        traced = self.trace(platform)
        with jax.sharding.use_abstract_mesh(mesh(platform)):
            return traced.lower(lowering_platforms=(LOWERED[platform],)).as_text()


def shallow(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config.json with one decoder layer: layers of equal structure are traced once anyway."""
    parts = {name: shallow(config[name]) for name in ("thinker_config", "text_config") if name in config}
    short = {name: 1 for name in ("num_hidden_layers", "decoder_layers") if name in config}
    return {**config, **parts, **short}


def geometry(config: Mapping[str, Any], files: Mapping[str, Any]) -> tuple[str, str]:
    """Of the decoder and of the encoders. Programs of the same geometry differ in widths and depth only."""
    family = Family.of(dict(config))
    sizes: Any = family.config.from_hf(dict(config), files, tied=False)
    decoder: tuple[Any, ...] = (sizes.spec.num_kv_heads, sizes.spec.head_dim)
    if (text := getattr(sizes, "text", None)) is not None:
        decoder += (text.q_per_kv, text.windows != (), text.partial_rope, text.moe is None)
    towers = {name: getattr(sizes, name).tower for name in ("vision", "audio") if hasattr(sizes, name)}
    heads = {name: (tower.num_heads, tower.head_dim) for name, tower in towers.items()}
    return repr(decoder), repr((family.name, heads))


@functools.cache
def first_of_geometry() -> Mapping[str, tuple[bool, bool]]:
    """By name of a published checkpoint, whether its decoder, and its encoders, are the first of their geometry."""
    seen: set[str] = set()
    out = {}
    for name, published in PUBLISHED.items():
        decoder, encoders = geometry(*published)
        out[name] = decoder not in seen, encoders not in seen
        seen |= {decoder, encoders}
    return out


def lower_published(name: str, platform: str) -> None:
    """Lower the programs of a published checkpoint whose geometry is new."""
    decoder, encoders = first_of_geometry()[name]
    if decoder or encoders:
        for _, program in programs(*PUBLISHED[name], platform, decoder=decoder, encoders=encoders):
            assert program.lower(platform)


def programs(
    config: Mapping[str, Any], files: Mapping[str, Any], platform: str, *, decoder: bool = True, encoders: bool = True
) -> Iterator[tuple[str, Program]]:
    """(name, program): prefill, decode of 8 sequences, on a GPU also of one, and each encoder."""
    family = Family.of(dict(config))
    sizes = family.config.from_hf(shallow(config), files, tied=False).for_tp(1)
    graph, specs = param_specs(family, sizes)
    spec, dtype = sizes.spec, DTYPE[platform]
    params = nest({path: jax.ShapeDtypeStruct(each.shape, dtype) for path, each in specs.items()})
    block, kv_dtype = kv_block_shape(spec, BLOCK_SIZE, jnp.dtype(dtype).name, platform)
    cache = (jax.ShapeDtypeStruct((spec.num_layers * CACHE_BLOCKS, *block), kv_dtype),) * 2
    mm_embeds = jax.ShapeDtypeStruct((1024, max(spec.mm_embed_dim, 1)), dtype)

    def step(params: Any, batch: Batch, k: Any, v: Any, mm_embeds: Any) -> Any:
        model = nnx.merge(graph, params)
        hidden, _ = model(batch, KVCache(k, v), mm_embeds)
        return model.logits(hidden)

    def encode(name: str, params: Any, features: Any) -> Any:
        return nnx.merge(graph, params).encode(name, features)

    def write(params: Any, encoded: Any, k: Any, v: Any, slots: Any) -> Any:
        return nnx.merge(graph, params).write_cross_kv(encoded, KVCache(k, v), slots).k

    steps = {"prefill": (4, kernels.q_block_size(platform)), "decode": (8, 1)}
    if platform == "gpu":
        steps["decode of one"] = (1, 1)
    for name, (count, block_len) in steps.items() if decoder else ():
        yield name, Program(step, (params, _batch(spec, count, block_len), *cache, mm_embeds))
    for name, encoder in spec.encoders.items() if encoders else ():
        yield name, Program(functools.partial(encode, name), (params, _features(encoder)))
        if spec.is_encoder_decoder:
            encoded = jax.ShapeDtypeStruct((encoder.keys_per_input, spec.hidden_size), dtype)
            yield "cross", Program(write, (params, encoded, *cache, _int32(encoder.keys_per_input)))


def _batch(spec: ModelSpec, blocks: int, block_len: int) -> Batch:
    """A batch of so many query blocks, each of a sequence of its own."""
    tokens, cross = blocks * block_len, -(-spec.cross_len // BLOCK_SIZE)
    shapes = {
        "token_ids": (tokens,), "rope_positions": (spec.rope_axes, tokens), "mm_index": (tokens,),
        "slot_mapping": (tokens,), "seq_index": (blocks,), "q_start": (blocks,), "block_table": (blocks, TABLE),
        "context_lens": (blocks,), "cross_block_table": (blocks, cross), "cross_context_lens": (blocks,),
    }  # fmt: skip
    return Batch(**{name: _int32(*shape) for name, shape in shapes.items()})


def _features(encoder: EncoderSpec) -> dict[str, Any]:
    """The fields of a few groups of inputs."""
    inputs = encoder.group_size * max(2, 64 // encoder.group_size) if encoder.group_size > 1 else 2
    count = {"inputs": inputs, "embeds": encoder.num_embeds(inputs)}
    return {
        field.name: jax.ShapeDtypeStruct((count[field.axis], *field.shape), jnp.dtype(field.dtype))
        for field in encoder.fields
    }


def _int32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
