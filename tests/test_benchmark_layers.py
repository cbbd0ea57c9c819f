import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from benchmarks import layers, network
from benchmarks.builds import Recipe
from benchmarks.layers import Convolution
from mpqc.graph import Precision
from tests.c_programs import needs

SMALL = Convolution(8, 6, 8, 3)


@pytest.mark.parametrize(
    ("layer", "macs", "out_size"),
    [
        (layers.LAYERS["3x3 64@56"], 64 * 64 * 9 * 56 * 56, 56),
        (layers.LAYERS["3x3 s2 64-128"], 64 * 128 * 9 * 28 * 28, 28),
        (layers.LAYERS["1x1 256-512@14"], 256 * 512 * 196, 14),
        (layers.LAYERS["7x7 s2 stem"], 3 * 64 * 49 * 112 * 112, 112),
    ],
)
def test_sizes(layer: Convolution, macs: int, out_size: int) -> None:
    assert (layer.macs, layer.out_size) == (macs, out_size)
    session = onnxruntime.InferenceSession(layers.network(layer, 1))
    assert session.get_outputs()[0].shape == [1, layer.out, out_size, out_size]


def test_a_longer_network_repeats_the_layer() -> None:
    session = onnxruntime.InferenceSession(layers.network(SMALL, 3))
    (result,) = session.run(None, {"x": np.ones((1, 8, 6, 6), np.float32)})
    assert result.shape == (1, 8, 6, 6)
    assert layers.network(SMALL, 3).count(b"layer") > layers.network(SMALL, 1).count(b"layer")


@pytest.mark.parametrize(
    ("kernel", "bits", "wide", "rate"),
    [
        ("bitplane and-popcount", "w1a1", False, 128),
        ("bitplane and-popcount", "w2a2", True, 341 / 4),
        ("bitplane-lut vpshufb256", "w2a2", False, 128),
        ("bitplane-lut vpshufb256-pairs", "w1a1", False, 307.2),
        ("int8 vpmaddubsw256", "w4a4", False, 64),
        ("int8 vpmaddwd256", "w8a8", False, 32),
        ("int8 unheard-of", "w8a8", False, 0),
    ],
)
def test_bounds(kernel: str, bits: str, wide: bool, rate: float) -> None:
    assert layers.bound(kernel, Precision.parse(bits), wide) == rate


def content(**seconds: Any) -> dict[str, Any]:
    row = {"layer": "3x3 64@56", "macs": 10**6, "seconds": seconds, "kernels": {"w1a1": "k v"}}
    return {"widths": ["w1a1"], "wide": False, "hertz": 1e9, "layers": [row]}


def test_ratios_are_of_the_opponent_over_ours() -> None:
    found = content(
        **{"ort-int8": {"alone": 6e-4, "inside": 4e-4}, "ort-fp32": {"alone": 1e-3, "inside": 9e-4},
           "w1a1": {"alone": 2e-4, "inside": 1e-4}}
    )  # fmt: skip
    cells = [cell.strip() for cell in layers.summary(found).splitlines()[2].split("|")[1:-1]]
    assert cells == ["3x3 64@56", "w1a1", "k v", "100", "200", "10.0", "", "", "4.00", "9.00",
                     "3.00", "5.00"]  # fmt: skip
    lines = layers.against_floors(found).splitlines()[2:]
    assert "4.00 to 4.00 (floor 5)" in lines[0]
    assert "3.00 to 3.00 (floor 5)" in lines[1]
    assert "9.00 to 9.00 (floor 10)" in lines[2]


