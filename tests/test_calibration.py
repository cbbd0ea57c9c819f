from pathlib import Path

import numpy as np
import pytest

from mpqc.calibration import Calibration, calibrate
from mpqc.data import open_data
from mpqc.errors import DataError
from mpqc.graph import Graph
from mpqc.histogram import Histogram

NET = Graph.parse(
    """
    %x = Input() : f32[2,3]
    %w = Constant() : f32[3,4]
    %y = MatMul(%x, %w) : f32[2,4]
    %r = Relu(%y) : f32[2,4]
    return %r
    """
)
X = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)


def test_watches_inputs_and_computed_values() -> None:
    seen: list[tuple[int, int | None]] = []
    made = calibrate(
        NET, open_data({"x": X}, NET), ["x", "y", "r"], progress=lambda *step: seen.append(step)
    )
    y = X @ NET.constants["w"]
    assert made.histogram("x").count == X.size
    assert made.histogram("y").low == pytest.approx(y.min(), rel=1e-6)
    assert made.histogram("r").high == pytest.approx(max(y.max(), 0), rel=1e-6)
    assert made.quantizer("r", 4).zero_point == 0
    assert made.quantizer("y", 4).zero_point > 0
    assert seen[-1] == (20, 20)
    np.testing.assert_allclose(made.mean("x"), X.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(made.mean("y"), y.mean(axis=0), rtol=1e-5)


def test_draws_the_asked_number_of_samples_by_seed() -> None:
    data = open_data({"x": X}, NET)
    first, again = (calibrate(NET, data, ["x"], 6, seed=1) for _ in range(2))
    other = calibrate(NET, data, ["x"], 6, seed=2)
    assert first.samples == 6
    assert first.histogram("x").total == again.histogram("x").total
    assert first.histogram("x").total != other.histogram("x").total


def test_loads_what_it_saved(tmp_path: Path) -> None:
    made = calibrate(NET, open_data({"x": X}, NET), ["x", "r"])
    made.save(tmp_path / "calibration.npz")
    back = Calibration.load(tmp_path / "calibration.npz")
    assert back.samples == made.samples
    for name in ("x", "r"):
        assert back.quantizer(name, 3) == made.quantizer(name, 3)
        np.testing.assert_array_equal(back.histogram(name).counts, made.histogram(name).counts)
        np.testing.assert_array_equal(back.mean(name), made.mean(name))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(DataError, match=r"c\.npz.*calibrate again"):
        Calibration.load(tmp_path / "c.npz")
    np.savez(tmp_path / "c.npz", other=np.zeros(3))
    with pytest.raises(DataError, match=r"c\.npz"):
        Calibration.load(tmp_path / "c.npz")


def test_unknown_values_are_named() -> None:
    with pytest.raises(DataError, match="not values of this model: q"):
        calibrate(NET, open_data({"x": X}, NET), ["q"])
    with pytest.raises(DataError, match="'y' was not calibrated"):
        Calibration({"x": Histogram()}, 1).quantizer("y", 4)
    with pytest.raises(DataError, match="'x' was not calibrated"):
        Calibration({"x": Histogram()}, 1).mean("x")


def test_an_overflow_of_the_model_is_named() -> None:
    data = open_data({"x": np.full((2, 3), 3e38, np.float32)}, NET)
    with pytest.raises(DataError, match="'y' is NaN or infinite"):
        calibrate(NET, data, ["y"])
