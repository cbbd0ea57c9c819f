"""Door to matplotlib for training: curves as a picture, with the extra ``mpqc[report]``."""

from collections.abc import Sequence
from pathlib import Path

from mpqc.errors import EnvironmentLacks
from mpqc.train.loop import EpochRecord


def curves(history: Sequence[EpochRecord], metric: str, reference: float | None, to: Path) -> None:
    """Loss and metric over epochs: a PNG.

    Args:
        history: one record an epoch.
        metric: its name.
        reference: of the float model, drawn as a line.
        to: file.

    Raises:
        EnvironmentLacks: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise EnvironmentLacks(
            f'curves need matplotlib ({error}): pip install "mpqc[report]"'
        ) from error
    epochs = [record.epoch for record in history]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.plot(epochs, [record.loss for record in history], "o-", color="tab:blue")
    left.set_ylabel("loss")
    right.plot(
        epochs, [100 * r.training for r in history], ".--", color="tab:gray", label="training"
    )
    seen = [r for r in history if r.validation is not None]
    right.plot(
        [r.epoch for r in seen],
        [100 * (r.validation or 0) for r in seen],
        "o-",
        color="tab:red",
        label="held out, as compiled",
    )
    if reference is not None:
        right.axhline(100 * reference, color="tab:green", linewidth=1, label="float model")
    right.set_ylabel(f"{metric} [%]")
    right.legend()
    for panel in (left, right):
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(to, dpi=120, format="png")
    pyplot.close(figure)
