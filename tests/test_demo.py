"""The demo, and the README that shows it."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import mpqc
from docs.update_readme import README, support_table
from mpqc.cli import app
from mpqc.demo_run import MIXED, DemoResult, run_demo

NAMES = ["float", "w8a8", "w4a4", "w2a2", "mixed", "searched"]


def block(name: str) -> str:
    """Text between two markers of the README."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README.read_text("utf-8"), re.S)
    assert found, name
    return found[1]


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo") / "out")


def test_every_build_is_verified_and_the_table_makes_sense(result: DemoResult) -> None:
    assert result.passed
    assert [build.name for build in result.builds] == NAMES
    builds = {build.name: build for build in result.builds}
    assert [builds[name].verified for name in NAMES] == [None, True, True, True, True, True]
    assert builds["float"].agreement == 1
    assert builds["w8a8"].accuracy > 0.98
    assert abs(builds["w4a4"].accuracy - builds["float"].accuracy) < 0.02
    # compensated rounding makes all builds accurate; mixing lies between in bytes
    assert builds["w2a2"].size < builds["mixed"].size < 0.7 * builds["w4a4"].size
    assert builds["w2a2"].accuracy > 0.95
    assert builds["mixed"].accuracy > 0.97
    assert builds["mixed"].bitops < builds["w4a4"].bitops


def test_the_folder_holds_what_the_table_says(result: DemoResult) -> None:
    folder = result.folder
    assert json.loads((folder / "demo.json").read_text()) == result.to_json()
    names = {"digits.onnx", "calibration.npz", "test.npz", "mixed.json", "demo.json"}
    names |= {"searched.json", "demo.png"}
    assert set(os.listdir(folder)) == names | set(NAMES[1:])
    plan = mpqc.Plan.load(folder / "mixed.json")
    widths = {n: f"w{la.weight_bits}a{la.activation_bits}" for n, la in plan.layers.items()}
    assert widths == MIXED
    (mixed,) = [build for build in result.builds if build.name == "mixed"]
    with mpqc.load(folder / "mixed") as model, np.load(folder / "test.npz") as test:
        classes = [model.run({"input": x[None]})["logits"].argmax() for x in test["input"]]
        assert (np.array(classes) == test["labels"]).mean() == mixed.accuracy


def test_again_replaces_its_own_folder_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mpqc.demo_run.UNIFORM", ("w4a4",))
    monkeypatch.setattr("mpqc.demo_run.REPEAT", 2)
    for _ in range(2):
        shown = CliRunner().invoke(app, ["demo", "--json"])
        assert shown.exit_code == 0, shown.output
        told = json.loads(shown.stdout)
        assert [build["name"] for build in told["builds"]] == ["float", "w4a4", "mixed", "searched"]
        (tmp_path / "mpqc-demo/stale.txt").write_text("of the first run")
    assert os.listdir(tmp_path) == ["mpqc-demo"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("ten years of work")
    refused = CliRunner().invoke(app, ["demo", "-o", "foreign"])
    assert refused.exit_code == 2
    assert "not replaced" in refused.stderr
    assert os.listdir(foreign) == ["thesis.txt"]
    artifact = CliRunner().invoke(app, ["demo", "-o", "mpqc-demo/w4a4"])
    assert artifact.exit_code == 2  # an artifact is no demo folder


def test_five_minutes_of_the_readme_work(
    result: DemoResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [line[2:] for line in block("five minutes").splitlines() if line.startswith("$ ")]
    assert commands[0] == "cd mpqc-demo"
    monkeypatch.chdir(result.folder)
    before = set(os.listdir())
    verbs = []
    for command in commands[1:]:
        program, verb, *words = shlex.split(command)
        shown: Any = CliRunner().invoke(app, [verb, *words])
        assert (program, shown.exit_code) == ("mpqc", 0), f"{command}\n{shown.output}"
        verbs.append(verb)
    assert verbs == ["inspect", "compile", "verify", "run", "bench"]
    assert set(os.listdir()) - before == {"build", "logits.npz"}
    for name in ("build", "logits.npz"):  # other tests look at this folder
        os.rename(name, result.folder.parent / name)


def test_the_support_table_of_the_readme_is_generated() -> None:
    assert block("support table") == support_table(), "run: make readme"


def test_the_demo_output_of_the_readme_is_real(result: DemoResult) -> None:
    """Latencies are another machine's; what does not depend on one has to be equal."""
    rows = {
        cells[0]: cells
        for line in block("demo output").splitlines()
        if len(cells := re.split(r"\s{2,}", line.strip())) >= 7
    }
    assert [name for name in rows if name != "build"] == NAMES
    for build in result.builds:
        cells = rows[build.name]
        assert abs(float(cells[1].rstrip("%")) / 100 - build.accuracy) < 0.01
        assert cells[3] == f"{build.size:,.0f}"
