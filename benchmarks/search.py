"""Accuracy against budget of the search methods: compiled networks on labelled pictures.

    python -m benchmarks.search MODEL --data calibration.npz --test test.npz [--preprocess p.toml]
        [--methods uniform,eagl,reverse:eagl] [--budgets bitops=w3a3,bitops=w4a4] [--images 2000]
        [-o FOLDER] [--markdown docs/accuracy.md]

Every method searches under every budget; its plan is calibrated and rounded as ``mpqc compile``
does it, and the exact integer graph classifies the test pictures in ONNX Runtime. ``reverse:NAME``
is the baseline of that method. What is measured is kept in the folder at once, as is what methods
measure: a second run goes on where the first stopped. Writes search.json, a plot where matplotlib
is installed, and a table into the section ``<!-- search MODEL -->`` of a document.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks import report
from mpqc.errors import BudgetError, MpqcError
from mpqc.graph import Precision

METHODS = (
    "uniform,eagl,reverse:eagl,hawq,reverse:hawq,sensitivity,reverse:sensitivity,exchange,random"
)
BUDGETS = "0.8*w3a3,w3a3,0.75*w4a4,w4a4,0.82*w5a5,w5a5"
WIDTHS = "2,3,4,5,6,8"
BATCH = 32


@dataclass(frozen=True)
class Point:
    """One plan and how good it is.

    Attributes:
        method: that found it.
        budget: as asked for.
        limit: the same in BitOPs (or bytes, or seconds).
        cost: of the plan.
        widths: of its layers, in order.
        accuracy: share of the test pictures that are classified as labelled; None: no plan fits.
        agreement: share that is classified as by the float model.
        seconds: of the search, with what was known before.
    """

    method: str
    budget: str
    limit: float
    cost: float | None
    widths: tuple[str, ...]
    accuracy: float | None
    agreement: float | None
    seconds: float


class Bench:
    """Searches, builds and judges; keeps what it knows in a folder.

    Args:
        model: ONNX file.
        data: calibration samples.
        test: labelled pictures.
        preprocess: of both.
        images: of the test pictures, at most.
        widths: candidates, for all methods.
        folder: for results and measurements.
        say: told what is going on.
    """

    def __init__(
        self,
        model: Path,
        data: Path,
        test: Path,
        preprocess: Path | None,
        images: int,
        widths: str,
        folder: Path,
        say: Callable[[str], None],
    ) -> None:
        from mpqc.data import open_data
        from mpqc.pipeline import import_model

        self.model, self.widths, self.folder, self.say = model, widths.split(","), folder, say
        self.graph = import_model(model, batch=BATCH)
        self.data = open_data(data, self.graph, preprocess)
        self.test = open_data(test, self.graph, preprocess, images)
        if self.test.labels is None:
            raise MpqcError(f"{test} has no labels: add an array 'labels'")
        self._float: Any = None
        source = [sha256(path.read_bytes()).hexdigest() for path in (model, data, test)]
        self._key = repr((source, images, self.widths, preprocess and preprocess.read_text()))

    def point(self, method: str, budget: str) -> Point:
        """Measured now, or before."""
        name = sha256(f"{self._key}{method}{budget}".encode()).hexdigest()[:16]
        file = self.folder / "points" / f"{name}.json"
        if file.exists():
            kept = json.loads(file.read_text("utf-8"))
            return Point(**kept | {"widths": tuple(kept["widths"])})
        made = self._measured(method, budget)
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(".half")
        half.write_text(json.dumps(asdict(made)), "utf-8")
        half.replace(file)
        return made

    def _measured(self, method: str, budget: str) -> Point:
        import time

        from mpqc.search import precisions, search_plan

        name, _, of = method.partition(":")
        start = time.perf_counter()
        try:
            result = search_plan(
                self.model,
                method=name,
                budgets=budget,
                data=self.data,
                widths=self.widths,
                options={"of": of} if of else None,
                cache=self.folder / "cache",
                progress=lambda label, done, total: self.say(f"{label} {done}/{total}"),
            )
        except BudgetError:
            return Point(method, budget, math.nan, None, (), None, None, 0.0)
        seconds = time.perf_counter() - start
        plan, problem = result.plan, result.problem
        objective = next(iter(problem.budgets))
        self.say(f"build {describe(plan.layers.values())}")
        accuracy, agreement = self._judge(plan)
        return Point(
            method,
            budget,
            problem.budgets[objective],
            problem.cost(precisions(plan), objective),
            tuple(map(str, precisions(plan).values())),
            accuracy,
            agreement,
            round(seconds, 1),
        )

    def float_accuracy(self) -> float:
        """Of the model as it is."""
        from mpqc.onnx_export import to_onnx

        if self._float is None:
            self._float = self._classes(to_onnx(self.graph))
        return self._share(self._float, self.test.labels)

    def _judge(self, plan: Any) -> tuple[float, float]:
        from mpqc.calibration import calibrate
        from mpqc.onnx_export import to_onnx
        from mpqc.passes.quantize_layers import tensors_to_calibrate
        from mpqc.passes.round_layers import round_layers
        from mpqc.pipeline import quantize
        from mpqc.search.confirm import ACCURACY, calibration_data

        data = calibration_data(self.data, 0)
        calibration = calibrate(self.graph, data, tensors_to_calibrate(self.graph, plan))
        rounded = None
        if plan.narrow:
            rounded = round_layers(self.graph, plan, calibration, data, ACCURACY)
        integer = to_onnx(quantize(self.graph, plan, calibration, rounded=rounded))
        self.float_accuracy()
        found = self._classes(integer)
        return self._share(found, self.test.labels), self._share(found, self._float)

    def _classes(self, model: bytes) -> Any:
        import numpy as np

        from mpqc.ort import Session

        session = Session(model)
        found = [next(iter(session.run(f).values())).argmax(1) for f in self.test.feeds()]
        return np.concatenate(found)[: self.test.samples]

    def _share(self, found: Any, wanted: Any) -> float:
        return float((found == wanted).mean())


def describe(layers: Iterable[Any]) -> str:
    """Widths in a row."""
    return " ".join(str(Precision(one.widest, one.activation_bits)) for one in layers)


def checks(points: Sequence[Point], images: int) -> dict[str, Any]:
    """Whether accuracy rises with the budget, and how methods stand to baselines.

    Differences count where they exceed two standard errors of a difference of two builds, as if
    the pictures that they classify differently were independent.
    """
    table = {(p.method, p.budget): p for p in points if p.accuracy is not None}
    methods = list(dict.fromkeys(method for method, _ in table))
    found: dict[str, Any] = {}
    for method in methods:
        row = sorted((p for (m, _), p in table.items() if m == method), key=lambda p: p.limit)
        best, falls = 0.0, []
        for point in row:
            if best - (point.accuracy or 0) > 2 * error(best, images):
                falls.append(point.budget)
            best = max(best, point.accuracy or 0)
        found[method] = {"falls": falls, "mean": sum(p.accuracy or 0 for p in row) / len(row)}
        for other in (f"reverse:{method}", "uniform"):
            pairs = [(p, table[other, p.budget]) for p in row if (other, p.budget) in table]
            if not pairs or other == method:
                continue
            gains = {a.budget: (a.accuracy or 0) - (b.accuracy or 0) for a, b in pairs}
            found[method][f"over {other}"] = gains
    return found


def error(accuracy: float, images: int) -> float:
    """Standard error of the difference of two accuracies."""
    return math.sqrt(2 * accuracy * (1 - accuracy) / images)


def summary(points: Sequence[Point], budgets: Sequence[str], float_accuracy: float) -> str:
    """Markdown: a row a budget, a column a method, top-1 in percent."""
    methods = list(dict.fromkeys(point.method for point in points))
    table = {(p.method, p.budget): p for p in points}
    rows = []
    for budget in budgets:
        here = [table[method, budget] for method in methods]
        limit = next((p.limit for p in here if not math.isnan(p.limit)), math.nan)
        cells = ["" if p.accuracy is None else f"{100 * p.accuracy:.1f}" for p in here]
        rows.append([budget, f"{limit / 1e6:.0f}", *cells])
    head = ["budget", "10^6", *methods]
    return f"float {100 * float_accuracy:.1f}\n\n{report.table(head, rows)}"


def plot(points: Sequence[Point], float_accuracy: float, title: str, path: Path) -> None:
    """Accuracy against budget; nothing where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method in dict.fromkeys(point.method for point in points):
        row = sorted((p for p in points if p.method == method and p.accuracy is not None),
                     key=lambda p: p.limit)  # fmt: skip
        baseline = method == "random" or method.startswith("reverse:")
        axes.plot(
            [p.limit for p in row],
            [100 * (p.accuracy or 0) for p in row],
            "x:" if baseline else "o-",
            label=method,
            alpha=0.6 if baseline else 1,
        )
    axes.axhline(100 * float_accuracy, color="black", linewidth=0.8, label="float")
    axes.set(xlabel="budget", ylabel="top-1 [%]", title=title)
    axes.legend(fontsize=7)
    figure.savefig(path, format="png", dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--preprocess", type=Path)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--objective", default="bitops")
    parser.add_argument("--budgets", default=BUDGETS, help="of the objective, commas between")
    parser.add_argument("--widths", default=WIDTHS)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/search"))
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args(arguments)

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    try:
        bench = Bench(
            given.model, given.data, given.test, given.preprocess, given.images, given.widths,
            given.output, say,
        )  # fmt: skip
        budgets = [f"{given.objective}={text}" for text in given.budgets.split(",")]
        points = []
        for method in given.methods.split(","):
            for budget in budgets:
                point = bench.point(method, budget)
                points.append(point)
                share = "no plan" if point.accuracy is None else f"{100 * point.accuracy:.2f} %"
                print(f"{method} {budget}: {share}", file=sys.stderr, flush=True)
        exact = bench.float_accuracy()
    except MpqcError as error:
        print(error, file=sys.stderr)
        return 2
    images = bench.test.samples or 0
    write(given.output, given.model.stem, points, budgets, exact, images, given.markdown)
    return 0


def write(
    folder: Path,
    model: str,
    points: Sequence[Point],
    budgets: Sequence[str],
    exact: float,
    images: int,
    document: Path | None,
) -> None:
    """JSON, plot, table."""
    from mpqc.pipeline import versions

    content: Mapping[str, Any] = {
        "model": model,
        "images": images,
        "float": exact,
        "points": [asdict(point) for point in points],
        "checks": checks(points, images),
        "versions": versions(),
    }
    report.save(folder / "search.json", content)
    text = f"{images} pictures, {summary(points, budgets, exact)}"
    print(text)
    plot(points, exact, f"{model}, {images} pictures", folder / "search.png")
    if document:
        report.replace_section(document, f"search {model}", text)


if __name__ == "__main__":
    sys.exit(main())
