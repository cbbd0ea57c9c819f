"""Door to matplotlib for the tables of a search."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpqc.errors import EnvironmentLacks, OutputError


def heat_map(
    grid: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    output: Path,
) -> None:
    """Numbers as colours on a logarithmic scale: a PNG. NaN stays white.

    Raises:
        EnvironmentLacks: matplotlib is missing.
        OutputError: the file cannot be written.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentLacks('plots need matplotlib: pip install "mpqc[report]"') from error
    values = np.asarray(grid, np.float64)
    values = values - min(float(np.nanmin(values)), 0.0)  # gains are negative losses
    positive = values[values > 0]
    figure = Figure(figsize=(3 + 0.28 * len(columns), 1.6 + 0.2 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    varied = positive.size > 1 and np.ptp(positive) > 0
    norm = LogNorm(positive.min(), positive.max()) if varied else None
    image = axes.imshow(np.where(values > 0, values, np.nan), norm=norm, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_title(title)
    figure.colorbar(image)
    try:
        figure.savefig(output, format="png", dpi=120)
    except OSError as error:
        raise OutputError(f"cannot write the plot {output}: {error}") from error
