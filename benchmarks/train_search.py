"""Search methods at equal budgets, every plan fine-tuned by one recipe: accuracy as compiled.

    python -m benchmarks.train_search MODEL --train train.npz --test test.npz [--preprocess p.toml]
        [--methods uniform,eagl,alps,dnas,ebs,fracbits] [--budgets bitops=w2a2,size=w2a2,...]
        [--epochs 20] [--tune 60] [--seeds 0,1,2] [--device cuda] [--jobs 2] [--reduced]
        [--option alps.epochs=0.1]... [--measured] [-o FOLDER] [--markdown docs/train/results.md]
        [--plans FOLDER/train_search.json] [--step-lr 0.003] [--temperature 2]

All start from the same float model and see the same training samples. A point is a search and the
fine-tuning of its plan; accuracy is of the trained integers on all test pictures. Points go through
joblib (``--jobs``, ``--backend``), and each is a file as soon as it is measured: a second run goes
on where the first stopped; ``--measured`` shows what there is. ``--reduced`` is for CPUs: less of
everything, and it says so; whatever else is given holds. ``--plans`` takes those of an earlier run
instead of searching: for another fine-tuning. Writes train_search.json, a plot, and a
table into the section ``<!-- train_search MODEL -->`` (``... MODEL again``).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks import report
from mpqc.errors import BudgetError, MpqcError, UsageError

METHODS = "uniform,eagl,progressive,alps,dnas,ebs,fracbits"
REDUCED = {
    "samples": 3200, "seeds": "0", "epochs": 4.0, "tune": 1.5, "augment": "flip",
    "batch_size": 32, "widths": "1,2,3,4", "budgets": "bitops=w2a2,bitops=w3a3",
    "methods": "uniform,sensitivity,ebs,fracbits,alps,dnas",
    "option": ["alps.epochs=0.1", "alps.start=1", "dnas.share_weights=true", "dnas.samples=16",
               "dnas.short=0"],
}  # fmt: skip
BUDGETS = "bitops=w2a2,bitops=w3a3,bitops=w4a4,size=w2a2,size=w3a3,size=w4a4"


@dataclass(frozen=True)
class Setting:
    """What all points share.

    Attributes:
        model: float ONNX file.
        train: training samples, with labels or without.
        test: labelled pictures.
        preprocess: of both.
        widths: candidates.
        epochs: of a search.
        tune: epochs of the fine-tuning.
        lr: of both, of weights and of steps.
        samples: of the training data, at most.
        images: of the test pictures, at most.
        augment: as ``mpqc finetune --augment``.
        batch_size: samples of a step.
        device: to train on.
        options: method -> its options.
        folder: for points and measurements.
        plans: points of an earlier run, which are fine-tuned again; None: plans are searched.
        step_lr: of the fine-tuning, of quantization steps; None: that of searches.
        temperature: of the fine-tuning's loss; None: its default.
    """

    model: Path
    train: Path
    test: Path
    preprocess: Path | None
    widths: str
    epochs: float
    tune: float
    lr: float
    samples: int | None
    images: int | None
    augment: str
    batch_size: int
    device: str
    options: Mapping[str, Mapping[str, str]]
    folder: Path
    plans: Path | None = None
    step_lr: float | None = None
    temperature: float | None = None

    def file(self, task: "Task") -> Path:
        """Where a point is kept."""
        later = ("plans", "step_lr", "temperature")  # points of before have none
        known = {k: v for k, v in asdict(self).items() if v is not None or k not in later}
        parts = {k: str(v) for k, v in known.items() if k not in ("folder", "device")}
        parts["options"] = str(sorted(self.options.get(task.method, {}).items()))
        digest = sha256(repr((sorted(parts.items()), task)).encode()).hexdigest()[:16]
        return self.folder / "points" / f"{digest}.json"


@dataclass(frozen=True)
class Task:
    """One search and one fine-tuning."""

    method: str
    budget: str
    seed: int


@dataclass(frozen=True)
class Point:
    """How good a plan is.

    Attributes:
        method: that found it.
        budget: as asked for.
        seed: of search and fine-tuning.
        cost: objective -> of the plan, with its limit under ``limit``.
        widths: of its layers, in order.
        before: accuracy rounded without training.
        accuracy: after fine-tuning, of the integers; None: no plan fits.
        search_s: seconds of the search, with what was in the cache.
        tune_s: seconds of the fine-tuning.
        right: which test pictures the integers get right: bits, as hexadecimal digits.
    """

    method: str
    budget: str
    seed: int
    cost: Mapping[str, float]
    widths: tuple[str, ...]
    before: float | None
    accuracy: float | None
    search_s: float
    tune_s: float
    right: str = ""


def verdicts(trainer: Any, module: Any) -> Any:
    """Whether each held-out picture is told right by the integers, bool [n]."""
    import torch

    from mpqc.train.loop import find_device, run

    module.eval()
    device, head = find_device(trainer.device), trainer.objective.head
    found = []
    with torch.no_grad():
        for batch in trainer.held.batches(100):
            moved = batch.to(device)
            found.append((run(module, moved)[head].argmax(1) == moved.labels).cpu())
    return torch.cat(found).numpy()


def against(points: Sequence[Point], others: Sequence[Point]) -> tuple[float, float]:
    """Mean difference of accuracies and its standard error, from the same pictures, in percent.

    Pictures are what is drawn: what seeds differ in is averaged for each picture first.

    Args:
        points: of several seeds.
        others: of the same seeds.
    """
    import numpy as np

    def rights(chosen: Sequence[Point]) -> Any:
        each = [
            np.unpackbits(np.frombuffer(bytes.fromhex(point.right), np.uint8)).astype(float)
            for point in chosen
        ]
        return np.mean(each, 0)

    first = points[0]
    right = np.unpackbits(np.frombuffer(bytes.fromhex(first.right), np.uint8)).sum()
    count = round(right / first.accuracy) if first.accuracy else 8 * len(first.right) // 2
    apart = rights(points) - rights(others)
    return 100 * float(apart.sum()) / count, 100 * float(np.sqrt(np.square(apart).sum())) / count


def measure(setting: Setting, task: Task) -> Point:
    """Search, fine-tune, judge."""
    import numpy as np

    from mpqc.graph import Precision
    from mpqc.passes.find_layers import find_layers

    plan = _searched(setting, task) if setting.plans is None else _earlier(setting.plans, task)
    if not plan.widths:
        return plan
    start = time.perf_counter()
    tuner = _trainer(setting, task, setting.tune, setting.test)
    tuner.held = replace(tuner.held, chosen=tuner.held.chosen[: setting.images])
    if setting.temperature is not None:
        tuner.objective = replace(tuner.objective, temperature=setting.temperature)
    names = [layer.name for layer in find_layers(tuner.graph)]
    widths = dict(zip(names, map(Precision.parse, plan.widths), strict=True))
    network = tuner.network(tuner.plan(widths))
    before = verdicts(tuner, network)
    blind = replace(tuner, held=replace(tuner.held, chosen=tuner.held.chosen[:0]))
    blind.fit(network, setting.tune)
    after = verdicts(tuner, network)
    return replace(
        plan, before=float(before.mean()), accuracy=float(after.mean()),
        tune_s=round(time.perf_counter() - start, 1), right=np.packbits(after).tobytes().hex(),
    )  # fmt: skip


def _searched(setting: Setting, task: Task) -> Point:
    """What a search finds, not trained; no widths where no plan fits."""
    from mpqc.search import precisions, search_plan

    start = time.perf_counter()
    hunter = _trainer(setting, task, setting.epochs)  # it never sees the test pictures
    none = Point(task.method, task.budget, task.seed, {}, (), None, None, 0.0, 0.0)
    try:
        found = search_plan(
            setting.model,
            method=task.method,
            budgets=task.budget,
            data=hunter.data,
            widths=setting.widths.split(","),
            options=setting.options.get(task.method),
            trainer=hunter,
            seed=task.seed,
            cache=setting.folder / "cache",
        )
    except BudgetError:
        return none
    widths = precisions(found.plan)
    (limit,) = found.problem.budgets.values()
    return replace(
        none, cost=found.problem.total(widths) | {"limit": limit},
        widths=tuple(map(str, widths.values())), search_s=round(time.perf_counter() - start, 1),
    )  # fmt: skip


def _earlier(plans: Path, task: Task) -> Point:
    """The plan of an earlier run.

    Raises:
        UsageError: it has none.
    """
    points = json.loads(plans.read_text("utf-8"))["points"]
    for point in points:
        if Task(point["method"], point["budget"], point["seed"]) == task:
            return Point(**point | {"widths": tuple(point["widths"])})
    raise UsageError(f"{plans} has no {task.method} at {task.budget} with seed {task.seed}")


def _trainer(setting: Setting, task: Task, epochs: float, judge: Path | None = None) -> Any:
    from mpqc.cli_finetune import parse_augment
    from mpqc.train.loop import Recipe
    from mpqc.train.trainer import PlanTrainer

    steps = None if judge is None else setting.step_lr
    recipe = Recipe(
        epochs=epochs, batch_size=setting.batch_size, lr=setting.lr,
        step_lr=min(setting.lr, Recipe.step_lr) if steps is None else steps,
        augment=parse_augment(setting.augment), seed=task.seed,
    )  # fmt: skip
    return PlanTrainer.open(
        setting.model, setting.train, validate=judge, preprocess=setting.preprocess,
        recipe=recipe, device=setting.device, max_samples=setting.samples,
    )  # fmt: skip


def keep(path: Path, point: Point) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    half.write_text(json.dumps(asdict(point)), "utf-8")
    half.replace(path)


def load(path: Path) -> Point:
    """What ``keep`` wrote."""
    kept = json.loads(path.read_text("utf-8"))
    return Point(**kept | {"widths": tuple(kept["widths"])})


def table(points: Sequence[Point]) -> str:
    """A row a method and budget, means over seeds."""
    rows = []
    for method, budget in dict.fromkeys((p.method, p.budget) for p in points):
        here = [p for p in points if (p.method, p.budget) == (method, budget)]
        good = [p for p in here if p.accuracy is not None]
        if not good:
            rows.append([method, budget, str(len(here)), "no plan fits", "", "", "", "", "", ""])
            continue
        untrained = statistics.fmean(100 * (p.before or 0) for p in good)
        found = [100 * (p.accuracy or 0) for p in good]
        spread = f" ± {statistics.stdev(found):.1f}" if len(good) > 1 else ""
        rows.append([
            method, budget, str(len(here)), f"{statistics.fmean(found):.1f}{spread}",
            _beside(good, points), f"{untrained:.1f}",
            f"{statistics.fmean(p.cost['bitops'] for p in good) / 1e6:.0f}",
            f"{statistics.fmean(p.cost['size'] for p in good) / 1e3:.1f}",
            f"{statistics.fmean(p.search_s for p in good):.0f}",
            f"{statistics.fmean(p.tune_s for p in good):.0f}",
        ])  # fmt: skip
    head = ["method", "budget", "seeds", "top-1 [%]", "over uniform", "untrained [%]", "MBitOPs",
            "weights [kB]", "search [s]", "fine-tuning [s]"]  # fmt: skip
    return report.table(head, rows)


def _beside(good: Sequence[Point], points: Sequence[Point]) -> str:
    """Mean difference from the uniform plan of equal seeds and budget, and its standard error."""
    same = {(p.budget, p.seed): p for p in points if p.method == "uniform" and p.right}
    pairs = [(p, same[p.budget, p.seed]) for p in good if p.right and (p.budget, p.seed) in same]
    if not pairs or good[0].method == "uniform":
        return ""
    mean, error = against([p for p, _ in pairs], [other for _, other in pairs])
    return f"{mean:+.1f} ± {error:.1f}"


def plot(points: Sequence[Point], title: str, path: Path) -> None:
    """Mean accuracy of each method at each budget; nothing where matplotlib is missing."""
    groups = list(dict.fromkeys(p.budget for p in points))
    values = {}
    for method in dict.fromkeys(p.method for p in points):
        values[method] = [_mean(points, method, budget) for budget in groups]
    if values:
        fit = [mean for row in values.values() for mean in row if mean > 0]
        start = max(0.0, min(fit, default=0.0) - 2)  # a point's difference has to be seen
        report.bars(path, groups, values, f"top-1 [%], {title}", marked=None, start=start)


def _mean(points: Sequence[Point], method: str, budget: str) -> float:
    """Accuracy over seeds, in percent; 0 where no plan fits."""
    found = [p.accuracy or 0.0 for p in points if (p.method, p.budget) == (method, budget)]
    return 100 * statistics.fmean(found or [0.0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--preprocess", type=Path)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--budgets", default=BUDGETS)
    parser.add_argument("--widths", default="1,2,3,4,5,6")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--tune", type=float, default=60)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--augment", default="flip,crop=4")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--backend")
    parser.add_argument("--option", action="append", metavar="METHOD.NAME=VALUE")
    parser.add_argument("--measured", action="store_true", help="only points of earlier runs")
    parser.add_argument(
        "--reduced", action="store_true",
        help=", ".join(f"{name} {value}" for name, value in REDUCED.items()),
    )  # fmt: skip
    parser.add_argument("--plans", type=Path, help="train_search.json, whose plans are fine-tuned")
    parser.add_argument("--step-lr", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/train_search"))
    parser.add_argument("--markdown", type=Path)
    if parser.parse_args(arguments).reduced:
        parser.set_defaults(**REDUCED)
    given = parser.parse_args(arguments)
    if given.plans and not given.plans.is_file():
        parser.error(f"--plans {given.plans} is no file: it is the train_search.json of a run")
    setting = Setting(
        given.model, given.train, given.test, given.preprocess, given.widths, given.epochs,
        given.tune, given.lr, given.samples, given.images, given.augment, given.batch_size,
        given.device, _options(parser, given.option or ()), given.output, given.plans,
        given.step_lr, given.temperature,
    )  # fmt: skip
    tasks = [
        Task(method, budget, int(seed))
        for budget in given.budgets.split(",")
        for method in given.methods.split(",")
        for seed in given.seeds.split(",")
    ]
    if given.measured:
        tasks = [task for task in tasks if setting.file(task).exists()]
    try:
        points = run(setting, tasks, given.backend, given.jobs)
    except MpqcError as error:
        print(error, file=sys.stderr)
        return 2
    note = f"{given.tune:g} epochs of fine-tuning"
    if given.plans:
        note += f", plans of {given.plans.name}"
    if given.reduced:
        note += (
            f", REDUCED: {given.samples} training samples in batches of {given.batch_size}, "
            f"{given.images or 'all'} test pictures, {given.epochs:g} epochs of search, widths "
            f"{given.widths}" + "".join(f", {option}" for option in given.option or ())
        )
    text = f"{note}\n\n{table(points)}"
    print(text)
    report.save(
        given.output / "train_search.json",
        {"setting": {k: str(v) for k, v in asdict(setting).items()},
         "reduced": given.reduced, "points": [asdict(point) for point in points]},
    )  # fmt: skip
    plot(points, given.model.stem, given.output / "train_search.png")
    if given.markdown:
        again = " again" if given.plans else ""
        report.replace_section(given.markdown, f"train_search {given.model.stem}{again}", text)
    return 0


def _options(parser: argparse.ArgumentParser, told: Sequence[str]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for text in told:
        name, equals, value = text.partition("=")
        method, dot, option = name.partition(".")
        if not (equals and dot):
            parser.error(f"--option wants METHOD.NAME=VALUE, got {text!r}")
        found.setdefault(method, {})[option] = value
    return found


def run(
    setting: Setting, tasks: Sequence[Task], backend: str | None = None, jobs: int | None = None
) -> list[Point]:
    """All points, from files where they were measured before."""
    from mpqc.parallel import each, using

    missing = [task for task in tasks if not setting.file(task).exists()]
    with using(backend, jobs):
        for number, point in each(measure, setting, missing):
            keep(setting.file(missing[number]), point)
            share = "no plan" if point.accuracy is None else f"{100 * point.accuracy:.2f} %"
            print(f"{point.method} {point.budget}: {share}", file=sys.stderr, flush=True)
    return [load(setting.file(task)) for task in tasks]


if __name__ == "__main__":
    sys.exit(main())
