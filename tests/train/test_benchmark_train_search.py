"""The benchmark of searches that train, on the demo model."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from benchmarks import train_search

Files = tuple[Path, Path, Path]


def test_a_table_that_a_second_run_only_reads(
    demo: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, train, test = map(str, demo)
    document = tmp_path / "results.md"
    name = f"train_search {demo[0].stem}"
    document.write_text(f"<!-- {name} -->\n<!-- end {name} -->\n")
    words = [model, "--train", train, "--test", test, "--methods", "uniform,eagl", "--budgets",
             "bitops=w3a3", "--reduced", "--samples", "180", "--batch-size", "20",
             "-o", str(tmp_path / "out"), "--markdown", str(document)]  # fmt: skip
    assert train_search.main(words) == 0
    found = json.loads((tmp_path / "out/train_search.json").read_text())
    assert found["reduced"]
    assert [point["method"] for point in found["points"]] == ["uniform", "eagl"]
    for point in found["points"]:
        assert point["cost"]["bitops"] <= point["cost"]["limit"]
        assert point["accuracy"] > 0.9
    assert "REDUCED: 180 training samples in batches of 20" in document.read_text()
    assert "| uniform | bitops=w3a3 |     1 |" in document.read_text()
    assert (tmp_path / "out/train_search.png").exists()
    again = [*words[:-4], "--plans", str(tmp_path / "out/train_search.json"), "--tune", "2"]
    again += ["--lr", "0.01", "--step-lr", "0.006", "--temperature", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(train_search, "_searched", None)
        assert train_search.main([*again, "-o", str(tmp_path / "longer")]) == 0
        assert train_search.main([*again, "-o", str(tmp_path / "o"), "--seeds", "5"]) == 2
    assert len(list((tmp_path / "longer/points").iterdir())) == 2
    longer = json.loads((tmp_path / "longer/train_search.json").read_text())["points"]
    for before, after in zip(found["points"], longer, strict=True):
        same = ("method", "budget", "seed", "widths", "cost", "before")
        assert all(before[name] == after[name] for name in same)
    monkeypatch.setattr(train_search, "measure", None)
    assert train_search.main(words) == 0
    assert json.loads((tmp_path / "out/train_search.json").read_text()) == found
    assert train_search.main([*words, "--seeds", "0,1", "--measured"]) == 0
    assert json.loads((tmp_path / "out/train_search.json").read_text())["points"] == found["points"]


def test_differences_count_pictures_once_for_all_seeds() -> None:
    """Two seeds that differ on the same picture tell no more of it than one."""

    def point(seed: int, right: list[int]) -> train_search.Point:
        bits = np.packbits(np.array(right, np.uint8)).tobytes().hex()
        share = sum(right) / len(right)
        return train_search.Point("m", "b", seed, {}, (), share, share, 0.0, 0.0, bits)

    ours = [point(0, [1, 1, 1, 1, 0, 0, 0, 0]), point(1, [1, 1, 1, 1, 0, 0, 0, 0])]
    others = [point(0, [1, 1, 0, 0, 0, 0, 0, 1]), point(1, [1, 1, 0, 0, 0, 0, 0, 1])]
    mean, error = train_search.against(ours, others)
    assert mean == pytest.approx(12.5)
    assert error == pytest.approx(100 * 3**0.5 / 8)
    assert train_search.against(ours[:1], others[:1]) == pytest.approx((mean, error))


def test_budgets_that_nothing_keeps_are_rows_too(demo: Files, tmp_path: Path) -> None:
    model, train, test = map(str, demo)
    words = [model, "--train", train, "--test", test, "--methods", "uniform", "--budgets",
             "size=1B", "--reduced", "-o", str(tmp_path)]  # fmt: skip
    assert train_search.main(words) == 0
    (point,) = json.loads((tmp_path / "train_search.json").read_text())["points"]
    assert point["accuracy"] is None
