"""Trials in processes and on a Dask cluster: all arrive, whoever dies."""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mpqc import parallel
from mpqc.errors import EnvironmentLacks, UsageError
from mpqc.search import load
from mpqc.search.cache import Ledger
from mpqc.search.testing import toy_problem


@dataclass(frozen=True)
class Base:
    """What trials share."""

    offset: int
    folder: str = ""


def add(base: Base, item: int) -> int:
    return base.offset + item


def lock(base: Any, item: int) -> int:
    return item


def die_once(base: Base, item: int) -> tuple[int, int]:
    """The first process that gets item 3 is killed while it works."""
    if item == 3:
        try:
            Path(base.folder, "died").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    Path(base.folder, f"{item}-{os.getpid()}").touch()
    return item * item, os.getpid()


def test_one_job_is_this_process() -> None:
    assert list(parallel.each(lock, threading.Lock(), [4, 5])) == [(0, 4), (1, 5)]
    assert list(parallel.each(add, Base(1), [])) == []


def test_processes() -> None:
    with parallel.using(jobs=2):
        assert parallel.jobs_here() == 2
        assert sorted(parallel.each(add, Base(10), range(6))) == [(n, 10 + n) for n in range(6)]
        with pytest.raises(UsageError, match="one job"):
            list(parallel.each(lock, threading.Lock(), [4, 5]))
    assert parallel.jobs_here() == 1


def test_rounds_where_the_backend_has_no_generators() -> None:
    from joblib import parallel_config

    with parallel_config("multiprocessing", n_jobs=2):
        assert sorted(parallel.each(add, Base(10), range(5))) == [(n, 10 + n) for n in range(5)]


def test_a_killed_process_loses_only_its_own_trial(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"

    def run() -> None:
        known = Ledger(path)
        missing = [n for n in range(6) if str(n) not in known]
        with parallel.using("loky", 2):
            for number, (value, _) in parallel.each(die_once, Base(0, str(tmp_path)), missing):
                known[str(missing[number])] = value

    with pytest.raises(parallel.WorkerDied, match="same command again"):
        run()
    before = dict(Ledger(path))
    assert "3" not in before
    run()
    assert dict(Ledger(path)) == {str(n): n * n for n in range(6)}
    assert before.items() <= dict(Ledger(path)).items()


def test_what_cannot_work_is_said() -> None:
    with pytest.raises(UsageError, match="loky"), parallel.using("slurm"):
        pass
    with pytest.raises(UsageError, match="at least 1"), parallel.using(jobs=0):
        pass


@pytest.mark.parametrize("package", ["dask", "ray"])
def test_a_missing_backend_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("distributed", "ray.util.joblib"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentLacks, match="pip install"), parallel.using(package):
        pass


@pytest.mark.parametrize("rounding", ["nearest", pytest.param("gptq", marks=pytest.mark.slow)])
def test_sensitivity_is_the_same_on_two_processes(rounding: str) -> None:
    method = load("sensitivity", {"rounding": rounding, "samples": "10"})
    alone = method.scores(toy_problem())  # type: ignore[attr-defined]
    with parallel.using("loky", 2):
        together = method.scores(toy_problem())  # type: ignore[attr-defined]
    for name, row in alone.losses.items():
        assert together.losses[name] == pytest.approx(row, rel=1e-3)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two workers on this machine, each a process that is started anew when it dies."""
    distributed = pytest.importorskip("distributed", reason='needs "mpqc[dask]"')
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0
        ) as made,
        distributed.Client(made),
    ):
        yield made


def test_a_dask_worker_dies_and_nothing_is_lost(cluster: Any, tmp_path: Path) -> None:
    known = Ledger(tmp_path / "ledger.jsonl")
    pids = set()
    with parallel.using("dask", 2):
        for number, (value, pid) in parallel.each(die_once, Base(0, str(tmp_path)), range(8)):
            known[str(number)] = value
            pids.add(pid)
    assert (tmp_path / "died").exists(), "a worker was killed"
    assert os.getpid() not in pids
    assert dict(known) == {str(n): n * n for n in range(8)}
    assert dict(Ledger(tmp_path / "ledger.jsonl")) == dict(known)


@pytest.mark.slow
def test_alps_on_a_dask_cluster_is_alps(cluster: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason='training needs "mpqc[train]"')
    from tests.train.contract import toy_trainer

    method = load("alps", {"epochs": "0.4", "start": "0.4"})
    problem = replace(toy_problem(), trainer=toy_trainer())
    alone = method.scores(problem)  # type: ignore[attr-defined]
    with parallel.using("dask", 2):
        together = method.scores(problem)  # type: ignore[attr-defined]
    assert together.losses == alone.losses
