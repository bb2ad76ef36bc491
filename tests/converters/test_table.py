"""The engine behind the tables: what it claims, and the four ways it refuses."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from mmjax.converters import transforms as to
from mmjax.converters.table import (
    ClaimedTwiceError,
    ConversionError,
    EmptyHoleError,
    Rule,
    Table,
    UnclaimedTensorError,
    WrongShapeError,
    convert,
    examine,
    linear,
    optional,
    plan,
)

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass
class Held:
    """An array that counts how often it is read."""

    value: np.ndarray
    reads: int = 0
    listed: bool = True

    @property
    def dtype(self) -> np.dtype:
        return self.value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def read(self) -> np.ndarray:
        self.reads += 1
        return self.value


def held(**arrays: tuple[int, ...]) -> dict[str, Held]:
    rng = np.random.default_rng(0)
    return {
        name.replace("__", "."): Held(rng.standard_normal(shape, dtype=np.float32)) for name, shape in arrays.items()
    }


TABLE = Table(
    rules=(
        Rule("m.embed", "embed"),
        Rule("m.layers.{i}.w", "layers.{i}.w", to.transpose),
        Rule(("m.tower.{i}.a", "m.tower.{i}.b"), "tower.ab", to.fuse_gate_up, optional=True),
    ),
    ignore=(r"m\.buffer\.\d+",),
    prefixes=(("model.", "m."),),
)
SHAPES = {"embed": (5, 3), "layers.0.w": (3, 2), "layers.1.w": (3, 2), "tower.ab": (2, 3, 2, 4)}
GOOD = {
    "model__embed": (5, 3),
    "model__layers__0__w": (2, 3),
    "m__layers__1__w": (2, 3),
    "model__buffer__7": (9,),
    "m__tower__0__a": (4, 3),
    "m__tower__0__b": (4, 3),
    "m__tower__1__a": (4, 3),
    "m__tower__1__b": (4, 3),
}


def test_lists_and_stacks() -> None:
    tensors = held(**GOOD)
    values = dict(convert(tensors, TABLE, SHAPES))
    assert list(values) == list(SHAPES)
    np.testing.assert_array_equal(values["layers.1.w"], tensors["m.layers.1.w"].value.T)
    np.testing.assert_array_equal(values["tower.ab"][1, :, 0], tensors["m.tower.1.a"].value.T)
    assert plan(tensors, TABLE, SHAPES).ignored == ("model.buffer.7",)


def test_keeps_the_dtype_of_the_source() -> None:
    tensors = {name: Held(tensor.value.astype(ml_dtypes.bfloat16)) for name, tensor in held(**GOOD).items()}
    assert {value.dtype for _, value in convert(tensors, TABLE, SHAPES)} == {np.dtype(ml_dtypes.bfloat16)}


def test_half_dtypes_that_differ_meet_in_float32() -> None:
    """float16 beside bfloat16, in a fused parameter and in the layers of a stack, and a half beside float32."""
    tensors = held(**GOOD)
    half = {"m.tower.0.a": np.float16, "m.tower.1.b": np.float16, "m.layers.1.w": np.float16}
    mixed = {n: Held(t.value.astype(half.get(n, ml_dtypes.bfloat16))) for n, t in tensors.items()}
    values = dict(convert(mixed, TABLE, SHAPES))
    assert values["tower.ab"].dtype == np.float32 and values["layers.1.w"].dtype == np.float16
    np.testing.assert_array_equal(values["tower.ab"][0, :, 0], mixed["m.tower.0.a"].value.astype(np.float32).T)
    np.testing.assert_array_equal(values["tower.ab"][1, :, 0], mixed["m.tower.1.a"].value.astype(np.float32).T)
    mixed["m.tower.0.a"] = tensors["m.tower.0.a"]
    assert dict(convert(mixed, TABLE, SHAPES))["tower.ab"].dtype == np.float32


def test_an_unlisted_tensor_may_have_no_place() -> None:
    """One that no index lists fills a hole, and is ignored where there is none."""
    tensors = held(**GOOD, m__extra=(7,), m__embed=(5, 3))
    for name in ("m.extra", "m.embed", "m.layers.1.w"):
        tensors[name].listed = False
    ready = plan(tensors, TABLE, SHAPES)
    assert set(ready.ignored) == {"model.buffer.7", "m.extra", "m.embed"} and "m.layers.1.w" in ready.claimed


def test_reads_one_parameter_at_a_time() -> None:
    tensors = held(**GOOD)
    values = convert(tensors, TABLE, SHAPES)
    assert sum(tensor.reads for tensor in tensors.values()) == 0
    next(values)
    assert [name for name, tensor in tensors.items() if tensor.reads] == ["model.embed"]


def test_optional_rules_need_no_parameter() -> None:
    shorter = {**SHAPES, "tower.ab": (1, 3, 2, 4)}
    assert set(plan(held(**GOOD), TABLE, shorter).ignored) == {"model.buffer.7", "m.tower.1.a", "m.tower.1.b"}
    none = {path: shape for path, shape in SHAPES.items() if path != "tower.ab"}
    assert len(plan(held(**GOOD), TABLE, none).ignored) == 5


def without(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in GOOD.items() if name not in names}


REFUSED = [
    ("unclaimed", {**GOOD, "m__extra": (7,)}, SHAPES, UnclaimedTensorError, ["m.extra", "(7,)"]),
    (
        "no place",
        GOOD,
        {"embed": (5, 3), "layers.0.w": (3, 2), "tower.ab": (2, 3, 2, 4)},
        UnclaimedTensorError,
        ["m.layers.1.w", "layers.1.w", "(2, 3)"],
    ),
    (
        "two tensors for one place",
        {**GOOD, "m__embed": (5, 3)},
        SHAPES,
        ClaimedTwiceError,
        ["m.embed", "model.embed", "(5, 3)"],
    ),
    (
        "wrong shape",
        {**GOOD, "m__layers__1__w": (3, 2)},
        SHAPES,
        WrongShapeError,
        ["m.layers.1.w", "layers.1.w", "(3, 2)", "(2, 3)"],
    ),
    (
        "wrong shape in a stack",
        {**GOOD, "m__tower__1__b": (4, 5)},
        SHAPES,
        WrongShapeError,
        ["m.tower.1.b", "tower.ab", "(4, 5)", "(4, 3)", "(2, 3, 2, 4)"],
    ),
    ("wrong rank", GOOD, {**SHAPES, "tower.ab": (2, 9)}, WrongShapeError, ["tower.ab", "(2, 9)"]),
    ("empty parameter", without("model__embed"), SHAPES, EmptyHoleError, ["'embed'", "(5, 3)", "m.embed"]),
    ("unknown parameter", GOOD, {**SHAPES, "bias": (3,)}, EmptyHoleError, ["'bias'", "(3,)", "no rule"]),
    ("missing part", without("m__tower__1__b"), SHAPES, EmptyHoleError, ["m.tower.1.b", "tower.ab", "(2, 3, 2, 4)"]),
    (
        "missing layer",
        without("m__tower__0__a", "m__tower__0__b"),
        SHAPES,
        EmptyHoleError,
        ["tower.ab", "layer 0", "(2, 3, 2, 4)"],
    ),
]


@pytest.mark.parametrize(("why", "sources", "shapes", "kind", "words"), REFUSED)
def test_refuses_before_reading(
    why: str, sources: Shapes, shapes: Shapes, kind: type[ConversionError], words: list[str]
) -> None:
    tensors = held(**sources)
    with pytest.raises(kind) as refused:
        convert(tensors, TABLE, shapes)
    assert all(word in str(refused.value) for word in words)
    assert not any(tensor.reads for tensor in tensors.values())


def test_refuses_a_tensor_of_two_rules() -> None:
    table = Table((Rule("a.{i}", "x.{i}"), Rule("a.0", "y")))
    with pytest.raises(ClaimedTwiceError, match=r"a\.0.*\(2,\).*x\.0.*y"):
        plan(held(a__0=(2,)), table, {"x.0": (2,), "y": (2,)})


def test_refuses_two_rules_for_one_target() -> None:
    table = Table((Rule("a", "x"), Rule("b", "x")))
    with pytest.raises(ClaimedTwiceError, match="'a' and 'b'"):
        plan(held(a=(2,), b=(2,)), table, {"x": (2,)})
    stacked = Table((Rule("a.{i}", "x"), Rule("b.{i}", "x")))
    with pytest.raises(ClaimedTwiceError, match="same layer"):
        plan(held(a__0=(2,), b__0=(2,)), stacked, {"x": (1, 2)})


def test_numbers_are_plain_numbers() -> None:
    for name in ("m.layers.00.w", "m.layers.-1.w", "m.layers.x.w", "m.layers.0.0.w", "m.layers..w"):
        problems = examine({name: Held(np.zeros((2, 3)))}, TABLE, {}).problems
        assert "no rule" in str(problems[0])


def test_examine_collects_and_plan_counts_problems() -> None:
    tensors = held(**{**GOOD, "one": (1,), "two": (1,)})
    assert len(examine(tensors, TABLE, SHAPES).problems) == 2
    with pytest.raises(UnclaimedTensorError, match="1 more"):
        plan(tensors, TABLE, SHAPES)


def test_helpers_name_the_bias() -> None:
    assert [rule.target for rule in optional(*linear("a.{i}.fc", "b.fc"))] == ["b.fc", "b.fc_bias"]
    assert all(rule.optional and rule.stacked for rule in optional(*linear("a.{i}.fc", "b.fc")))
