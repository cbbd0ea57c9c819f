import numpy as np
import pytest

from mpqc import reference
from mpqc.graph import Graph
from mpqc.passes.fold_bias import FoldBias

HEAD = """
%acc = Input() : i32[2,3]
%m = Constant() {value=[0.5, 0.1, -3.0]} : f32[3]
%zero = Constant() {value=[0.0, 0.0, 0.0]} : f32[3]
%one = Constant() {value=[1.0, 0.0, 0.0]} : f32[3]
%c = Constant() {value=[1.0, 2.0, 3.0]} : f32[3]
%row = Constant() {value=[1.0, 2.0]} : f32[2,1]
%s = Constant() {value=[4.0]} : f32[1]
"""


def test_the_added_constant_becomes_the_bias() -> None:
    before = Graph.parse(
        HEAD
        + "%y = Affine(%acc, %m, %zero) {axis=1} : f32[2,3]\n%z = Add(%c, %y) : f32[2,3]\nreturn %z"
    )
    after = FoldBias()(before)
    assert str(after).splitlines()[-2:] == [
        "%z = Affine(%acc, %m, %z.b) {axis=1} : f32[2,3] @y",
        "return %z",
    ]
    acc = np.array([[1, -2, 3], [70001, 0, -9]], np.int32)
    np.testing.assert_array_equal(
        reference.run(before, {"acc": acc})["z"], reference.run(after, {"acc": acc})["z"]
    )


def test_one_value_serves_all_channels() -> None:
    before = Graph.parse(
        HEAD
        + "%y = Affine(%acc, %m, %zero) {axis=1} : f32[2,3]\n%z = Add(%y, %s) : f32[2,3]\nreturn %z"
    )
    np.testing.assert_array_equal(FoldBias()(before).constants["z.b"], [4, 4, 4])


@pytest.mark.parametrize(
    "body",
    [
        "%y = Affine(%acc, %m, %one) {axis=1} : f32[2,3]\n%z = Add(%y, %c) : f32[2,3]\nreturn %z",
        "%y = Affine(%acc, %m, %zero) {axis=1} : f32[2,3]\n%z = Add(%y, %row) : f32[2,3]\n"
        "return %z",
        "%y = Affine(%acc, %m, %zero) {axis=1} : f32[2,3]\n%z = Add(%y, %y) : f32[2,3]\nreturn %z",
        "%y = Affine(%acc, %m, %zero) {axis=1} : f32[2,3]\n%z = Add(%y, %c) : f32[2,3]\n"
        "return %z, %y",
    ],
)
def test_leaves_alone_what_would_change(body: str) -> None:
    before = Graph.parse(HEAD + body)
    assert str(FoldBias()(before)) == str(before)
