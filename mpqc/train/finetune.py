"""From a plan to an accurate quantized model: quantization-aware fine-tuning of any network."""

import contextlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mpqc.artifact import check_output
from mpqc.calibration import calibrate
from mpqc.errors import EnvironmentLacks, OutputError, UsageError
from mpqc.graph import Graph, Precision
from mpqc.onnx_parts import open_batch
from mpqc.passes.quantize_layers import tensors_to_calibrate
from mpqc.passes.round_layers import round_layers
from mpqc.plan import Plan
from mpqc.rounding import Accuracy
from mpqc.train import checkpoint
from mpqc.train.batches import TrainingSet
from mpqc.train.export import batch_is_open, to_qcdq
from mpqc.train.loop import (
    EpochRecord,
    Recipe,
    Report,
    Teacher,
    Training,
    TrainingDiverged,
    evaluate,
    find_device,
    seeded,
    settle,
    silent,
)
from mpqc.train.module import GraphModule, load_graph
from mpqc.train.objective import Distance, Objective
from mpqc.train.quantized_layer import Quantizers, folded, quantize_module
from mpqc.train.source import CALIBRATION_SAMPLES, Samples, Source

CHECKPOINT, HISTORY, CURVES = "checkpoint.pt", "history.json", "curves.png"


@dataclass(frozen=True)
class Options:
    """What fine-tuning depends on beside model, plan and data.

    Attributes:
        recipe: of the training.
        quantizers: that learn.
        accuracy: rounding on calibration data, where training starts; see ``mpqc compile``.
        distance: of the outputs from the float model's.
        label_weight: share of the labels in the loss; 0 needs none.
        temperature: of the distillation.
        device: auto, cpu, cuda, cuda:1.
        every: seconds between two checkpoints.
        by_length: ``lr``, ``step_lr``: those of the recipe's rates that the number of steps sets.
    """

    recipe: Recipe = Recipe()  # noqa: RUF009 - frozen
    quantizers: Quantizers = Quantizers()  # noqa: RUF009 - frozen
    accuracy: Accuracy = Accuracy()  # noqa: RUF009 - frozen
    distance: Distance = "auto"
    label_weight: float = 0.0
    temperature: float = 2.0
    device: str = "auto"
    every: float = 60.0
    by_length: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tuned:
    """What came out; metrics are of held-out samples, ``after`` as compiled.

    Attributes:
        model: the quantized ONNX file.
        plan: plan.json bound to it.
        folder: of history and curves.
        metric: name of the metrics.
        reference: of the float model.
        before: quantized without training.
        after: fine-tuned.
        delivered: epoch whose weights are in the file; 0: the start, which no epoch reached.
        device: that trained.
        seconds: of training.
        notes: what could not be done.
    """

    model: Path
    plan: Path
    folder: Path
    metric: str
    reference: float | None
    before: float | None
    after: float | None
    delivered: int
    device: str
    seconds: float
    history: list[EpochRecord] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        found = asdict(self)
        return found | {"model": str(self.model), "plan": str(self.plan),
                        "folder": str(self.folder), "notes": list(self.notes)}  # fmt: skip


def paths(output: Path) -> tuple[Path, Path]:
    """Plan and working folder that stand beside the output."""
    stem = output.with_suffix("")
    return Path(f"{stem}.plan.json"), Path(f"{stem}.training")


