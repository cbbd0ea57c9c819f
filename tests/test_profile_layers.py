"""Profiles: what is measured, kept and taken up again; what the compiler does with it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from mpqc import cli_profile, demo
from mpqc.errors import DataError, EnvironmentLacks, UsageError
from mpqc.graph import Array, Precision, TensorType
from mpqc.latency import Entry, LatencyTable, table_path
from mpqc.passes.find_layers import find_layers
from mpqc.pipeline import Options, compile_model, import_model
from mpqc.profile_layers import LocalRunner, Profile, Times, latency_cost, profile
from mpqc.runtime import CompiledModel
from mpqc.target import TARGETS, native

MODEL = demo.files().model
LAYERS = 7


@dataclass
class Scripted:
    """A runner whose times are made up: the n-th library of a call takes n microseconds a step."""

    most: int = 10**6
    calls: int = 0
    seen: list[int] = field(default_factory=list)

    def machine(self) -> str:
        return "made up"

    def measure(self, libraries: Sequence[Path], repeat: int) -> list[Times]:
        if self.calls == self.most:
            raise KeyboardInterrupt
        self.calls += 1
        self.seen.append(len(libraries))
        found = []
        for index, library in enumerate(libraries, 1):
            with CompiledModel(library) as model:
                steps = len(model.steps({n: _zeros(t) for n, t in model.inputs.items()}))
            found.append(Times(((index * 1e-6, index * 2e-6),) * steps, (steps * 1e-6,) * 2))
        return found


def _zeros(kind: TensorType) -> Array:
    return np.zeros(kind.shape, kind.dtype)


def scripted(cache: Path, runner: Scripted, widths: Sequence[int] = (2, 4)) -> Profile:
    return profile(MODEL, native(), widths=widths, cache=cache, runner=runner, checks=())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A real profile of the demo at one width."""
    cache = tmp_path_factory.mktemp("cache")
    return profile(MODEL, native(), widths=[4], cache=cache, repeat=3, checks=[Precision(4, 4)])


def test_every_layer_is_measured_with_every_kernel(measured: Profile) -> None:
    graph = import_model(MODEL)
    assert list(measured.points) == [layer.name for layer in find_layers(graph)]
    for name, point in measured.points.items():
        kinds = {
            entry.kernel for entry in measured.table.entries
            if (entry.geometry, entry.epilogue) == (point.geometry, point.epilogue)
        }  # fmt: skip
        grouped = point.geometry.groups > 1
        lut = set() if grouped or native().arch != "x86_64" else {"bitplane-lut"}
        assert kinds == {"bitplane", "int8"} | lut, name
    macs = {layer.name: layer.macs for layer in find_layers(graph)}
    assert {name: point.geometry.macs for name, point in measured.points.items()} == macs


def test_measured_times_are_plausible(measured: Profile) -> None:
    for entry in measured.table.entries:
        assert 0 <= entry.seconds_min <= entry.seconds_median < 0.1
        # the ends of the checked network have eight bits, which were not measured
        assert entry.measured == ("model" if entry.kernel == "promise" else "yes")
    total = sum(
        measured.table.seconds(point.geometry, Precision(4, 4), point.epilogue)[0]
        for point in measured.points.values()
    )
    assert 1e-7 < total < 0.1


def test_the_promise_is_checked_against_whole_networks(measured: Profile) -> None:
    assert measured.network is not None
    promise, whole = measured.network.checks["w4a4"]
    assert promise > 0
    assert whole > 0
    assert measured.network.factor == pytest.approx(whole / promise)
    assert measured.network.float_seconds is not None
    found = measured.to_json()
    check = found["network"]["checks"]["w4a4"]
    assert check["error"] == pytest.approx(promise / whole - 1)
    assert check["error_with_factor"] == pytest.approx(0, abs=1e-9)
    assert json.loads(json.dumps(found)) == found


def test_a_second_profile_measures_nothing(measured: Profile) -> None:
    assert measured.path is not None
    before = measured.path.read_bytes()
    again = profile(
        MODEL, native(), widths=[4], cache=measured.path.parents[1], checks=[Precision(4, 4)],
        runner=None,
    )  # fmt: skip
    assert (again.measured, again.cached) == (0, measured.measured)
    assert measured.path.read_bytes() == before


def test_the_latency_objective_comes_from_the_cache(measured: Profile) -> None:
    assert measured.path is not None
    cost = latency_cost(MODEL, native(), cache=measured.path.parents[1])
    layers = find_layers(import_model(MODEL))
    total = sum(cost(layer, Precision(4, 4)) for layer in layers)
    assert total == pytest.approx(
        measured.cost.promise(dict.fromkeys(cost.points, Precision(4, 4)))
    )
    with pytest.raises(UsageError, match="mpqc profile"):
        latency_cost(MODEL, native(), cache=measured.path.parent)


