"""A family's module by itself: a checkpoint's weights, one padded batch, no engine, no scheduler, no sampler."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from mmjax.kernels import kv_cache_dtype, kv_cache_head_dim

from mmjax import sharding
from mmjax.batch import Batch, KVCache, nest
from mmjax.inputs.input_processor import EngineInput
from mmjax.loader.checkpoint import Checkpoint
from mmjax.loader.params import load_params
from mmjax.loader.precision import Precision
from mmjax.processors.base import MediaItem
from mmjax.spec import EncoderSpec

PAGE, BLOCK = 16, 32


class Bare:
    """Runs one prompt of up to `tokens` tokens with up to `units` units of media (of each encoder, where it is a
    mapping), in `dtype` on one device. products: the dtype of the matrices and of the pool, where it is another."""

    def __init__(
        self,
        directory: Path,
        *,
        tokens: int,
        units: int | Mapping[str, int],
        dtype: str = "float32",
        products: str | None = None,
    ) -> None:
        checkpoint = Checkpoint.open(str(directory))
        mesh = sharding.mesh(jax.local_devices()[:1])
        config = checkpoint.model_config()
        self.graph, config, params = load_params(checkpoint, config, mesh, Precision(dtype, dtype, products))
        self.params = nest(params)
        self.spec = config.spec
        self.tokens, self.dtype = tokens, jnp.dtype(dtype)
        self.pool = jnp.dtype(dtype) if products is None else kv_cache_dtype(products, "cpu")
        self.units = dict.fromkeys(self.spec.encoders, units) if isinstance(units, int) else units

    def encode(self, items: Sequence[MediaItem]) -> np.ndarray:
        """Rows of all the items, one after the other: [rows, W]; for cross attention [frames, D]."""
        found: dict[int, np.ndarray] = {}
        for name, encoder in self.spec.encoders.items():
            mine = [item for item in items if item.modality in encoder.modalities]
            if mine:
                rows = np.asarray(self._encode[name](self.params, self._pack(encoder, self.units[name], mine)))
                ends = np.cumsum([item.num_inputs * encoder.keys_per_input or item.num_embeds for item in mine])
                found |= {id(item): part for item, part in zip(mine, np.split(rows, ends)[:-1], strict=True)}
        return np.concatenate([found[id(item)] for item in items])

    def _pack(self, encoder: EncoderSpec, most: int, items: Sequence[MediaItem]) -> dict[str, np.ndarray]:
        """The fields of items that one encoder takes together."""
        assert sum(item.num_inputs for item in items) <= most
        out = {}
        for field in encoder.fields:
            count = most if field.axis == "inputs" else encoder.num_embeds(most)
            packed = out[field.name] = np.full((count, *field.shape), field.pad, field.dtype)
            at = segments = inputs = 0
            for item in items:
                part = item.features[field.name]
                if field.is_segment_id:
                    part, segments = part + segments, segments + int(part.max()) + 1
                if field.index_stride:
                    part = np.where(part < 0, part, part + inputs * field.index_stride)
                packed[at : at + len(part)] = part
                at, inputs = at + len(part), inputs + item.num_inputs
        return out

    def logits(self, rendered: EngineInput) -> np.ndarray:
        """f32 [T, V] of a rendered prompt."""
        count, size = len(rendered.token_ids), self.tokens
        items = list({id(entry.item): entry.item for entry in rendered.items}.values())
        rows = self.encode(items) if items else np.zeros((0, self.spec.mm_embed_dim), self.dtype)
        slab = np.zeros((max(size, len(rows)), max(self.spec.mm_embed_dim, 1)), self.dtype)
        media = np.full(size, -1, np.int32)
        if not self.spec.is_encoder_decoder and items:
            slab[: len(rows)] = rows
            first = {
                id(item): at for item, at in zip(items, np.cumsum([0, *(i.num_embeds for i in items)]), strict=False)
            }
            for span, entry in zip(rendered.spans, rendered.items, strict=True):
                at = first[id(entry.item)] + span.embed_offset
                media[span.start : span.start + span.length] = np.arange(at, at + span.length)
        tokens, place = np.zeros(size, np.int32), np.arange(size, dtype=np.int32)
        positions = np.zeros((len(rendered.rope_positions), size), np.int32)
        tokens[:count], positions[:, :count] = rendered.token_ids, rendered.rope_positions
        start = place[::BLOCK].copy()
        start[start >= count] = -BLOCK
        pages, keys = size // PAGE, len(rows) if self.spec.is_encoder_decoder else 0
        batch = Batch(
            token_ids=jnp.asarray(tokens),
            rope_positions=jnp.asarray(positions),
            mm_index=jnp.asarray(media),
            slot_mapping=jnp.asarray(np.where(place < count, place + PAGE, -1)),  # page 0 belongs to nobody
            seq_index=jnp.zeros(size // BLOCK, jnp.int32),
            q_start=jnp.asarray(start),
            block_table=jnp.arange(1, pages + 1, dtype=jnp.int32)[None],
            context_lens=jnp.asarray([count], jnp.int32),
            cross_block_table=jnp.arange(pages + 1, pages + 1 + -(-keys // PAGE), dtype=jnp.int32)[None],
            cross_context_lens=jnp.asarray([keys], jnp.int32),
        )
        return np.asarray(self._forward(self.params, batch, slab, rows if self.spec.is_encoder_decoder else None))[
            :count
        ]

    @functools.cached_property
    def _encode(self):  # type: ignore[no-untyped-def]
        def run(name: str):  # type: ignore[no-untyped-def]
            return jax.jit(lambda params, features: nnx.merge(self.graph, params).encode(name, features))

        return {name: run(name) for name in self.spec.encoders}

    @functools.cached_property
    def _forward(self):  # type: ignore[no-untyped-def]
        spec = self.spec

        def run(params: dict[str, jax.Array], batch: Batch, slab: jax.Array, rows: jax.Array | None) -> jax.Array:
            model = nnx.merge(self.graph, params)
            count = 1 + batch.block_table.shape[1] + batch.cross_block_table.shape[1]
            size = (spec.num_layers * count, spec.num_kv_heads, PAGE, kv_cache_head_dim(spec.head_dim, "cpu"))
            pool = KVCache(jnp.zeros(size, self.pool), jnp.zeros(size, self.pool))
            if rows is not None:
                first = (1 + batch.block_table.shape[1]) * PAGE
                pool = model.write_cross_kv(rows, pool, jnp.arange(rows.shape[0], dtype=jnp.int32) + first)
            return model.logits(model(batch, pool, slab)[0])

        return jax.jit(run)
