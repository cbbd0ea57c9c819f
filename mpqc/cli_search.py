"""The verbs ``search`` and ``methods``; ``register`` adds them to the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from mpqc import console
from mpqc.cli_finetune import parse_augment
from mpqc.cli_options import (
    DataOption,
    Dim,
    Json,
    Model,
    Option,
    Overwrite,
    PreprocessOption,
    Seed,
    TargetOption,
    Threads,
    Verbose,
    parse_dims,
)
from mpqc.errors import UsageError

if TYPE_CHECKING:
    from mpqc.forecast import Expectation
    from mpqc.search import SearchResult

BASELINES = frozenset({"uniform", "random", "reverse"})  # wanted as they are


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(
        "search",
        epilog="Example: mpqc search model.onnx --method sensitivity --budget bitops=w4a4 "
        "--data calibration.npz -o plan.json",
    )(search)
    app.command("methods", epilog="Example: mpqc methods --json")(methods)


def search(
    model: Model,
    output: Annotated[Path, Option("--output", "-o", metavar="P", help="For plan.json.")],
    method: Annotated[str, Option("--method", metavar="NAME", help="See mpqc methods.")],
    budget: Annotated[
        list[str],
        Option(
            "--budget",
            metavar="B",
            help="size=1.5MB, bitops=22.8G, latency=5ms, or relative "
            "to a uniform build: size=w4a4, bitops=0.8*w4a4; repeatable, all hold.",
        ),
    ],
    data: DataOption = None,
    preprocess: PreprocessOption = None,
    widths: Annotated[
        str | None,
        Option(
            "--widths",
            metavar="2,4,8",
            help="Candidates: widths, all pairs of which are "
            "tried, or pairs as w2a4; by default the method's.",
        ),
    ] = None,
    first_last: Annotated[
        str,
        Option("--first-last", metavar="search|w8a8", help="First and last layers."),
    ] = "w8a8",
    constraints: Annotated[
        Path | None,
        Option("--constraints", metavar="F", help="TOML: pin, exclude, tie, min, max by glob."),
    ] = None,
    option: Annotated[
        list[str] | None,
        Option("--option", metavar="NAME=VALUE", help="Of the method; repeatable."),
    ] = None,
    dim: Dim = None,
    batch: Annotated[
        int, Option("--batch", min=1, help="Samples of the run that a latency budget is about.")
    ] = 1,
    latency_table: Annotated[
        Path | None,
        Option("--latency-table", metavar="F.csv", help="Of mpqc profile; by default the cache's."),
    ] = None,
    target: TargetOption = "native",
    threads: Threads = 1,
    cache: Annotated[
        Path | None, Option("--cache", metavar="DIR", help="For measurements; a folder of yours.")
    ] = None,
    confirmed: Annotated[
        bool,
        Option(
            "--confirm/--no-confirm",
            help="With data: compare whole networks, and keep the uniform plan where it is better.",
        ),
    ] = True,
    no_cache: Annotated[bool, Option("--no-cache", help="Measure anew, keep nothing.")] = False,
    scores_csv: Annotated[
        Path | None, Option("--scores-csv", metavar="F", help="Write the losses as a table.")
    ] = None,
    scores_png: Annotated[
        Path | None, Option("--scores-png", metavar="F", help="Draw them; needs mpqc[report].")
    ] = None,
    train: Annotated[
        str | None,
        Option(
            "--train",
            metavar="D",
            help="Training data, for methods that train: FILE.npz, labels are not needed; or "
            "module.py:function.",
        ),
    ] = None,
    validate: Annotated[
        str | None,
        Option("--validate", metavar="D", help="Measure on these; by default a tenth is held out."),
    ] = None,
    epochs: Annotated[
        float, Option("--epochs", help="Of a method that trains; may be a fraction.")
    ] = 10.0,
    batch_size: Annotated[int, Option("--batch-size", min=1, help="Samples of a step.")] = 64,
    lr: Annotated[float, Option("--lr", help="Of weights, relative to their magnitude.")] = 0.005,
    label_weight: Annotated[
        float,
        Option(
            "--label-weight",
            min=0,
            max=1,
            help="Share of the labels in the loss; the rest is distance from the float model's "
            "outputs.",
        ),
    ] = 0.0,
    augment: Annotated[
        str, Option("--augment", metavar="flip,crop=4", help="Of pictures, NCHW; or none.")
    ] = "none",
    device: Annotated[
        str, Option("--device", metavar="NAME", help="To train on: auto, cpu, cuda, cuda:1.")
    ] = "auto",
    max_samples: Annotated[
        int | None, Option("--max-samples", min=1, help="Of the training data, drawn by --seed.")
    ] = None,
    jobs: Annotated[
        int | None,
        Option("--jobs", metavar="N", help="Trials at a time; -1: one a core. alps, sensitivity."),
    ] = None,
    backend: Annotated[
        str | None,
        Option(
            "--backend",
            metavar="NAME",
            help="Of joblib, for --jobs: loky (processes), threading, dask or ray (clusters).",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Search the width of every layer under budgets; exit 4 if they cannot be met."""
    from mpqc.artifact import check_output
    from mpqc.budget import parse_budgets
    from mpqc.graph import Precision
    from mpqc.parallel import using
    from mpqc.search import CostFunction, default_cache, report, search_plan

    for path in filter(None, (output, scores_csv, scores_png)):
        check_output(path, overwrite)
    dims = parse_dims(dim)
    costs: dict[str, CostFunction] = {}
    if latency_table or any(b.objective == "latency" for b in parse_budgets(budget)):
        from mpqc.latency import LatencyTable
        from mpqc.profile_layers import latency_cost
        from mpqc.target import find_target

        table = None if latency_table is None else LatencyTable.load(latency_table)
        machine = find_target(target)
        costs["latency"] = latency_cost(
            model, machine, table, threads=threads, dims=dims, batch=batch, cache=cache
        )
    trainer = None
    if train is not None:
        from mpqc.train.loop import Recipe
        from mpqc.train.trainer import PlanTrainer

        recipe = Recipe(
            epochs=epochs, batch_size=batch_size, lr=lr, augment=parse_augment(augment), seed=seed
        )
        trainer = PlanTrainer.open(
            model, train, validate=validate, preprocess=preprocess, dims=dims, recipe=recipe,
            label_weight=label_weight, device=device, max_samples=max_samples,
        )  # fmt: skip
    with using(backend, jobs), _Bar() as bar:
        result = search_plan(
            model,
            method=method,
            budgets=budget,
            data=data,
            preprocess=preprocess,
            widths=None if widths is None else widths.split(","),
            options=pairs(option, "--option"),
            ends=None if first_last in ("search", "same") else Precision.parse(first_last),
            constraints=constraints,
            costs=costs,
            trainer=trainer,
            dims=dims,
            seed=seed,
            cache=None if no_cache else cache or default_cache(),
            progress=bar,
            confirmed=confirmed and method not in BASELINES,
        )
    if (scores_csv or scores_png) and result.scores is None:
        raise UsageError(f"method {method!r} has no scores to write")
    if result.scores is not None and scores_png is not None:
        result.scores.save_png(scores_png)
    if result.scores is not None and scores_csv is not None:
        result.scores.save_csv(scores_csv)
    result.plan.save(output)
    kernels = _kernels(model, dims, batch, result, target, threads, latency_table, cache)
    console.show(report.to_json(result, kernels), as_json, lambda: report.table(result, kernels))


