"""The vision tower of the Qwen families: the patches of any number of images in one packed sequence, merged in squares.

It has three generations. Qwen2-VL's has layer norms and a plain feed-forward. Qwen2.5-VL's has RMS norms, a gated
feed-forward, and layers that attend within windows. Qwen3-VL's has learned positions, interpolated over the image, and
DeepStack (arXiv:2406.04334): embeddings of inner layers beside those of the last one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, UInt8

from mmjax.nn.activations import ACTIVATIONS, activation_of, gelu
from mmjax.nn.attention import encoder_attention
from mmjax.nn.encoder import EncoderConfig, EncoderLayer, Features
from mmjax.nn.norm import layer_norm, rms_norm
from mmjax.nn.rope import Rope, apply_rope
from mmjax.nn.vision.pixels import PixelNorm
from mmjax.nn.weight import weight
from mmjax.sharding import round_up

EPS = 1e-6  # of all norms; config.json does not name it
THETA = 10000.0  # of rotary positions; config.json does not name it

Carry = tuple[Float[Array, "U C"], Float[Array, "levels U C"]]  # hidden states, and those of each DeepStack layer


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    """Sizes. A patch is temporal_patch_size x patch_size x patch_size pixels; merge_size x merge_size patches become an
    embedding of output_dim numbers.

    gated: RMS norms and a gated feed-forward. full_attention_layers: the layers that attend to a whole frame while the
    others attend within windows; None if every layer attends to a whole frame. position_grid: edge of the square table
    of learned positions, 0 without one. deepstack_layers: layers whose outputs become embeddings too. bias: whether the
    patch embedding has one. merger_padding: padding of the mergers' inner width, to divide over devices.
    """

    tower: EncoderConfig
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    output_dim: int
    pixels: PixelNorm
    gated: bool = False
    full_attention_layers: tuple[int, ...] | None = None
    position_grid: int = 0
    deepstack_layers: tuple[int, ...] = ()
    bias: bool = False
    merger_padding: int = 0

    @classmethod
    def qwen2(cls, vision: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> QwenVisionConfig:
        """Qwen2-VL's, from vision_config and preprocessor_config.json."""
        mlp = int(vision["embed_dim"] * vision["mlp_ratio"])
        tower = _tower(vision, vision["embed_dim"], mlp, activation_of(vision, "hidden_act", "quick_gelu"))
        return cls(tower, *_sizes(vision), vision["hidden_size"], PixelNorm.from_hf(dict(preprocessor)))

    @classmethod
    def qwen2_5(cls, vision: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> QwenVisionConfig:
        """Qwen2.5-VL's and Qwen2.5-Omni's."""
        tower = _tower(
            vision, vision["hidden_size"], vision["intermediate_size"], activation_of(vision, "hidden_act", "silu")
        )
        full = tuple(vision["fullatt_block_indexes"])
        sizes = _sizes(vision)
        return cls(
            tower,
            *sizes,
            vision["out_hidden_size"],
            PixelNorm.from_hf(dict(preprocessor)),
            gated=True,
            full_attention_layers=full,
        )

    @classmethod
    def qwen3(cls, vision: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> QwenVisionConfig:
        """Qwen3-VL's and Qwen3-Omni's. Raises ValueError when the position table is not square."""
        act = activation_of(vision, "hidden_act", "gelu_pytorch_tanh")
        side = round(vision["num_position_embeddings"] ** 0.5)
        if side**2 != vision["num_position_embeddings"]:
            raise ValueError(f"num_position_embeddings {vision['num_position_embeddings']} is no square")
        return cls(
            _tower(vision, vision["hidden_size"], vision["intermediate_size"], act),
            *_sizes(vision),
            vision["out_hidden_size"],
            PixelNorm.from_hf(dict(preprocessor)),
            position_grid=side,
            deepstack_layers=tuple(vision["deepstack_visual_indexes"]),
            bias=True,
        )

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def mm_embed_dim(self) -> int:
        """Numbers in an embedding: the final one's and those of each DeepStack layer, side by side."""
        return self.output_dim * (1 + len(self.deepstack_layers))

    @property
    def patches_per_embed(self) -> int:
        """Patches per embedding."""
        return self.merge_size**2

    def for_tp(self, tp_size: int) -> QwenVisionConfig:
        """The same sizes, padded to divide over `tp_size` devices."""
        square = self.patches_per_embed * self.tower.hidden_size
        return dataclasses.replace(
            self, tower=self.tower.for_tp(tp_size), merger_padding=round_up(square, tp_size) - square
        )


def _tower(vision: Mapping[str, Any], width: int, mlp: int, act: str) -> EncoderConfig:
    heads = vision["num_heads"]
    return EncoderConfig(width, vision["depth"], heads, width // heads, mlp, EPS, act)


def _sizes(vision: Mapping[str, Any]) -> tuple[int, int, int]:
    return vision["patch_size"], vision["temporal_patch_size"], vision["spatial_merge_size"]


class GatedEncoderLayer(nnx.Module):
    """`EncoderLayer` with RMS norms and gated feed-forwards."""

    def __init__(self, c: EncoderConfig) -> None:
        n, d, k, h, f = c.num_layers, c.hidden_size, c.num_heads, c.head_dim, c.intermediate_size
        self.norm1 = weight(n, d, axes=("depth", "embed"))
        self.qkv = weight(n, d, 3, k, h, axes=("depth", "embed", "pair", "heads", "head_dim"))
        self.qkv_bias = weight(n, 3, k, h, axes=("depth", "pair", "heads", "head_dim"))
        self.o = weight(n, k, h, d, axes=("depth", "heads", "head_dim", "embed"))
        self.o_bias = weight(n, d, axes=("depth", "embed"))
        self.norm2 = weight(n, d, axes=("depth", "embed"))
        self.gate_up = weight(n, d, 2, f, axes=("depth", "embed", "pair", "mlp"))
        self.gate_up_bias = weight(n, 2, f, axes=("depth", "pair", "mlp"))
        self.down = weight(n, f, d, axes=("depth", "mlp", "embed"))
        self.down_bias = weight(n, d, axes=("depth", "embed"))
        self.c = c

    def __call__(
        self,
        x: Float[Array, "U C"],
        segment_ids: Int[Array, "U"],
        angles: Float32[Array, "U half_H"] | None,
        segment_len: int | None,
    ) -> Float[Array, "U C"]:
        """The layer's output. The weights must have no leading axis."""
        c = self.c
        with jax.named_scope("attn"):
            y = rms_norm(x, self.norm1[...], c.eps)
            qkv = self.qkv.einsum("ud,dpnh->upnh", y) + self.qkv_bias[...]
            q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
            if angles is not None:
                q, k = apply_rope(q, angles), apply_rope(k, angles)
            q, k, v = (part.astype(self.qkv.dtype) for part in (q, k, v))
            y = encoder_attention(q, k, v, segment_ids, scale=c.head_dim**-0.5, segment_len=segment_len).astype(x.dtype)
            x = x + self.o.einsum("unh,nhd->ud", y) + self.o_bias[...]
        with jax.named_scope("mlp"):
            y = rms_norm(x, self.norm2[...], c.eps)
            y = self.gate_up.einsum("ud,dpf->upf", y) + self.gate_up_bias[...]
            return x + self.down.einsum("uf,fd->ud", ACTIVATIONS[c.act](y[:, 0]) * y[:, 1]) + self.down_bias[...]


class PatchMerger(nnx.Module):
    """A norm and two dense layers that merge a square of patches into an embedding.

    levels: 0 for the merger of the last layer, which normalizes single patches; else the number of DeepStack mergers,
    which normalize whole squares and have stacked weights.
    """

    def __init__(self, c: QwenVisionConfig, levels: int = 0) -> None:
        width = c.tower.hidden_size
        square = c.patches_per_embed * width
        inner = square + c.merger_padding
        stack, axis = ((levels,), ("depth",)) if levels else ((), ())
        normed = square if levels else width
        self.norm = weight(*stack, normed, axes=(*axis, "embed"))
        self.norm_bias = None if c.gated else weight(*stack, normed, axes=(*axis, "embed"))
        self.fc1 = weight(*stack, square, inner, axes=(*axis, "embed", "mlp"))
        self.fc1_bias = weight(*stack, inner, axes=(*axis, "mlp"))
        self.fc2 = weight(*stack, inner, c.output_dim, axes=(*axis, "mlp", "embed"))
        self.fc2_bias = weight(*stack, c.output_dim, axes=(*axis, "embed"))
        self.square = square

    @jax.named_scope("merger")
    def __call__(self, x: Float[Array, "U C"]) -> Float[Array, "E W"]:
        """One embedding per square of patches."""
        x = x.reshape(-1, self.norm.shape[-1])
        if self.norm_bias is None:
            x = rms_norm(x, self.norm[...], EPS)
        else:
            x = layer_norm(x, self.norm[...], self.norm_bias[...], EPS)
        x = gelu(self.fc1.einsum("uc,cf->uf", x.reshape(-1, self.square)) + self.fc1_bias[...])
        return self.fc2.einsum("uf,fd->ud", x) + self.fc2_bias[...]


class QwenVisionEncoder(nnx.Module):
    """The tower, from patches to embeddings."""

    def __init__(self, c: QwenVisionConfig) -> None:
        width = c.tower.hidden_size
        self.patch = weight(c.patch_dim, width, axes=("patch", "embed"))
        self.patch_bias = weight(width, axes=("embed",)) if c.bias else None
        self.positions = weight(c.position_grid**2, width, axes=("position", "embed")) if c.position_grid else None
        self.layers = GatedEncoderLayer(c.tower) if c.gated else EncoderLayer(c.tower)
        self.merger = PatchMerger(c)
        self.deepstack_mergers = PatchMerger(c, len(c.deepstack_layers)) if c.deepstack_layers else None
        self.c = c

    def __call__(self, features: Features) -> Float[Array, "E W"]:
        """Embeddings of `patch_fields` of mmjax.processors.qwen_vl."""
        x = self._embed(features["pixels"], features.get("position_coords"))
        x, inner_states = self._run_layers(x, features)
        embeds = self.merger(x)
        if self.deepstack_mergers is not None:
            with jax.named_scope("deepstack"):
                graph, weights = nnx.split(self.deepstack_mergers)
                deepstack = jax.vmap(lambda weights, x: nnx.merge(graph, weights)(x), out_axes=1)(weights, inner_states)
                embeds = jnp.concatenate([embeds, deepstack.reshape(embeds.shape[0], -1)], axis=1)
        if self.c.full_attention_layers is not None:
            with jax.named_scope("reorder"):
                embeds = jnp.take(embeds, features["embed_order"] // self.c.patches_per_embed, axis=0, mode="clip")
        return embeds

    @jax.named_scope("patch_embed")
    def _embed(
        self, pixels: UInt8[Array, "U patch_dim"], position_coords: Float32[Array, "U 2"] | None
    ) -> Float[Array, "U C"]:
        """The patch embedding, with learned positions if the tower has them."""
        c = self.c
        x = c.pixels.normalize(pixels.reshape(-1, 3, c.temporal_patch_size * c.patch_size**2), axis=1)
        x = x.reshape(pixels.shape).astype(self.patch.dtype) @ self.patch[...]
        if self.patch_bias is not None:
            x = x + self.patch_bias[...]
        if position_coords is None:
            return x
        return x + self._interpolated_positions(position_coords).astype(x.dtype)

    def _interpolated_positions(self, coords: Float32[Array, "U 2"]) -> Float32[Array, "U C"]:
        """Bilinear interpolation between the four entries of the position table around (row, column)."""
        assert self.positions is not None
        low = jnp.floor(coords)
        fraction, corner = coords - low, low.astype(jnp.int32)
        total = jnp.zeros((), jnp.float32)
        for down in (0, 1):
            for right in (0, 1):
                row, column = ((corner + jnp.array([down, right], jnp.int32)).clip(0, self.c.position_grid - 1)).T
                corner_weight = jnp.abs(fraction - jnp.array([1 - down, 1 - right], jnp.float32)).prod(axis=1)
                entry = jnp.take(self.positions[...], row * self.c.position_grid + column, axis=0)
                total = total + corner_weight[:, None] * entry.astype(jnp.float32)
        return total

    def _angles(self, coords: Int[Array, "U 2"]) -> Float32[Array, "U half_H"]:
        """Rotary angles: the first half of the pairs rotates by the patch's row, the second by its column."""
        half = self.c.tower.head_dim // 2
        inv_freq = jnp.asarray(Rope.from_hf(half, THETA, None).inv_freq, jnp.float32)
        return (coords.astype(jnp.float32)[:, :, None] * inv_freq).reshape(-1, half)

    def _run_layers(self, x: Float[Array, "U C"], features: Features) -> Carry:
        """The output of the last layer, and of each DeepStack layer.

        Layers run in a scan, as in `Encoder`. The scan writes entry j of the second output after every layer up to
        deepstack_layers[j], so that the output of that layer remains.
        """
        c, depth, segment_ids = self.c, self.c.tower.num_layers, features["segment_ids"]
        graph, weights = nnx.split(self.layers)
        angles = self._angles(features["patch_coords"])
        is_full = jnp.array([c.full_attention_layers is None or i in c.full_attention_layers for i in range(depth)])
        level = jnp.array([sum(layer < i for layer in c.deepstack_layers) for i in range(depth)], jnp.int32)

        @jax.named_scope("layer")
        def body(carry: Carry, layer: Any) -> tuple[Carry, None]:
            (x, inner_states), (weights, is_full, level) = carry, layer
            ids = segment_ids
            if c.full_attention_layers is not None:
                ids = jnp.where(is_full, segment_ids, features["window_ids"])
            x = nnx.merge(graph, weights)(x, ids, angles, None)
            if c.deepstack_layers:
                inner_states = inner_states.at[level].set(x, mode="drop")
            return (x, inner_states), None

        inner_states = jnp.zeros((len(c.deepstack_layers), *x.shape), x.dtype)
        return jax.lax.scan(body, (x, inner_states), (weights, is_full, level))[0]