def finetune(
    model: str | Path,
    output: str | Path,
    train: Samples,
    options: Options = Options(),
    *,
    plan: Plan | None = None,
    bits: Precision | None = None,
    ends: Precision | None = Precision(8, 8),  # noqa: B008 - frozen
    validate: Samples | None = None,
    preprocess: str | Path | None = None,
    dims: Mapping[str, int] | None = None,
    max_samples: int | None = None,
    force: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    report: Report = silent,
    phase: Callable[[str], None] = lambda _: None,
) -> Tuned:
    """Fine-tune a float model at the widths of a plan.

    Args:
        model: float ONNX file.
        output: quantized ONNX file to write; the plan and a folder with curves stand beside it.
        train: training data, as ``mpqc.data`` reads them.
        options: how.
        plan: widths; or
        bits: one width for the body, ``ends`` for the first layers and the classifier.
        ends: None gives them the body's width.
        validate: data to measure on, and to choose the best epoch by, the start among them; by
            default a tenth of the training data, at most 1000, is measured on, and the last
            epoch is delivered.
        preprocess: of pictures, for both.
        dims: of symbolic dimensions.
        max_samples: of the training data.
        force: accept a plan of another model where the names fit.
        resume: go on from the checkpoint of an interrupted run, if there is one.
        overwrite: replace outputs.
        report: called after steps and epochs.
        phase: called with each phase's name.

    Raises:
        MpqcError: see the children; checkpoints stay where they are.
    """
    output = Path(output)
    plan_path, folder = paths(output)
    for path in (output, plan_path):
        check_output(path, overwrite)
    _check_folder(folder, resume, overwrite)
    device = find_device(options.device)
    recipe = options.recipe
    phase("import")
    source = Source.open(
        model, train, recipe.batch_size, preprocess, dims, max_samples, recipe.seed
    )
    graph, digest = source.graph, source.sha256
    plan = _plan(source.flat, plan, bits, ends, digest)
    plan.check(source.flat, digest, force)
    if not plan.layers:
        raise UsageError("the plan quantizes no layer: there is nothing to fine-tune")
    network, exact = GraphModule(graph), GraphModule(graph)
    objective = Objective.of(
        graph,
        source.data.labels is not None,
        options.distance,
        options.label_weight,
        options.temperature,
    )
    phase("read data")
    training, held = source.samples(validate, preprocess, objective, recipe.batch_size, recipe.seed)
    options = replace(options, recipe=suited(recipe, options.by_length, len(training)))
    recipe = options.recipe
    phase("calibrate")
    tensors = tensors_to_calibrate(source.flat, plan)
    calibration = calibrate(source.flat, source.data, tensors, CALIBRATION_SAMPLES, recipe.seed)
    phase("round")
    rounded = None
    if plan.narrow and options.accuracy.reads_data:
        few = source.data.sample(CALIBRATION_SAMPLES, recipe.seed)
        rounded = round_layers(
            source.flat, plan, calibration, few, options.accuracy, seed=recipe.seed
        )
    quantize_module(network, plan, calibration, rounded, options.quantizers)
    network.to(device)
    exact.to(device)
    settle(network, training, recipe, rounded is not None and options.quantizers.compensated)
    phase("measure")
    seeded(recipe.seed)
    teacher = _teacher(exact, training, objective, recipe)
    judge = None if held.labels is not None and objective.head else Teacher(exact)
    reference = before = None
    if len(held):
        size = recipe.batch_size
        reference = evaluate(exact, held, objective, judge, size) if judge is None else None
        before = evaluate(network, held, objective, judge, size)
    work = Training(network, objective, training, held, recipe, teacher)
    if validate is not None and before is not None:
        work.consider(before, 0)
    about = _about(digest, plan, options, training)
    saved = folder / CHECKPOINT
    if resume and saved.exists():
        work.restore(checkpoint.load(saved, about))
    phase("train")
    started = time.monotonic()
    _make(folder)
    work.run(report, saved, about, options.every)
    seconds = time.monotonic() - started
    phase("write")
    _check_finite(network, saved)
    after = evaluate(network, held, objective, judge, recipe.batch_size) if len(held) else None
    _write(output, _file(model, dims, network, plan))
    bound = plan.model_copy(update={"model_sha256": sha256(output.read_bytes()).hexdigest()})
    bound.save(plan_path)
    notes = _write_history(folder, work.history, objective.metric, reference)
    with contextlib.suppress(OSError):
        saved.unlink()
    delivered = len(work.history) if work.best is None else work.best.epoch
    return Tuned(output, plan_path, folder, objective.metric, reference, before, after,
                 delivered, str(device), seconds, work.history, notes)  # fmt: skip


