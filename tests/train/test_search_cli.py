"""``mpqc search --train``: from a model and its data to a plan, on the command line."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc import cli_search
from mpqc.errors import DataError, EnvironmentLacks, UsageError
from mpqc.plan import Plan


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    made = typer.Typer(pretty_exceptions_enable=False)
    cli_search.register(made)
    return made


def search(app: typer.Typer, demo: tuple[Path, Path, Path], folder: Path, *more: str) -> Plan:
    model, data, _ = demo
    output = folder / "plan.json"
    words = [model, "--budget", "bitops=w3a3", "--train", data, "--epochs", "1", "--batch-size",
             "20", "--cache", folder / "cache", "-o", output, "--overwrite", "--device", "cpu",
             "--widths", "2,4", *more]  # fmt: skip
    done = CliRunner().invoke(app, ["search", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return Plan.load(output)


def test_ebs(app: typer.Typer, demo: tuple[Path, Path, Path], tmp_path: Path) -> None:
    options = ["--method", "ebs", "--option", "strengths=stochastic", "--option", "samples=1"]
    plan = search(app, demo, tmp_path, *options, "--scores-csv", str(tmp_path / "scores.csv"))
    assert plan.search is not None
    assert plan.search.method == "ebs"
    assert plan.search.cost["bitops"] <= plan.search.budget["bitops"]
    assert "loss, in shares of budgets" in (tmp_path / "scores.csv").read_text()
    again = search(app, demo, tmp_path, *options)
    assert again == plan


def test_dnas_with_labels_and_augmentation(
    app: typer.Typer, demo: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    plan = search(app, demo, tmp_path, "--method", "dnas", "--label-weight", "0.5", "--augment",
                  "crop=1", "--option", "samples=1", "--option", "short=0.5")  # fmt: skip
    assert plan.search is not None
    assert plan.search.cost["bitops"] <= plan.search.budget["bitops"]


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        (["--batch-size", "10000"], DataError, "do not fill a batch"),
        (["--device", "tpu"], UsageError, "no device 'tpu'"),
        (["--option", "strengths=lots"], UsageError, "strengths"),
    ],
)
def test_clear_errors(
    app: typer.Typer, demo: tuple[Path, Path, Path], tmp_path: Path, more: list[str],
    error: type[Exception], said: str,
) -> None:  # fmt: skip
    with pytest.raises(error, match=said):
        search(app, demo, tmp_path, "--method", "ebs", *more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu_where_one_was_asked_for(
    app: typer.Typer, demo: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(EnvironmentLacks, match="sees 0 GPUs"):
        search(app, demo, tmp_path, "--method", "ebs", "--device", "cuda")
