"""Small networks and data for training tests."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mpqc.demo
from mpqc.graph import Array

NETWORK = """
%x = Input() : f32[4,3,6,6]
%w1 = Constant() : f32[8,3,3,3]
%g1 = Constant() {value=[1.0, -0.7, 0.9, 1.2, 0.5, 1.1, -1.3, 0.8]} : f32[8]
%s1 = Constant() {value=[0.1, 0.2, -0.1, 0.0, 0.3, -0.2, 0.1, 0.2]} : f32[8]
%m1 = Constant() {value=[0.0, 0.1, -0.1, 0.2, 0.0, 0.1, 0.3, -0.2]} : f32[8]
%v1 = Constant() {value=[1.0, 0.8, 1.2, 0.9, 1.1, 0.7, 1.3, 1.0]} : f32[8]
%w2 = Constant() : f32[8,1,3,3]
%b2 = Constant() {value=[0.1, -0.2, 0.05, 0.0, 0.1, 0.2, -0.1, 0.0]} : f32[8]
%w3 = Constant() : f32[8,8,1,1]
%w4 = Constant() : f32[5,8]
%b4 = Constant() {value=[0.1, 0.2, 0.0, -0.1, 0.3]} : f32[5]
%c1 = Conv(%x, %w1) {pads=[1, 1, 1, 1]} : f32[4,8,6,6] @conv1
%n1 = BatchNormalization(%c1, %g1, %s1, %m1, %v1) {epsilon=1e-05} : f32[4,8,6,6]
%r1 = Relu(%n1) : f32[4,8,6,6]
%c2 = Conv(%r1, %w2, %b2) {group=8, pads=[1, 1, 1, 1], strides=[2, 2]} : f32[4,8,3,3] @depthwise
%c3 = Conv(%c2, %w3) : f32[4,8,3,3] @pointwise
%a = Add(%c2, %c3) : f32[4,8,3,3]
%r = Relu(%a) : f32[4,8,3,3]
%p = GlobalAveragePool(%r) : f32[4,8,1,1]
%f = Flatten(%p) {axis=1} : f32[4,8]
%y = Gemm(%f, %w4, %b4) {transB=1} : f32[4,5] @classifier
return %y
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny networks gain nothing from more, and a loaded machine loses."""
    torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def demo() -> tuple[Path, Path, Path]:
    """Model, calibration data, test data."""
    model, calibration, test = mpqc.demo.files()
    return Path(model), Path(calibration), Path(test)


def pictures(count: int = 40, seed: int = 0) -> dict[str, Array]:
    """Random ones for NETWORK."""
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((count, 3, 6, 6)).astype(np.float32),
        "labels": rng.integers(0, 5, count),
    }
