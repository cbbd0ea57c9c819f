import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mpqc import cli_search
from mpqc.errors import BudgetError, MpqcError, OutputError, UsageError
from mpqc.plan import Plan


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer(pretty_exceptions_enable=False)
    cli_search.register(made)
    return made


def run(app: typer.Typer, *arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def model(shared_models: Path) -> Path:
    return shared_models / "cifar10_resnet8.onnx"


def search(model: Path, output: Path, *more: str | Path) -> list[str | Path]:
    return ["search", model, "--method", "eagl", "--budget", "bitops=0.8*w4a4", "-o", output,
            "--no-cache", *more]  # fmt: skip


def test_writes_a_plan_and_says_where_the_budget_went(
    app: typer.Typer, model: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    done = run(app, *search(model, plan))
    assert done.exit_code == 0, done.output
    assert Plan.load(plan).search is not None
    for said in ("pinned", "w8a8", "bitops share", "% of the budget", "widest uniform plan"):
        assert said in done.output


def test_json(app: typer.Typer, model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    done = run(app, *search(model, plan, "--json", "--widths", "2,3,4"))
    found = json.loads(done.stdout)
    assert found["method"] == "eagl"
    assert found["cost"]["bitops"] <= found["budget"]["bitops"]
    assert {row["weight_bits"] for row in found["layers"]} <= {2, 3, 4, 8}
    assert found["plan"] == {"tensors": {}} | json.loads(plan.read_text())


def test_names_the_kernel_that_will_run_each_layer(
    app: typer.Typer, model: Path, tmp_path: Path
) -> None:
    avx2: list[str | Path] = ["search", model, "--method", "uniform", "--budget", "bitops=w1a1",
                              "--no-cache", "--widths", "w1a1", "--target", "x86-64-v3",
                              "-o"]  # fmt: skip
    found = json.loads(run(app, *avx2, tmp_path / "a", "--json").stdout)
    kernels = [row["expected_kernel"] for row in found["layers"]]
    assert kernels[0] == "int8"  # three channels, eight bits
    body = [row for row in found["layers"] if row["weight_bits"] == 1]
    assert {row["expected_kernel"] for row in body} <= {"bitplane", "bitplane-lut"}
    assert max(row["gain_over_int8"] for row in body) > 2
    assert body[-1]["expected_kernel"] in run(app, *avx2, tmp_path / "b").output


def test_tables_of_losses(app: typer.Typer, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table, plot = tmp_path / "t.csv", tmp_path / "t.png"
    done = run(app, *search(model, tmp_path / "p", "--scores-csv", table, "--scores-png", plot))
    assert done.exit_code == 0
    assert table.read_text().startswith("layer,weight_bits")
    assert plot.stat().st_size > 1000
    without = search(model, tmp_path / "q", "--scores-csv", tmp_path / "q.csv", "--overwrite")
    without[3] = "random"
    assert isinstance(run(app, *without).exception, UsageError)
    assert not (tmp_path / "q").exists()


def test_options_and_constraints(app: typer.Typer, model: Path, tmp_path: Path) -> None:
    rules = tmp_path / "c.toml"
    rules.write_text('[max]\n"*" = "w3"\n')
    done = run(app, *search(model, tmp_path / "p", "--constraints", rules, "--option", "gain=min",
                            "--option", "code_bits=8", "--widths", "2,3,4",
                            "--first-last", "search", "--seed", "3", "--json"))  # fmt: skip
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert max(row["weight_bits"] for row in found["layers"]) <= 3
    assert found["plan"]["search"]["seed"] == 3


@pytest.mark.parametrize(
    ("more", "kind", "said"),
    [
        (["--option", "gain"], UsageError, "NAME=VALUE"),
        (["--option", "a=1", "--option", "a=2"], UsageError, "NAME=VALUE once"),
        (["--dim", "n=x"], UsageError, "positive number"),
        (["--budget", "size=1kB"], BudgetError, "cheapest plan"),
        (["--budget", "size=1"], UsageError, "no unit"),
        (["--widths", "2,9"], UsageError, "from 1 to 8"),
    ],
)
def test_errors(
    app: typer.Typer, model: Path, tmp_path: Path,
    more: list[str], kind: type[MpqcError], said: str,
) -> None:  # fmt: skip
    done = run(app, *search(model, tmp_path / "p", *more))
    assert isinstance(done.exception, kind)
    assert said in str(done.exception)
    assert not (tmp_path / "p").exists()


def test_keeps_what_is_there(app: typer.Typer, model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "p"
    plan.write_text("mine")
    assert isinstance(run(app, *search(model, plan)).exception, OutputError)
    assert plan.read_text() == "mine"
    assert run(app, *search(model, plan, "--overwrite")).exit_code == 0


def test_methods(app: typer.Typer) -> None:
    listed = json.loads(run(app, "methods", "--json").stdout)["methods"]
    assert {"uniform", "eagl", "sensitivity"} <= {method["name"] for method in listed}
    text = run(app, "methods").output
    assert "sensitivity" in text
