"""A family's model without the engine: the weights of a checkpoint and one padded batch."""

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

BLOCK_SIZE, Q_BLOCK_SIZE = 16, 32


class Bare:
    """Runs one prompt of up to `tokens` tokens and media of up to `num_inputs` encoder inputs (by encoder, if it is a
    mapping), in `dtype` on one device. products: the dtype of the matrices and of the cache, where it is another."""

    def __init__(
        self,
        directory: Path,
        *,
        tokens: int,
        num_inputs: int | Mapping[str, int],
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
        self.cache_dtype = jnp.dtype(dtype) if products is None else kv_cache_dtype(products, "cpu")
        self.num_inputs = dict.fromkeys(self.spec.encoders, num_inputs) if isinstance(num_inputs, int) else num_inputs

    def encode(self, items: Sequence[MediaItem]) -> np.ndarray:
        """Embeddings of all items, end to end: [E, W]; for cross attention hidden states [steps, D]."""
        found: dict[int, np.ndarray] = {}
        for name, encoder in self.spec.encoders.items():
            mine = [item for item in items if item.modality in encoder.modalities]
            if mine:
                embeds = np.asarray(self._encode[name](self.params, self._pack(encoder, self.num_inputs[name], mine)))
                ends = np.cumsum([item.num_inputs * encoder.keys_per_input or item.num_embeds for item in mine])
                found |= {id(item): part for item, part in zip(mine, np.split(embeds, ends)[:-1], strict=True)}
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
        """float32 [T, V] of a processed prompt."""
        count, size = len(rendered.token_ids), self.tokens
        items = list({id(entry.item): entry.item for entry in rendered.items}.values())
        embeds = self.encode(items) if items else np.zeros((0, self.spec.mm_embed_dim), self.dtype)
        mm_embeds = np.zeros((max(size, len(embeds)), max(self.spec.mm_embed_dim, 1)), self.dtype)
        media = np.full(size, -1, np.int32)
        if not self.spec.is_encoder_decoder and items:
            mm_embeds[: len(embeds)] = embeds
            first = {
                id(item): at for item, at in zip(items, np.cumsum([0, *(i.num_embeds for i in items)]), strict=False)
            }
            for span, entry in zip(rendered.spans, rendered.items, strict=True):
                at = first[id(entry.item)] + span.embed_offset
                media[span.start : span.start + span.length] = np.arange(at, at + span.length)
        tokens, positions = np.zeros(size, np.int32), np.arange(size, dtype=np.int32)
        rope_positions = np.zeros((len(rendered.rope_positions), size), np.int32)
        tokens[:count], rope_positions[:, :count] = rendered.token_ids, rendered.rope_positions
        start = positions[::Q_BLOCK_SIZE].copy()
        start[start >= count] = -Q_BLOCK_SIZE
        blocks, keys = size // BLOCK_SIZE, len(embeds) if self.spec.is_encoder_decoder else 0
        # By device_put: ops of jax.numpy, jnp.asarray too, would each compile a program for every shape.
        arrays = {
            "token_ids": tokens,
            "rope_positions": rope_positions,
            "mm_index": media,
            "slot_mapping": np.where(positions < count, positions + BLOCK_SIZE, -1),  # no sequence has block 0
            "seq_index": np.zeros(size // Q_BLOCK_SIZE, np.int32),
            "q_start": start,
            "block_table": np.arange(1, blocks + 1, dtype=np.int32)[None],
            "context_lens": np.array([count], np.int32),
            "cross_block_table": np.arange(blocks + 1, blocks + 1 + -(-keys // BLOCK_SIZE), dtype=np.int32)[None],
            "cross_context_lens": np.array([keys], np.int32),
        }
        batch = Batch(**jax.device_put(arrays))
        return np.asarray(
            self._forward(self.params, batch, mm_embeds, embeds if self.spec.is_encoder_decoder else None)
        )[:count]

    @functools.cached_property
    def _encode(self):  # type: ignore[no-untyped-def]
        def run(name: str):  # type: ignore[no-untyped-def]
            return jax.jit(lambda params, features: nnx.merge(self.graph, params).encode(name, features))

        return {name: run(name) for name in self.spec.encoders}

    @functools.cached_property
    def _forward(self):  # type: ignore[no-untyped-def]
        spec = self.spec

        def run(
            params: dict[str, jax.Array], batch: Batch, mm_embeds: jax.Array, embeds: jax.Array | None
        ) -> jax.Array:
            model = nnx.merge(self.graph, params)
            count = 1 + batch.block_table.shape[1] + batch.cross_block_table.shape[1]
            size = (spec.num_layers * count, spec.num_kv_heads, BLOCK_SIZE, kv_cache_head_dim(spec.head_dim, "cpu"))
            cache = KVCache(jnp.zeros(size, self.cache_dtype), jnp.zeros(size, self.cache_dtype))
            if embeds is not None:
                first = (1 + batch.block_table.shape[1]) * BLOCK_SIZE
                cache = model.write_cross_kv(embeds, cache, jnp.arange(embeds.shape[0], dtype=jnp.int32) + first)
            return model.logits(model(batch, cache, mm_embeds)[0])

        return jax.jit(run)
