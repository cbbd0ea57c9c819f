"""The benchmark of search methods: what it keeps, what it concludes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import search
from benchmarks.search import Point, checks, summary
from mpqc.demo import files

BUDGETS = ["bitops=w2a2", "bitops=w4a4"]


def point(method: str, budget: str, accuracy: float | None) -> Point:
    limit = math.nan if accuracy is None else 1e6 * (1 + BUDGETS.index(budget))
    return Point(method, budget, limit, limit, ("w4a4",), accuracy, accuracy, 0.0)


def test_a_fall_counts_beyond_two_standard_errors() -> None:
    falling = [point("a", BUDGETS[0], 0.9), point("a", BUDGETS[1], 0.8)]
    assert checks(falling, images=1000)["a"]["falls"] == [BUDGETS[1]]
    assert checks(falling, images=20)["a"]["falls"] == []


def test_methods_stand_beside_their_reverse_and_uniform() -> None:
    points = [point("a", b, 0.9) for b in BUDGETS]
    points += [point("reverse:a", b, 0.8) for b in BUDGETS]
    points += [point("uniform", BUDGETS[1], 0.95), point("uniform", BUDGETS[0], None)]
    found = checks(points, images=1000)["a"]
    assert found["mean"] == pytest.approx(0.9)
    assert found["over reverse:a"] == pytest.approx(dict.fromkeys(BUDGETS, 0.1))
    assert found["over uniform"] == pytest.approx({BUDGETS[1]: -0.05})


def test_table() -> None:
    points = [point("a", b, 0.5) for b in BUDGETS]
    points += [point("uniform", BUDGETS[0], None), point("uniform", BUDGETS[1], 0.25)]
    text = summary(points, BUDGETS, 0.75)
    assert text.startswith("float 75.0")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[-2:]]
    assert rows == [[BUDGETS[0], "1", "50.0", ""], [BUDGETS[1], "2", "50.0", "25.0"]]


def test_a_network_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = files()
    arguments = [str(demo.model), "--data", str(demo.calibration), "--test", str(demo.test),
                 "--methods", "uniform,eagl", "--budgets", "w4a4", "--images", "64",
                 "-o", str(tmp_path)]  # fmt: skip
    assert search.main(arguments) == 0
    first = json.loads((tmp_path / "search.json").read_text())
    assert first["images"] == 64
    assert [p["method"] for p in first["points"]] == ["uniform", "eagl"]
    assert all(p["accuracy"] > 0.9 for p in first["points"])
    assert "bitops=w4a4" in capsys.readouterr().out
    monkeypatch.setattr(search.Bench, "_measured", None)
    assert search.main(arguments) == 0
    assert json.loads((tmp_path / "search.json").read_text()) == first


def test_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = files()
    with np.load(demo.test) as arrays:
        np.savez(tmp_path / "bare.npz", input=arrays["input"])
    arguments = [str(demo.model), "--data", str(demo.calibration), "--test",
                 str(tmp_path / "bare.npz"), "-o", str(tmp_path)]  # fmt: skip
    assert search.main(arguments) == 2
    assert "no labels" in capsys.readouterr().err
