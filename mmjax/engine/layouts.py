"""How the arrays of the parameters are laid out in memory: by default, or as the compiler chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from mmjax.engine.measured import Layouts

T = TypeVar("T")


def with_layouts(params: T, layouts: Layouts) -> T:
    """Shapes of parameters, with these layouts of their arrays. (): all stay as they are."""
    leaves = jax.tree.leaves(params)
    shaped = [
        leaf if layout is None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_format(leaf, layout))
        for leaf, layout in zip(leaves, layouts or [None] * len(leaves), strict=True)
    ]
    out: T = jax.tree.unflatten(jax.tree.structure(params), shaped)
    return out


def layouts_of(params: Any) -> Layouts:
    """The layouts of shapes of parameters; None: by default."""
    layouts = [leaf.format.layout for leaf in jax.tree.leaves(params)]
    return tuple(layout and (layout.major_to_minor, layout.tiling) for layout in layouts)


def placement(shape: jax.ShapeDtypeStruct, device: jax.Device | None = None) -> Any:
    """The sharding of a shape, with its layout if it has one. device: of the device's part of it."""
    target = shape.sharding if device is None else SingleDeviceSharding(device)
    layout = shape.format.layout
    return target if layout is None else Format(layout, target)


def lay_out(params: dict[str, Any], layouts: Layouts) -> None:
    """Lay out the arrays of the parameters, one at a time, in place."""
    chosen = iter(layouts)

    def move(array: jax.Array) -> jax.Array:
        layout = next(chosen)
        return array if layout is None else jax.device_put(array, _format(array, layout), donate=True)

    for path in params if layouts else ():
        params[path] = jax.tree.map(move, params[path])


def freed(args: tuple[Any, ...], free: Sequence[bool]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(arguments, their shardings) for a program whose first argument is the parameters, of which the compiler chooses
    the layouts of the arrays that are `free`."""
    tree = jax.tree.structure(args[0])
    pairs = list(zip(jax.tree.leaves(args[0]), free, strict=True))
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_free else leaf for leaf, is_free in pairs]
    formats = [Format(Layout.AUTO, leaf.sharding) if is_free else placement(leaf) for leaf, is_free in pairs]
    rest = jax.tree.map(lambda x: x.sharding, args[1:])
    return (jax.tree.unflatten(tree, shapes), *args[1:]), (jax.tree.unflatten(tree, formats), *rest)


def chosen_layouts(compiled: jax.stages.Compiled, before: Layouts) -> Layouts:
    """The layouts that the compiler chose for the parameters, the first argument of a program; `before` where it does
    not use them."""
    formats = jax.tree.leaves(compiled.input_formats[0][0], is_leaf=lambda x: x is None or isinstance(x, Format))
    return tuple(
        old if old is not None or new is None or new.layout is None else (new.layout.major_to_minor, new.layout.tiling)
        for old, new in zip(before, formats, strict=True)
    )


def _format(x: Any, layout: tuple[Any, Any]) -> Format:
    order, tiling = layout
    return Format(Layout(tuple(order), tuple(map(tuple, tiling))), x.sharding)
