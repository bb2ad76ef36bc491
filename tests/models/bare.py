"""A family's module by itself: a checkpoint's weights, one padded batch, no engine, no scheduler, no sampler."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from mmjax.kernels import pool_dtype, pool_head_dim

from mmjax import sharding
from mmjax.batch import Batch, Pool, nest
from mmjax.load import Checkpoint, load_params
from mmjax.models.family import Encoder
from mmjax.processors.base import Item
from mmjax.render import Rendered

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
        self.graph, config, params = load_params(checkpoint, config, mesh, dtype, dtype, matrices=products)
        self.params = nest(params)
        self.shape = config.shape
        self.tokens, self.dtype = tokens, jnp.dtype(dtype)
        self.pool = jnp.dtype(dtype) if products is None else pool_dtype(products, "cpu")
        self.units = dict.fromkeys(self.shape.encoders, units) if isinstance(units, int) else units

    def encode(self, items: Sequence[Item]) -> np.ndarray:
        """Rows of all the items, one after the other: [rows, W]; for cross attention [frames, D]."""
        found: dict[int, np.ndarray] = {}
        for name, encoder in self.shape.encoders.items():
            mine = [item for item in items if item.kind in encoder.kinds]
            if mine:
                rows = np.asarray(self._encode[name](self.params, self._pack(encoder, self.units[name], mine)))
                ends = np.cumsum([item.units * encoder.keys or item.rows for item in mine])
                found |= {id(item): part for item, part in zip(mine, np.split(rows, ends)[:-1], strict=True)}
        return np.concatenate([found[id(item)] for item in items])

    def _pack(self, encoder: Encoder, most: int, items: Sequence[Item]) -> dict[str, np.ndarray]:
        """Features and picks of items that one encoder takes together."""
        assert sum(item.units for item in items) <= most
        out = {}
        for count, fields in ((most, encoder.features), (encoder.rows_of(most), encoder.picks)):
            for field, (tail, dtype, fill) in fields.items():
                out[field] = np.full((count, *tail), fill, dtype)
                at = segments = units = 0
                for item in items:
                    part = item.features[field]
                    if field in encoder.numbered:
                        part, segments = part + segments, segments + int(part.max()) + 1
                    if field in encoder.based:
                        part = np.where(part < 0, part, part + units * encoder.based[field])
                    out[field][at : at + len(part)] = part
                    at, units = at + len(part), units + item.units
        return out

    def logits(self, rendered: Rendered) -> np.ndarray:
        """f32 [T, V] of a rendered prompt."""
        count, size = len(rendered.tokens), self.tokens
        items = list({id(entry.item): entry.item for entry in rendered.items}.values())
        rows = self.encode(items) if items else np.zeros((0, self.shape.slab_width), self.dtype)
        slab = np.zeros((max(size, len(rows)), max(self.shape.slab_width, 1)), self.dtype)
        media = np.full(size, -1, np.int32)
        if not self.shape.cross and items:
            slab[: len(rows)] = rows
            first = {id(item): at for item, at in zip(items, np.cumsum([0, *(i.rows for i in items)]), strict=False)}
            for span, entry in zip(rendered.spans, rendered.items, strict=True):
                at = first[id(entry.item)] + span.first
                media[span.start : span.start + span.length] = np.arange(at, at + span.length)
        tokens, place = np.zeros(size, np.int32), np.arange(size, dtype=np.int32)
        positions = np.zeros((len(rendered.positions), size), np.int32)
        tokens[:count], positions[:, :count] = rendered.tokens, rendered.positions
        start = place[::BLOCK].copy()
        start[start >= count] = -BLOCK
        pages, keys = size // PAGE, len(rows) if self.shape.cross else 0
        batch = Batch(
            tokens=jnp.asarray(tokens),
            positions=jnp.asarray(positions),
            media=jnp.asarray(media),
            slot=jnp.asarray(np.where(place < count, place + PAGE, -1)),  # page 0 belongs to nobody
            owner=jnp.zeros(size // BLOCK, jnp.int32),
            start=jnp.asarray(start),
            pages=jnp.arange(1, pages + 1, dtype=jnp.int32)[None],
            length=jnp.asarray([count], jnp.int32),
            cross_pages=jnp.arange(pages + 1, pages + 1 + -(-keys // PAGE), dtype=jnp.int32)[None],
            cross_length=jnp.asarray([keys], jnp.int32),
        )
        return np.asarray(self._forward(self.params, batch, slab, rows if self.shape.cross else None))[:count]

    @functools.cached_property
    def _encode(self):  # type: ignore[no-untyped-def]
        def run(name: str):  # type: ignore[no-untyped-def]
            return jax.jit(lambda params, features: nnx.merge(self.graph, params).encode(name, features))

        return {name: run(name) for name in self.shape.encoders}

    @functools.cached_property
    def _forward(self):  # type: ignore[no-untyped-def]
        shape = self.shape

        def run(params: dict[str, jax.Array], batch: Batch, slab: jax.Array, rows: jax.Array | None) -> jax.Array:
            model = nnx.merge(self.graph, params)
            count = 1 + batch.pages.shape[1] + batch.cross_pages.shape[1]
            size = (shape.layers * count, shape.kv_heads, PAGE, pool_head_dim(shape.head_dim, "cpu"))
            pool = Pool(jnp.zeros(size, self.pool), jnp.zeros(size, self.pool))
            if rows is not None:
                first = (1 + batch.pages.shape[1]) * PAGE
                pool = model.cross(rows, pool, jnp.arange(rows.shape[0], dtype=jnp.int32) + first)
            return model.logits(model(batch, pool, slab)[0])

        return jax.jit(run)
