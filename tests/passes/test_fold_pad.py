import numpy as np
import pytest

from mpqc.graph import Graph
from mpqc.passes.fold_pad import FoldPad
from mpqc.reference import run

BEFORE = """
%x = Input() : f32[1,2,5,5]
%pads = Constant() {value=[0, 0, 0, 1, 0, 0, 1, 2]} : i64[8]
%w = Constant() : f32[3,2,3,3]
%p = Pad(%x, %pads) : f32[1,2,6,8]
%y = Conv(%p, %w) {pads=[0, 1, 0, 0], strides=[2, 2]} : f32[1,3,2,4] @conv
return %y
"""

AFTER = """
%x = Input() : f32[1,2,5,5]
%w = Constant() : f32[3,2,3,3]
%y = Conv(%x, %w) {pads=[0, 2, 1, 2], strides=[2, 2]} : f32[1,3,2,4] @conv
return %y
"""


def test_the_convolution_pads_by_itself() -> None:
    before = Graph.parse(BEFORE)
    after = FoldPad()(before)
    assert str(after) == AFTER.strip()
    x = np.random.default_rng(0).normal(size=(1, 2, 5, 5)).astype(np.float32)
    np.testing.assert_allclose(
        run(after, {"x": x})["y"], run(before, {"x": x})["y"], rtol=1e-5, atol=1e-5
    )


def test_a_pad_with_other_readers_stays_for_them() -> None:
    after = FoldPad()(Graph.parse(BEFORE.replace("return %y", "return %y, %p")))
    assert after["conv"].inputs == ("x", "w")
    assert after["p"].op == "Pad"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[0, 0, 0, 1, 0, 0, 1, 2]", "[0, 0, 0, 4, 0, 0, 1, -1]"),  # cuts
        ("[0, 0, 0, 1, 0, 0, 1, 2]", "[0, 1, 0, 1, 0, -1, 1, 2]"),  # moves channels
        ("Pad(%x, %pads)", 'Pad(%x, %pads) {mode="reflect"}'),
        ("Pad(%x, %pads)", "Pad(%x, %pads, %x)"),  # a value that is not constant
        ("pads=[0, 1, 0, 0], strides", 'auto_pad="SAME_UPPER", strides'),
    ],
)
def test_other_pads_stay(old: str, new: str) -> None:
    graph = Graph.parse(BEFORE.replace(old, new))
    assert str(FoldPad()(graph)) == str(graph)


def test_a_pad_with_another_value_stays() -> None:
    text = BEFORE.replace("(%x, %pads)", "(%x, %pads, %one)").replace(
        "%w = ", "%one = Constant() {value=[1.0]} : f32[]\n%w = "
    )
    assert "p" in FoldPad()(Graph.parse(text))


def test_axes_may_be_named() -> None:
    text = BEFORE.replace("(%x, %pads)", "(%x, %pads, _, %axes)").replace(
        "%w = ", "%axes = Constant() {value=[-1, 2]} : i64[2]\n%w = "
    ).replace("[0, 0, 0, 1, 0, 0, 1, 2]} : i64[8]", "[1, 0, 2, 1]} : i64[4]")  # fmt: skip
    assert str(FoldPad()(Graph.parse(text))) == AFTER.strip()
