import builtins
import csv
from pathlib import Path
from typing import Any

import pytest

from mpqc.errors import EnvironmentLacks, OutputError
from mpqc.graph import Precision
from mpqc.search.scores import Scores

SCORES = Scores(
    {
        "a": {Precision(2, 2): 0.3, Precision(4, 4): 1e-5},
        "b": {Precision(2, 2): -1.5, Precision(8, 8): -3.0},
    },
    "loss",
)


def test_gain() -> None:
    assert SCORES.gain("b", Precision(8, 8)) == 1.5
    assert SCORES.gain("a", Precision(2, 2)) == 0


def test_csv(tmp_path: Path) -> None:
    SCORES.save_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[:2] == [["layer", "weight_bits", "activation_bits", "loss"], ["a", "2", "2", "0.3"]]
    assert [float(row[3]) for row in rows[1:]] == [0.3, 1e-5, -1.5, -3.0]
    with pytest.raises(OutputError):
        SCORES.save_csv(tmp_path / "none" / "t.csv")


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    SCORES.save_png(tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    flat = Scores({"a": {Precision(2, 2): 0.0}}, "loss")
    flat.save_png(tmp_path / "flat.png")
    with pytest.raises(OutputError):
        SCORES.save_png(tmp_path / "none" / "t.png")


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentLacks, match=r"mpqc\[report\]"):
        SCORES.save_png(tmp_path / "t.png")
