"""Tuning: all forms compute the same, the fastest is recorded, compiled, and not measured again."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mpqc import demo
from mpqc.cli import app
from mpqc.data import open_data
from mpqc.errors import DataError, EnvironmentLacks, PlanError
from mpqc.graph import Precision
from mpqc.grouping import LAYERS
from mpqc.importer import sha256
from mpqc.latency import KINDS, LatencyTable
from mpqc.lowering import lower
from mpqc.pipeline import Options, compile_model, import_model
from mpqc.plan import Plan
from mpqc.profile_layers import OpenNetwork, Times, _build, candidates, random_feeds
from mpqc.runtime import CompiledModel
from mpqc.select_kernel import Selector
from mpqc.target import TARGETS, Target, native
from mpqc.tune import Tuned, tune

MODEL, DATA = demo.files().model, demo.files().calibration
PLAN = Plan.uniform(import_model(MODEL), Precision(2, 2), model_sha256=sha256(MODEL))
HERE = [
    target
    for target in (TARGETS["x86-64-v2"], TARGETS["x86-64-v3"], TARGETS["x86-64-v4-vnni"])
    if target.runs_here
] or [native()]


class Last:
    """A runner for which the last library of each call is the fastest."""

    def __init__(self) -> None:
        self.libraries = 0

    def machine(self) -> str:
        return "made up"

    def measure(self, libraries: Sequence[Path], repeat: int) -> list[Times]:
        del repeat
        self.libraries += len(libraries)
        found = []
        for index, library in enumerate(libraries):
            with CompiledModel(library) as model:
                steps = len(model.steps(random_feeds(model)))
            seconds = (100 - self.libraries - index) * 1e-6
            found.append(Times(((seconds, seconds),) * steps, (seconds, seconds)))
        return found


def tuned(db: Path, runner: Last, **options: Any) -> Tuned:
    return tune(MODEL, native(), PLAN, db, runner=runner, **options)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, Last]:
    """All forms of the demo; read only."""
    runner = Last()
    return tuned(tmp_path_factory.mktemp("tune") / "tuned.csv", runner), runner


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "target",
    [pytest.param(t, id=t.name, marks=[pytest.mark.slow] * (t.name != "x86-64-v3")) for t in HERE],
)
def test_every_form_computes_the_same(target: Target, kind: str, tmp_path: Path) -> None:
    network = OpenNetwork.open(MODEL, None, target, 1)
    graph = network.planned(PLAN)
    selectors = candidates(target, kind, True, graph)
    assert len(selectors) > 1 or (kind, target.arch) == ("bitplane-lut", "aarch64")
    seen, outputs = set(), []
    for index, selector in enumerate(selectors):
        seen |= {
            (node.name, choice.variant, choice.form)
            for node in graph
            if node.op in LAYERS
            for choice in [selector.choose(graph, node)]
        }
        library = _build(lower(graph, target, selector), target, tmp_path / f"{index}.so")
        with CompiledModel(library) as model:
            outputs.append(model.run(random_feeds(model)))
    assert len(seen) > sum(node.op in LAYERS for node in graph)
    for output in outputs[1:]:
        for name, array in output.items():
            np.testing.assert_array_equal(array, outputs[0][name])


def test_the_fastest_form_is_recorded_and_compiled(
    once: tuple[Tuned, Last], tmp_path: Path
) -> None:
    result, _ = once
    assert result.complete
    rows = LatencyTable.load(result.db).entries
    assert {row.measured for row in rows} == {"tuned"}
    assert {row.kernel for row in rows} == set(KINDS)
    options = Options(native(), latencies=result.db)
    data = open_data(DATA, import_model(MODEL))
    artifact = compile_model(MODEL, tmp_path / "build", options, plan=PLAN, data=data)
    by_name = {layer.name: layer for layer in result.layers}
    assert any(layer.before != layer.after for layer in result.layers)
    for layer in artifact.manifest["layers"]:
        assert layer["chosen"] == "measured"
        assert by_name[layer["name"]].after.startswith(f"{layer['kernel']} {layer['variant']}")


def test_the_records_name_the_form_that_is_taken(once: tuple[Tuned, Last]) -> None:
    result, _ = once
    network = OpenNetwork.open(MODEL, None, native(), 1)
    graph = network.planned(PLAN)
    for node in graph:
        if node.op in LAYERS:
            choice = Selector(native(), table=result.table).choose(graph, node)
            widths = Precision(choice.layer.weight_bits, choice.layer.activation_bits)
            geometry = network.points[node.name].geometry
            row = result.table.best_row(geometry, widths, choice.kind)
            assert row is not None
            assert (row.variant, row.tile) == (choice.variant, choice.form)


def test_what_is_measured_is_not_measured_again(once: tuple[Tuned, Last], tmp_path: Path) -> None:
    result, _ = once
    db = tmp_path / "tuned.csv"
    db.write_bytes(result.db.read_bytes())
    again = tuned(db, Last())
    assert again.complete
    assert again.trials == 0
    assert db.read_bytes() == result.db.read_bytes()
    assert again.layers == result.layers


def test_a_few_trials_at_a_time_come_to_the_same_end(
    once: tuple[Tuned, Last], tmp_path: Path
) -> None:
    result, runner = once
    db, fewer = tmp_path / "tuned.csv", Last()
    first = tuned(db, fewer, trials=result.trials - 1)
    assert not first.complete
    assert first.trials == result.trials - 1
    assert runner.libraries == result.trials + 2  # the whole network, before and after
    second = tuned(db, fewer)
    assert second.complete
    assert 0 < second.trials < result.trials


def test_records_that_lack_the_expected_kernel_do_not_choose(tmp_path: Path) -> None:
    """A few forms of slow kernels are no reason to take one of them."""
    result = tuned(tmp_path / "tuned.csv", Last(), trials=1)
    assert {row.kernel for row in result.table.entries} == {"bitplane"}
    by_model = [layer for layer in result.layers if not layer.before.startswith("bitplane ")]
    assert by_model
    assert all(layer.before == layer.after for layer in by_model)


def test_no_time_is_no_trial(tmp_path: Path) -> None:
    result = tuned(tmp_path / "tuned.csv", Last(), limit=0.0)
    assert (result.trials, result.before, result.after) == (0, None, None)
    assert not result.complete
    assert not result.db.exists()
    assert all(layer.before == layer.after for layer in result.layers)


def test_records_of_another_machine_are_refused(once: tuple[Tuned, Last], tmp_path: Path) -> None:
    table = once[0].table
    db = tmp_path / "other.csv"
    replace(table, conditions=replace(table.conditions, cpu="another")).save(db)
    with pytest.raises(DataError, match="name another file with --db"):
        tuned(db, Last())


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    plan = Plan.uniform(import_model(MODEL), Precision(2, 2))
    with pytest.raises(PlanError, match="made for the model"):
        tune(MODEL, native(), plan, tmp_path / "tuned.csv", runner=Last())


def test_boards_are_not_guessed(tmp_path: Path) -> None:
    foreign = TARGETS["rpi4" if native().arch == "x86_64" else "x86-64-v3"]
    with pytest.raises(EnvironmentLacks, match="--ssh"):
        tune(MODEL, foreign, PLAN, tmp_path / "tuned.csv")


# Command line --------------------------------------------------------------------------------


def call(*words: object) -> Any:
    return CliRunner().invoke(app, ["tune", *map(str, words)], env={"COLUMNS": "200"})


def test_the_verb(tmp_path: Path) -> None:
    db = tmp_path / "tuned.csv"
    words = (MODEL, "--bits", "w4a4", "--db", db, "--repeat", "1", "--trials", "2")
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["mpqc_tune"], found["trials"], found["complete"]) == (1, 2, False)
    assert found["before"] > 0
    shown = call(*words, "--trials", "1")
    assert shown.exit_code == 0, shown.output
    assert "the same command goes on from here" in shown.stdout
    assert "times as fast" in shown.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((MODEL,), "either --plan or --bits"),
        ((MODEL, "--bits", "w2a2", "--plan", "p.json"), "either --plan or --bits"),
        ((MODEL, "--bits", "w2a2", "--time-budget", "10"), "90s, 10m or 1h"),
        ((MODEL.parent, "--bits", "w2a2"), "give the ONNX model"),
    ],
)
def test_wrong_usage(words: tuple[object, ...], message: str) -> None:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