def test_a_run_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("cc")
    once = Convolution(8, 6, 16, 1)
    monkeypatch.setattr(layers, "LAYERS", {"small": SMALL, "once": once})
    document = tmp_path / "page.md"
    document.write_text("<!-- layers x86-64-v2 -->\n<!-- end layers x86-64-v2 -->\n")
    arguments = ["--target", "x86-64-v2", "--widths", "w2a2", "--rounds", "2", "--layers",
                 "small,once", "-o", str(tmp_path), "--markdown", str(document)]  # fmt: skip
    assert layers.main(arguments) == 0
    found = json.loads((tmp_path / "layers-x86-64-v2.json").read_text())
    small, single = found["layers"]
    assert small["macs"] == 8 * 8 * 9 * 36
    assert set(small["seconds"]) == {"ort-int8", "ort-fp32", "w2a2"}
    assert all(set(times) == {"alone", "median", "inside"} for times in small["seconds"].values())
    assert "inside" not in single["seconds"]["w2a2"]
    assert "| small " in document.read_text()
    assert (
        document.read_text()
        .split("<!--")[1]
        .strip("\n")
        .endswith(capsys.readouterr().out.strip("\n").splitlines()[-1])
    )


def test_builds_are_kept_until_something_changes(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(layers.network(SMALL, 1))
    feeds = [{"x": np.ones((1, 8, 6, 6), np.float32)}]
    recipe, bits = Recipe("x86-64-v2"), Precision(2, 2)
    first = recipe.artifact(model, bits, feeds, tmp_path)
    written = (first / "model.so").stat().st_mtime_ns
    assert recipe.artifact(model, bits, feeds, tmp_path) == first
    assert (first / "model.so").stat().st_mtime_ns == written
    assert recipe.artifact(model, Precision(4, 4), feeds, tmp_path) != first
    assert Recipe("x86-64-v2", "int8").artifact(model, bits, feeds, tmp_path) != first
    model.write_bytes(layers.network(Convolution(8, 7, 8, 3), 1))
    feeds = [{"x": np.ones((1, 8, 7, 7), np.float32)}]
    assert recipe.artifact(model, bits, feeds, tmp_path) != first


def test_a_network_is_measured_on_every_number_of_threads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("cc")
    model = tmp_path / "small.onnx"
    model.write_bytes(layers.network(SMALL, 3))
    document = tmp_path / "page.md"
    document.write_text("<!-- network small x86-64-v2 -->\n<!-- end network small x86-64-v2 -->\n")
    arguments = ["--model", str(model), "--target", "x86-64-v2", "--widths", "w2a2,w8a8",
                 "--rounds", "2", "-o", str(tmp_path), "--markdown", str(document)]  # fmt: skip
    assert network.main(arguments) == 0
    found = json.loads((tmp_path / "network-small-x86-64-v2.json").read_text())
    assert set(found["threads"]) == {"1", "2"}
    assert set(found["threads"]["2"]) == {"ort-fp32", "ort-int8", "w2a2", "w8a8"}
    assert all(0 < t["best"] <= t["median"] for t in found["threads"]["1"].values())
    assert found["macs"] == 3 * SMALL.macs
    assert "| w8a8 " in document.read_text()
    assert "ms, 2 threads" in capsys.readouterr().out


def test_floors_stand_beside_what_they_are_about() -> None:
    times = {"ort-int8": 8, "ort-fp32": 16, "w1a1": 2}
    result = {
        "model": "resnet18", "ort_isa": "avx2", "widths": ["w1a1"], "macs": 10**9, "hertz": 1e9,
        "threads": {
            "1": {name: {"best": t, "median": t} for name, t in times.items()},
            "2": {name: {"best": t / 2, "median": t} for name, t in times.items()},
        },
    }  # fmt: skip
    text = network.summary(result)
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]] == [
        "w1a1", "2000.00", "2000.00", "0.5", "4.00", "3.20", "8.00", "6.00",
        "1000.00", "2.00", "4.00", "8.00",
    ]  # fmt: skip
    assert "floor" not in network.summary({**result, "ort_isa": "native"})


def test_what_cannot_be_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert network.main(["--target", "vax"]) == 2
    assert "unknown target 'vax'" in capsys.readouterr().err
