"""Comparisons: verdicts, conditions, and the whole verb on the demo."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mpqc import cli_compare, demo, importer
from mpqc.compare import RESULT, STATE, Comparison, Subject, compare
from mpqc.errors import CheckFailed, EnvironmentLacks, OutputError, PlanError, UsageError
from mpqc.graph import Precision
from mpqc.pipeline import Options, compile_model, import_model
from mpqc.plan import Plan
from mpqc.require import Requirement
from mpqc.target import TARGETS, native
from mpqc.verdict import Build, pareto, quality_of, verdict

FILES = demo.files()
OPTIONS = Options(native(), kernel="int8", latencies=None)


def build(name: str, role: Any = "uniform", /, **changes: Any) -> Build:
    made = Build(
        name, role, accuracy=0.90, agreement=0.95, sqnr_db=20.0, samples=10_000, size=100e3,
        bitops=1e9, latency=1e-3, latency_median=1e-3, verified=True,
    )  # fmt: skip
    return replace(made, **changes)


def opponent(name: str, latency: float) -> Build:
    return Build(name, "opponent", accuracy=0.92, samples=10_000, latency=latency)


def said(*builds: Build) -> str:
    return "\n".join(verdict(builds))


# The verdict ---------------------------------------------------------------------------------


def test_a_plan_that_is_better_everywhere_dominates() -> None:
    text = said(build("w4a4"), build("mixed", "plan", accuracy=0.95, size=80e3, latency=0.8e-3))
    assert "mixed dominates w4a4: +5.00 points of accuracy, -20.0% size, the same BitOPs" in text
    assert "-20.0% latency" in text
    assert "noise" not in text


def test_a_plan_that_loses_is_told_so() -> None:
    text = said(build("w4a4"), build("mixed", "plan", accuracy=0.80, bitops=1.1e9))
    assert "mixed LOSES to w4a4, which dominates it: -10.00 points" in text
    assert "No mixed plan here dominates a uniform build" in text


def test_trades_name_both_sides() -> None:
    text = said(build("w4a4"), build("mixed", "plan", accuracy=0.85, size=50e3, latency=1.5e-3))
    assert "mixed trades with w4a4: better size, worse accuracy, latency" in text
    assert "No mixed plan here dominates" in text


def test_small_differences_of_latency_decide_nothing() -> None:
    text = said(build("w4a4"), build("mixed", "plan", latency=1.02e-3))
    assert "mixed and w4a4 are equal" in text
    text = said(build("w4a4"), build("mixed", "plan", latency=1.02e-3, size=90e3))
    assert "mixed dominates w4a4" in text


def test_differences_within_the_noise_of_few_samples_are_marked() -> None:
    few = {"samples": 200, "size": 90e3}
    text = said(build("w4a4", samples=200), build("mixed", "plan", accuracy=0.91, **few))
    assert "+1.00 points of accuracy, within the noise of the samples" in text


def test_every_plan_meets_every_uniform_build() -> None:
    text = said(
        build("w2a2", accuracy=0.5, size=50e3), build("w8a8", accuracy=0.92, size=200e3),
        build("a", "plan", accuracy=0.93), build("b", "plan", accuracy=0.4, size=60e3),
    )  # fmt: skip
    assert "a trades with w2a2" in text
    assert "a dominates w8a8" in text
    assert "b LOSES to w2a2" in text
    assert "No mixed plan" not in text


def test_without_labels_agreement_ranks_and_without_classes_noise() -> None:
    builds = [build("w4a4", accuracy=None), build("m", "plan", accuracy=None, agreement=0.99)]
    assert quality_of(builds) == "agreement"
    assert "+4.00 points of agreement" in said(*builds)
    silent = [replace(b, agreement=None) for b in builds]
    silent[1] = replace(silent[1], sqnr_db=25.0)
    assert quality_of(silent) == "sqnr_db"
    assert "+5.0 dB" in said(*silent)
    exact = replace(silent[1], sqnr_db=None)
    assert "cannot be ranked" in said(silent[0], exact)


def test_opponents_are_told_whether_or_not_we_win() -> None:
    ours = [build("w4a4", latency=1e-3), build("w8a8", latency=2e-3)]
    text = said(*ours, opponent("ort-fp32", 4e-3), opponent("ort-int8", 1.5e-3))
    assert "w4a4 is 4.00 times as fast as ort-fp32; none is slower." in text
    assert "w4a4 is 1.50 times as fast as ort-int8; slower than it: w8a8." in text
    text = said(*ours, opponent("ort-int8", 0.5e-3))
    assert "All builds are slower than ort-int8 (500 µs)" in text
    assert "w4a4, takes 2.00 times as long" in text


def test_wrong_results_come_first() -> None:
    lines = verdict([build("w4a4", verified=False), build("m", "plan", accuracy=0.99)])
    assert lines[0].startswith("WRONG RESULTS: w4a4")


def test_the_front_leaves_out_what_is_beaten() -> None:
    builds = [
        build("small", accuracy=0.5, size=1.0), build("beaten", accuracy=0.5, size=2.0),
        build("large", accuracy=0.9, size=3.0), opponent("ort-fp32", 1e-9),
    ]  # fmt: skip
    assert pareto(builds, "size") == ("small", "large")


# Conditions ----------------------------------------------------------------------------------

BUILDS = [
    build("w4a4", accuracy=0.90, latency=5e-3), build("mixed.v2", "plan", accuracy=0.93),
    opponent("ort-fp32", 2e-3),
]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "accuracy>=0.9",
        "accuracy >= 90%",
        "mixed.v2.accuracy>=w4a4.accuracy",
        "mixed.v2.accuracy >= w4a4.accuracy + 2.9%",
        "mixed.v2.latency<=0.5*w4a4.latency",
        "mixed.v2.latency < 2ms",
        "w4a4.latency<=5000us",
        "size<=100kB",
        "bitops<1.1G",
        "sqnr_db>19.5dB",
        "mixed.v2.latency<ort-fp32.latency",
    ],
)
def test_conditions_that_hold(text: str) -> None:
    assert Requirement.parse(text).failures(BUILDS) == []


def test_conditions_that_fail_name_build_and_value() -> None:
    (line,) = Requirement.parse("accuracy>=92%").failures(BUILDS)
    assert line == "w4a4: accuracy is 90.00%, required >= 92.00%"
    (line,) = Requirement.parse("latency<=ort-fp32.latency").failures(BUILDS)
    assert line.startswith("w4a4: latency is 5 ms, required <= 2 ms")
    assert len(Requirement.parse("size<1kB").failures(BUILDS)) == 2


@pytest.mark.parametrize(
    "text",
    ["", "accuracy", "accuracy=0.9", "speed>1", "0.9<accuracy", "accuracy>=0.9ms", "size<1V",
     "accuracy>=0.9>=0.8", "latency<fast", "size<1%"],
)  # fmt: skip
def test_conditions_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"condition|begins with"):
        Requirement.parse(text)


def test_conditions_on_what_is_not_there_are_errors() -> None:
    with pytest.raises(UsageError, match="no build 'other'"):
        Requirement.parse("other.accuracy>0.1").failures(BUILDS)
    with pytest.raises(UsageError, match="not measured"):
        Requirement.parse("accuracy>0.1").failures([build("a", accuracy=None)])


# Comparing -----------------------------------------------------------------------------------


def subject(plans: Sequence[Path] = (), **changes: Any) -> Subject:
    made = Subject(
        FILES.model, str(FILES.test), calibration=str(FILES.calibration),
        uniform=(Precision(4, 4),), plans=tuple(plans), max_samples=100,
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = import_model(FILES.model)
    plan = Plan.of(graph, demo_widths(), model_sha256=importer.sha256(FILES.model))
    path = tmp_path_factory.mktemp("plans") / "mixed.json"
    plan.save(path)
    return path


def demo_widths() -> dict[str, Precision]:
    from mpqc.demo_run import MIXED

    return {name: Precision.parse(text) for name, text in MIXED.items()}


@pytest.fixture(scope="module")
def report(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    output = tmp_path_factory.mktemp("report") / "report"
    return compare(subject([mixed]), output, OPTIONS, repeat=3)


def test_everything_is_built_verified_and_measured(report: Comparison) -> None:
    names = [(b.name, b.role) for b in report.builds]
    assert names == [
        ("w4a4", "uniform"), ("mixed", "plan"), ("ort-fp32", "opponent"), ("ort-int8", "opponent"),
    ]  # fmt: skip
    for found in report.builds:
        assert found.samples == 100
        assert found.accuracy is not None
        assert found.accuracy > 0.8
        assert found.agreement is not None
        assert found.agreement > 0.85
        assert found.latency is not None
        assert found.latency_median is not None
        assert 0 < found.latency <= found.latency_median
    uniform, plan, floats, _ = report.builds
    assert uniform.verified
    assert plan.verified
    assert floats.agreement == 1.0
    assert plan.size is not None
    assert uniform.size is not None
    assert plan.size < uniform.size
    assert plan.widths is not None
    assert plan.widths["down"] == "w2a4"
    assert plan.kernels == {"int8": 7}
    assert any("w4a4" in line and "mixed" in line for line in report.verdict)


def test_the_report_is_on_disk(report: Comparison) -> None:
    found = json.loads((report.folder / RESULT).read_text("utf-8"))
    assert found == json.loads(json.dumps(report.to_json()))
    rows = (report.folder / "compare.csv").read_text("utf-8").splitlines()
    assert len(rows) == 5
    assert rows[1].startswith("w4a4,uniform,")
    assert (report.folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (report.folder / "builds" / "mixed" / "model.so").is_file()


def test_a_finished_report_stays_unless_asked(report: Comparison, mixed: Path) -> None:
    before = (report.folder / RESULT).read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        compare(subject([mixed]), report.folder, OPTIONS)
    assert (report.folder / RESULT).read_bytes() == before


def test_an_interrupted_comparison_goes_on(
    tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    real = compile_model

    def watched(model: Any, output: Path, *rest: Any, **options: Any) -> Any:
        if len(compiled) == 1 and stop:
            raise KeyboardInterrupt
        compiled.append(output.name)
        return real(model, output, *rest, **options)

    monkeypatch.setattr("mpqc.compare.compile_model", watched)
    stop, output = True, tmp_path / "report"
    with pytest.raises(KeyboardInterrupt):
        compare(subject([mixed]), output, OPTIONS, repeat=1, against=())
    assert not (output / RESULT).exists()
    stop = False
    result = compare(subject([mixed]), output, OPTIONS, repeat=1, against=())
    assert compiled == ["w4a4", "mixed"]
    assert [b.name for b in result.builds] == ["w4a4", "mixed"]
    # a damaged result is noted and made anew, an unchanged one is kept, a changed build is redone
    (file,) = [f for f in (output / "results").iterdir() if '"w4a4"' in f.read_text("utf-8")]
    file.write_text("{", "utf-8")
    result = compare(subject([mixed]), output, OPTIONS, repeat=1, against=(), overwrite=True)
    assert compiled == ["w4a4", "mixed", "w4a4"]
    assert any("damaged" in note for note in result.notes)
    fewer = subject([mixed], uniform=(), max_samples=50)
    result = compare(fewer, output, OPTIONS, repeat=1, against=(), overwrite=True)
    assert compiled == ["w4a4", "mixed", "w4a4", "mixed"]
    assert result.samples == 50


def test_bad_requests_are_refused_before_the_work(tmp_path: Path, mixed: Path) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(subject(uniform=()), tmp_path / "r", OPTIONS)
    with pytest.raises(UsageError, match="two builds are named 'mixed'"):
        compare(subject([mixed, mixed]), tmp_path / "r", OPTIONS)
    with pytest.raises(UsageError, match="unknown opponent 'tflite'"):
        compare(subject(), tmp_path / "r", OPTIONS, against=["tflite"])
    with pytest.raises(EnvironmentLacks, match="rpi4"):
        compare(subject(), tmp_path / "r", Options(TARGETS["rpi4"]))
    stranger = tmp_path / "stranger.json"
    stranger.write_text(mixed.read_text("utf-8").replace(importer.sha256(FILES.model), "0" * 64))
    with pytest.raises(PlanError, match=r"stranger\.json.*made for the model"):
        compare(subject([stranger]), tmp_path / "r", OPTIONS)
    assert not (tmp_path / "r").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=STATE):
        compare(subject(), tmp_path / "mine", OPTIONS, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_opponents_that_cannot_run_are_noted(
    report: Comparison, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpqc.errors import ModelError

    def broken(*_: Any) -> None:
        raise ModelError("ONNX Runtime cannot quantize it")

    monkeypatch.setattr("mpqc.compare.opponent", broken)
    result = compare(subject([mixed]), report.folder, OPTIONS, repeat=1, overwrite=True, plot=False)
    assert [b.name for b in result.builds] == ["w4a4", "mixed"]
    assert result.notes == (
        "ort-fp32 does not take part: ONNX Runtime cannot quantize it",
        "ort-int8 does not take part: ONNX Runtime cannot quantize it",
    )


# The verb ------------------------------------------------------------------------------------


def invoke(*arguments: str) -> tuple[int, str, BaseException | None]:
    app = typer.Typer()
    app.callback()(lambda: None)
    cli_compare.register(app)
    result = CliRunner().invoke(app, ["compare", *arguments])
    return result.exit_code, result.stdout, result.exception


def verb(report: Comparison, mixed: Path, *more: str) -> tuple[int, str, BaseException | None]:
    return invoke(
        str(FILES.model), "--data", str(FILES.test), "--calibration-data", str(FILES.calibration),
        "--uniform", "none", "--plan", str(mixed), "--max-samples", "40", "--repeat", "2",
        "--kernel", "int8", "--against", "none", "--overwrite", "-o", str(report.folder), *more,
    )  # fmt: skip


def test_the_verb_prints_a_table_and_keeps_conditions(report: Comparison, mixed: Path) -> None:
    code, stdout, _ = verb(report, mixed, "--no-plot", "--require", "mixed.accuracy>=0.8")
    assert code == 0
    assert "mixed" in stdout
    assert "On the front of accuracy against size: mixed." in stdout
    code, stdout, error = verb(
        report, mixed, "--no-plot", "--json", "--require", "mixed.accuracy>=101%"
    )
    assert isinstance(error, CheckFailed)
    assert "mixed: accuracy is" in str(error)
    found = json.loads(stdout)
    assert found["required"] == ["mixed.accuracy>=101%"]
    assert len(found["unmet"]) == 1
    _, _, error = verb(report, mixed, "--require", "nonsense")
    assert isinstance(error, UsageError)


def test_without_matplotlib_all_but_the_picture_is_written(
    report: Comparison, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, stdout, error = verb(report, mixed)
    assert isinstance(error, EnvironmentLacks)
    assert "mpqc[report]" in str(error)
    assert "mixed" in stdout
    assert (report.folder / RESULT).exists()
    assert (report.folder / "compare.csv").exists()
    assert not (report.folder / "pareto.png").exists()
