from pathlib import Path

import numpy as np
import pytest

from mpqc.data import open_data
from mpqc.errors import DataError, OutputError
from mpqc.search import testing
from mpqc.search.base import load
from mpqc.search.cache import (
    Ledger,
    data_digest,
    default_cache,
    graph_digest,
    held,
    ledger,
)
from mpqc.search.testing import BATCH, toy_data, toy_graph, toy_problem


def test_a_ledger_remembers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.jsonl"
    first = Ledger(path)
    first["w/a\n/2"] = 0.1 + 0.2
    first.update({"b": 1e-300, "c": float("inf")})
    again = Ledger(path)
    assert dict(again) == {"w/a\n/2": 0.1 + 0.2, "b": 1e-300, "c": float("inf")}
    with pytest.raises(TypeError):
        del again["b"]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    Ledger(path).update({"a": 1.0, "b": 2.0})
    path.write_bytes(path.read_bytes()[:-3])
    again = Ledger(path)
    assert dict(again) == {"a": 1.0}
    again["b"] = 3.0
    assert dict(Ledger(path)) == {"a": 1.0, "b": 3.0}


@pytest.mark.parametrize(
    "line", [b"junk", b'["a"]', b'["a", "1"]', b'{"a": 1}', b'["a", NaN]', b"\xff"]
)
def test_a_damaged_ledger_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'["good", 1.0]\n' + line + b"\n")
    with pytest.raises(DataError, match=r"x.jsonl is damaged in line 2.*delete"):
        Ledger(path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot use the cache"):
        Ledger(tmp_path / "file" / "x.jsonl")


def test_keys_follow_everything_that_matters(tmp_path: Path) -> None:
    problem = toy_problem(cache=tmp_path)
    data = problem.data
    names: set[str] = set()

    def add(*arguments: object) -> None:
        made = ledger(*arguments)  # type: ignore[arg-type]
        made["x"] = 1.0
        names.update(path.name for path in tmp_path.iterdir())

    add(problem, data, "kind", 1)
    add(problem, data, "kind", 1)
    assert len(names) == 1
    add(problem, data, "kind", 2)
    add(problem, data, "other", 1)
    add(problem, toy_data().sample(12), "kind", 1)
    add(problem, None, "kind", 1)
    add(toy_problem(cache=tmp_path, model_sha256="1" * 64), data, "kind", 1)
    changed = toy_graph(BATCH).with_(constants={"b6": np.ones(testing.CLASSES, np.float32)})
    add(toy_problem(cache=tmp_path, graph=changed), data, "kind", 1)
    assert len(names) == 7
    add(toy_problem("size=w2a2", cache=tmp_path), data, "kind", 1)  # budgets do not matter
    assert len(names) == 7


def test_digests() -> None:
    assert graph_digest(toy_graph()) == graph_digest(toy_graph()) != graph_digest(toy_graph(2))
    x = np.zeros((BATCH, 3, 8, 8), np.float32)
    graph = toy_graph(BATCH)
    plain = data_digest(open_data({"x": x}, graph))
    labels = np.zeros(BATCH, int)
    assert len({plain, data_digest(open_data({"x": x + 1}, graph)),
                data_digest(open_data({"x": x, "labels": labels}, graph))}) == 3  # fmt: skip


@pytest.mark.parametrize("method", ["sensitivity", "hawq", "progressive"])
def test_a_new_budget_needs_no_forward_pass(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(method)(toy_problem("bitops=w3a3", cache=tmp_path))
    monkeypatch.setattr("mpqc.ort.Session", None)
    for budget in ("bitops=w4a4", "size=w2a2", "size=w4a4,bitops=0.95*w4a4"):
        load(method)(toy_problem(budget, cache=tmp_path))


def test_a_damaged_calibration_is_named(tmp_path: Path) -> None:
    load("sensitivity")(toy_problem(cache=tmp_path))
    (path,) = tmp_path.glob("calibration-*.npz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="delete it"):
        load("sensitivity")(toy_problem(cache=tmp_path))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MPQC_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("MPQC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert default_cache() == tmp_path / "user" / "mpqc"


def test_small_data_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy_data().sample(10)
    kept = held(data)
    assert kept is not data
    assert data_digest(kept) == data_digest(data)
    assert (kept.batch, kept.samples) == (data.batch, data.samples)
    assert kept.sample(4, seed=2).labels is not None
    monkeypatch.setattr("mpqc.search.cache.HELD_BYTES", 1000)
    assert held(data) is data
