"""PyTorch's side of benchmarks/gpu.py, dry on the CPU: the same layers, nothing timed."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import gpu_torch

torch = pytest.importorskip("torch")

CONV: dict[str, Any] = {
    "name": "conv", "input": [1, 64, 14, 14], "weight": [96, 64, 3, 3], "strides": [2, 2],
    "pads": [1, 1, 1, 1], "dilations": [1, 1], "groups": 1, "macs": 7 * 7 * 96 * 64 * 9,
}  # fmt: skip
UNEVEN = {**CONV, "name": "uneven", "pads": [0, 0, 1, 1]}
GROUPED = {
    **CONV, "name": "grouped", "weight": [64, 1, 3, 3], "groups": 64, "macs": 7 * 7 * 64 * 9,
}  # fmt: skip
DENSE: dict[str, Any] = {
    "name": "dense", "input": [1, 512], "weight": [512, 1000], "strides": [], "pads": [],
    "dilations": [], "groups": 1, "macs": 512 * 1000,
}  # fmt: skip


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of what is computed instead of timed."""
    found: list[tuple[int, ...]] = []

    def timed(run: Callable[[], Any]) -> float:
        found.append(tuple(run().shape))
        return 1e-6

    monkeypatch.setattr(gpu_torch, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_torch, "timed", timed)
    return found


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (CONV, (2, 96, 7, 7)), (UNEVEN, (2, 96, 7, 7)), (GROUPED, (2, 64, 7, 7)),
        (DENSE, (2, 1000)),
    ],
)  # fmt: skip
def test_fp16_layers_are_ours(
    layer: dict[str, Any], expected: tuple[int, ...], shapes: list[tuple[int, ...]]
) -> None:
    assert gpu_torch.fp16_layer(layer, 2) == 1e-6
    assert shapes == [expected]


def test_products_of_bytes_are_as_large_as_the_layer(shapes: list[tuple[int, ...]]) -> None:
    assert gpu_torch.int_mm(CONV, 2) == 1e-6
    assert gpu_torch.int_mm(DENSE, 32) == 1e-6
    assert gpu_torch.int_mm(DENSE, 1) == 1e-6  # cuBLASLt takes no fewer rows
    assert gpu_torch.int_mm(GROUPED, 2) is None
    assert shapes == [(98, 96), (32, 1000), (17, 1000)]


def test_layers_of_a_network(shapes: list[tuple[int, ...]]) -> None:
    again = {**CONV, "name": "again"}
    found = gpu_torch.layers([CONV, again, DENSE], 1, lambda what, seconds: "dense" not in what)
    assert found["layers"].keys() == {"conv", "again"}
    assert found["layers"]["conv"]["fp16"] == 1e-6
    assert found["layers"]["conv"] == found["layers"]["again"]
    assert len(shapes) <= 3