def _kernels(
    model: Path,
    dims: "Mapping[str, int]",
    batch: int,
    result: "SearchResult",
    target: str,
    threads: int,
    latency_table: Path | None,
    cache: Path | None,
) -> "dict[str, Expectation]":
    """What will run each layer of the plan on the target."""
    from mpqc.forecast import expect_plan
    from mpqc.latency import LatencyTable, cached_table
    from mpqc.pipeline import import_model
    from mpqc.select_kernel import Selector
    from mpqc.target import find_target

    machine = find_target(target)
    known = (
        LatencyTable.load(latency_table) if latency_table else cached_table(machine, threads, cache)
    )
    asked = {name: layer.kernel for name, layer in result.plan.layers.items()}
    selector = Selector(machine, by_layer=asked, table=known)
    return expect_plan(import_model(model, dims, batch), result.widths(), selector)


def methods(as_json: Json = False, verbose: Verbose = False, seed: Seed = 0) -> None:
    """Search methods that are installed, where they come from and what they need."""
    from mpqc.search import methods as installed
    from mpqc.search import report

    found = installed()
    console.show(report.methods_json(found), as_json, lambda: report.methods_table(found))


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """``["a=1"]`` -> ``{"a": "1"}``.

    Raises:
        UsageError: no equals sign, or a name that stands twice.
    """
    found: dict[str, str] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or name.strip() in found:
            raise UsageError(f"{option} wants NAME=VALUE once for each name, got {text!r}")
        found[name.strip()] = value.strip()
    return found


class _Bar:
    """A bar on a terminal while something is measured; nothing elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = console.stderr()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("search", total=None)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, label: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=label, completed=done, total=total)