def test_an_interrupted_profile_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpqc.profile_layers.KINDS", ("int8",))
    with pytest.raises(KeyboardInterrupt):
        scripted(tmp_path, Scripted(most=2))
    kept = LatencyTable.load(table_path(native(), 1, tmp_path, Scripted().machine()))
    pairs = {(e.weight_bits, e.activation_bits) for e in kept.entries}
    assert pairs == {(2, 2), (2, 4)}
    runner = Scripted()
    result = scripted(tmp_path, runner)
    assert runner.calls == 2
    assert result.cached == result.measured == len(kept.entries)
    whole = Scripted()
    assert scripted(tmp_path, whole).measured == 0
    assert whole.calls == 0


def test_a_damaged_line_is_measured_again_when_it_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpqc.profile_layers.KINDS", ("bitplane", "int8"))
    scripted(tmp_path, Scripted(), [2])
    path = table_path(native(), 1, tmp_path, Scripted().machine())
    path.write_bytes(path.read_bytes()[:-20])
    runner = Scripted()
    assert scripted(tmp_path, runner, [2]).measured == 1
    assert runner.seen == [1]  # only the kind that lacks


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    path = table_path(native(), 1, tmp_path, Scripted().machine())
    path.parent.mkdir(parents=True)
    path.write_text("rubbish\n", "utf-8")
    with pytest.raises(DataError, match="not a latency table"):
        scripted(tmp_path, Scripted())


def test_foreign_targets_are_not_measured(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentLacks, match="rpi4 does not run on this machine"):
        profile(MODEL, TARGETS["rpi4"], cache=tmp_path)


@pytest.mark.parametrize("widths", [[], [0], [9]])
def test_widths_are_checked(tmp_path: Path, widths: list[int]) -> None:
    with pytest.raises(UsageError, match="from 1 to 8"):
        profile(MODEL, native(), widths=widths, cache=tmp_path)


def test_a_runner_that_measures_takes_turns(tmp_path: Path) -> None:
    artifact = compile_model(
        MODEL, tmp_path / "a", Options(native(), latencies=None)
    )  # fmt: skip
    one, two = LocalRunner().measure([artifact.library, artifact.library], 3)
    for times in (one, two):
        assert len(times.steps) == len(artifact.manifest["steps"])
        assert all(0 <= best <= median for best, median in (*times.steps, times.whole))
        assert times.whole[0] > 0


def test_compile_takes_the_kernels_that_the_table_says(tmp_path: Path, measured: Profile) -> None:
    from mpqc.data import open_data

    data = demo.files().calibration

    def biased(kind: str) -> Path:
        """A table in which one kind is the fastest everywhere."""
        path = tmp_path / f"{kind}.csv"
        rows = [
            Entry(**{**e.__dict__, "seconds_min": 1e-6 if e.kernel == kind else 1e-3})
            for e in measured.table.entries
        ]
        LatencyTable(measured.table.conditions, tuple(rows)).save(path)
        return path

    for kind in ("bitplane", "int8"):
        artifact = compile_model(
            MODEL, tmp_path / f"by-{kind}", Options(native(), latencies=biased(kind)),
            bits=Precision(4, 4), ends=None, data=lambda graph: open_data(data, graph),
        )  # fmt: skip
        layers = artifact.manifest["layers"]
        assert len(layers) == LAYERS
        assert {layer["kernel"] for layer in layers} == {kind}
        assert {layer["chosen"] for layer in layers} == {"measured"}
    plain = compile_model(
        MODEL, tmp_path / "plain", Options(native(), latencies=None), bits=Precision(4, 4),
        ends=None, data=lambda graph: open_data(data, graph),
    )  # fmt: skip
    assert {layer["chosen"] for layer in plain.manifest["layers"]} == {"model"}


# The verb ------------------------------------------------------------------------------------


def invoke(*arguments: str) -> tuple[int, str, str]:
    app = typer.Typer()
    app.callback()(lambda: None)
    cli_profile.register(app)
    result = CliRunner().invoke(app, ["profile", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_verb_writes_an_open_table(tmp_path: Path, measured: Profile) -> None:
    assert measured.path is not None
    output = tmp_path / "table.csv"
    options = ["--widths", "4", "--cache", str(measured.path.parents[1]), "-o", str(output)]
    code, stdout, _ = invoke(str(MODEL), *options, "--no-check", "--json")
    assert code == 0
    found = json.loads(stdout)
    assert found["table"] == str(output)
    assert found["measured"] == 0
    again = LatencyTable.load(output)
    assert {e.key for e in again.entries} == {e.key for e in measured.table.entries}
    code, stdout, _ = invoke(str(MODEL), *options, "--no-check", "--overwrite")
    assert code == 0
    assert "whole network at w4a4" in stdout
    assert "classifier" in stdout


def test_the_verb_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--widths"):
        invoke(str(MODEL), "--widths", "two")
    with pytest.raises(UsageError, match="exclude"):
        invoke(str(MODEL), "--cache", str(tmp_path), "--no-cache")
    with pytest.raises(EnvironmentLacks):
        invoke(str(MODEL), "--target", "rpi4")
