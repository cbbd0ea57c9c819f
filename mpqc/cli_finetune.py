"""The verb ``finetune``; ``register`` adds it to the command line."""

import contextlib
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer

from mpqc import console
from mpqc.cli_options import (
    Bits,
    Dim,
    FirstLast,
    Json,
    Model,
    Option,
    Overwrite,
    PlanFile,
    PreprocessOption,
    Seed,
    Verbose,
    parse_dims,
    read_plan,
)
from mpqc.errors import UsageError

if TYPE_CHECKING:
    from mpqc.train.batches import Augment
    from mpqc.train.finetune import Tuned
    from mpqc.train.loop import Status


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        "finetune",
        epilog="Example: mpqc finetune model.onnx --plan plan.json --train train.npz "
        "--epochs 10 -o tuned.onnx",
    )(finetune)


def finetune(
    model: Model,
    train: Annotated[
        str,
        Option(
            "--train",
            metavar="D",
            help="Training data: FILE.npz, labels are not needed; or module.py:function.",
        ),
    ],
    output: Annotated[
        Path, Option("--output", "-o", metavar="F.onnx", help="For the quantized model.")
    ],
    plan: PlanFile = None,
    bits: Bits = None,
    first_last: FirstLast = "w8a8",
    epochs: Annotated[float, Option("--epochs", help="May be a fraction.")] = 10.0,
    validate: Annotated[
        str | None,
        Option(
            "--validate",
            metavar="D",
            help="Measure on these, and deliver the best epoch, "
            "or the start; by default a tenth is held out, and the last epoch delivered.",
        ),
    ] = None,
    preprocess: PreprocessOption = None,
    label_weight: Annotated[
        float,
        Option(
            "--label-weight",
            min=0,
            max=1,
            help="Share of the labels in the loss; the rest "
            "is distance from the float model's outputs.",
        ),
    ] = 0.0,
    distance: Annotated[
        Literal["auto", "kl", "mse"],
        Option("--distance", help="Of outputs from the float model's: kl of classes, mse else."),
    ] = "auto",
    temperature: Annotated[float, Option("--temperature", help="Of kl.")] = 2.0,
    batch_size: Annotated[int, Option("--batch-size", min=1, help="Samples of a step.")] = 64,
    lr: Annotated[
        float | None,
        Option(
            "--lr",
            help="Of weights, relative to their magnitude, at two bits; half of it for each bit "
            r"more.  \[0.005 for 100 steps or fewer, 0.02 for 400 or more]",
        ),
    ] = None,
    step_lr: Annotated[
        float | None,
        Option("--step-lr", help=r"Of quantizer steps, relative.  \[0.003 to 0.006, likewise]"),
    ] = None,
    optimizer: Annotated[
        Literal["adam", "sgd"], Option("--optimizer", help="How steps are made.")
    ] = "adam",
    ema: Annotated[
        float, Option("--ema", min=0, max=1, help="Decay of the average of weights; 0: none.")
    ] = 0.999,
    weights: Annotated[
        Literal["lsq", "lsq-odd", "dorefa", "dorefa-modified", "dorefa-centered"],
        Option("--weights", help="Quantizer of weights."),
    ] = "lsq",
    inputs: Annotated[
        Literal["lsq", "pact"], Option("--inputs", help="Quantizer of activations.")
    ] = "lsq",
    augment: Annotated[
        str, Option("--augment", metavar="flip,crop=4", help="Of pictures, NCHW; or none.")
    ] = "none",
    device: Annotated[
        str, Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1.")
    ] = "auto",
    max_samples: Annotated[
        int | None, Option("--max-samples", min=1, help="Of the training data, drawn by --seed.")
    ] = None,
    checkpoint_every: Annotated[
        float, Option("--checkpoint-every", min=0, help="Seconds; and after every epoch.")
    ] = 60.0,
    resume: Annotated[
        bool, Option("--resume", help="Go on from the checkpoint of an interrupted run.")
    ] = False,
    force: Annotated[
        bool, Option("--force", help="Accept a plan of another model where the names fit.")
    ] = False,
    dim: Dim = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Fine-tune a float model at the widths of a plan: makes low bits accurate."""
    if (plan is None) == (bits is None):
        raise UsageError("give the widths: --plan P, or --bits w2a2, not both")
    from mpqc.graph import Precision

    dims = parse_dims(dim)
    loaded = read_plan(plan, model, dims)
    width = None if bits is None else Precision.parse(bits)
    ends = None if first_last == "same" else Precision.parse(first_last)
    from mpqc.train.finetune import Options, paths
    from mpqc.train.finetune import finetune as run
    from mpqc.train.loop import Recipe
    from mpqc.train.quantized_layer import Quantizers

    recipe = Recipe(
        epochs=epochs,
        batch_size=batch_size,
        lr=Recipe.lr if lr is None else lr,
        step_lr=Recipe.step_lr if step_lr is None else step_lr,
        optimizer=optimizer,
        ema=ema,
        augment=parse_augment(augment),
        seed=seed,
    )
    options = Options(
        recipe=recipe,
        quantizers=Quantizers(weights, inputs),
        distance=distance,
        label_weight=label_weight,
        temperature=temperature,
        device=device,
        every=checkpoint_every,
        by_length=frozenset(
            name for name, rate in (("lr", lr), ("step_lr", step_lr)) if rate is None
        ),
    )
    with _Progress(verbose) as bar, _resumable(paths(output)[1]):
        result = run(
            model,
            output,
            train,
            options,
            plan=loaded,
            bits=width,
            ends=ends,
            validate=validate,
            preprocess=preprocess,
            dims=dims,
            max_samples=max_samples,
            force=force,
            resume=resume,
            overwrite=overwrite,
            report=bar.report,
            phase=bar.phase,
        )
    for remark in result.notes:
        console.note(f"no curves: {remark}")
    console.show(result.to_json(), as_json, lambda: _table(result))


@contextlib.contextmanager
def _resumable(folder: Path) -> Any:
    """Say where an interrupted run can go on."""
    try:
        yield
    except KeyboardInterrupt:
        if (folder / "checkpoint.pt").exists():
            console.note(f"interrupted; go on with --resume ({folder / 'checkpoint.pt'})")
        raise


def parse_augment(text: str) -> "Augment":
    """Read ``"flip,crop=4"``.

    Raises:
        UsageError: another word, or not a number of pixels.
    """
    from mpqc.train.batches import Augment

    flip, crop = False, 0
    for part in filter(None, (part.strip() for part in text.lower().split(","))):
        name, equals, value = part.partition("=")
        if part == "none":
            continue
        if part == "flip":
            flip = True
        elif name == "crop" and equals and value.isdecimal():
            crop = int(value)
        else:
            raise UsageError(f"--augment wants flip, crop=PIXELS, both or none, got {part!r}")
    return Augment(flip, crop)


class _Progress:
    """Steps, loss and accuracy on a terminal; with ``-v`` a line an epoch anywhere."""

    def __init__(self, verbose: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._verbose = verbose
        self._console = console.stderr()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Remaining(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def phase(self, name: str) -> None:
        self._progress.update(self._task, description=name, completed=0, total=None)

    def report(self, status: "Status") -> None:
        text = f"loss {status.loss:.4f}, {status.training:.1%}"
        self._progress.update(
            self._task, description=text, completed=status.step, total=status.steps
        )
        record = status.record
        if record is not None and (self._verbose or self._console.is_terminal):
            held = "" if record.validation is None else f", held out {record.validation:.2%}"
            self._console.print(
                f"epoch {record.epoch}: loss {record.loss:.4f}, "
                f"training {record.training:.2%}{held}, {record.seconds:.0f} s",
                markup=False,
            )


def _table(result: "Tuned") -> Any:
    from rich.table import Table

    table = Table(box=None, show_header=False)
    rows = [("float model", result.reference), ("quantized", result.before),
            ("fine-tuned", result.after)]  # fmt: skip
    for name, value in rows:
        if value is not None:
            table.add_row(f"{result.metric}, {name}", f"{value:.2%}")
    last = len(result.history)
    told = f"epoch {result.delivered} of {last}"
    if result.delivered == 0:
        told = (
            f"the rounded start: none of {last} epochs was better; train longer, or at another --lr"
        )
    table.add_row("delivered", told)
    table.add_row("model", str(result.model))
    table.add_row("plan", str(result.plan))
    table.add_row("curves", str(result.folder / "curves.png"))
    table.add_row("trained", f"{result.seconds:.0f} s on {result.device}")
    return table