def _check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    if not folder.exists() or resume:
        return
    if (folder / CHECKPOINT).exists() and not overwrite:
        raise OutputError(
            f"{folder} holds the checkpoint of an interrupted run: "
            "give --resume to go on, or --overwrite to train again"
        )
    if not overwrite:
        raise OutputError(f"{folder} exists already; give --overwrite to replace it")
    shutil.rmtree(folder)


def _plan(
    graph: Graph, plan: Plan | None, bits: Precision | None, ends: Precision | None, digest: str
) -> Plan:
    if (plan is None) == (bits is None):
        raise UsageError("give the widths: a plan, or one width for the body, not both")
    if plan is not None:
        return plan
    assert bits is not None
    return Plan.uniform(graph, bits, ends, model_sha256=digest)


def suited(recipe: Recipe, fields: frozenset[str], samples: int) -> Recipe:
    """Rates for the number of steps, in place of those of ``fields``.

    Few steps have to be small: what large ones disturb takes some hundred more to mend. With those,
    small ones get less far: w2a2 of ResNet-20, see docs/train/results.md.

    Args:
        recipe: as given.
        fields: ``lr``, ``step_lr``: those to set.
        samples: of the training data.
    """
    steps = recipe.epochs * (samples // recipe.batch_size)
    share = min(max(steps / 100, 1.0), 4.0)
    rates = {"lr": Recipe.lr * share, "step_lr": Recipe.step_lr * share**0.5}
    return replace(recipe, **{name: rates[name] for name in fields})


def _teacher(
    exact: GraphModule, training: TrainingSet, objective: Objective, recipe: Recipe
) -> Teacher | None:
    if objective.label_weight >= 1:
        return None
    if recipe.augment or recipe.epochs < 1:
        return Teacher(exact)
    return Teacher(exact, training, recipe.batch_size)


def _about(digest: str, plan: Plan, options: Options, training: TrainingSet) -> dict[str, str]:
    """What has to be the same for a resumed run to end as the uninterrupted one would."""
    probe = zlib.crc32(b"")
    for array in training.arrays.values():
        probe = zlib.crc32(np.ascontiguousarray(array[training.chosen[:16]]).tobytes(), probe)
    if training.labels is not None:
        probe = zlib.crc32(training.labels.tobytes(), probe)
    return {
        "the model": digest,
        "the plan": sha256(plan.text().encode()).hexdigest()[:16],
        "the recipe": str(options.recipe),
        "the quantizers": str(options.quantizers),
        "the loss": f"{options.distance}, labels {options.label_weight}, T {options.temperature}",
        "the training data": f"{len(training)} samples, checksum {probe:08x}",
    }


def _check_finite(network: GraphModule, saved: Path) -> None:
    """BatchNormalization hides weights that grew beyond all bounds from the loss."""
    with np.errstate(over="ignore", invalid="ignore"):
        graph = folded(network.to_graph())
    for name, array in graph.constants.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise TrainingDiverged(
                f"training diverged: {name!r} of the trained network is NaN or infinite "
                f"({saved} has its last state): train with a lower --lr"
            )


def _file(
    model: str | Path, dims: Mapping[str, int] | None, network: GraphModule, plan: Plan
) -> bytes:
    """The quantized model, its batch open where the float model's is."""
    one = load_graph(model, dims, 1)
    made = to_qcdq(network, plan, one)
    two = load_graph(model, dims, 2)
    opened = next(iter(two.inputs.values())).shape[:1] == (2,) and batch_is_open(one, two)
    return open_batch(made) if opened else made


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error}") from error


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _write_history(
    folder: Path, history: list[EpochRecord], metric: str, reference: float | None
) -> tuple[str, ...]:
    rows = {"metric": metric, "float": reference, "epochs": [asdict(row) for row in history]}
    _write(folder / HISTORY, (json.dumps(rows, indent=1) + "\n").encode())
    from mpqc.train.plot import curves

    try:
        curves(history, metric, reference, folder / CURVES)
    except EnvironmentLacks as error:
        return (str(error),)
    except OSError as error:
        raise OutputError(f"cannot write {folder / CURVES}: {error}") from error
    return ()
