"""What benchmarks write: JSON, a plot, a table in a document."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpqc.errors import UsageError


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, which is readable as plain text too: columns are aligned, all but the first right.

    Args:
        head: titles.
        rows: cells.
    """
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        padded = [first.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join([
        "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])
    ])  # fmt: skip
    return "\n".join([line(head), f"|{rule}|", *map(line, rows)])


def replace_section(document: Path, name: str, text: str) -> None:
    """Put text between ``<!-- NAME -->`` and ``<!-- end NAME -->`` of a document.

    Raises:
        UsageError: the document has no such section.
    """
    content = document.read_text("utf-8")
    first, last = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    pattern = re.escape(first) + r".*?" + re.escape(last)
    if not re.search(pattern, content, re.DOTALL):
        raise UsageError(f"{document} lacks the lines {first.strip()} and {last}")
    found = re.sub(pattern, lambda _: f"{first}{text}\n{last}", content, flags=re.DOTALL)
    document.write_text(found, "utf-8")


def bars(
    path: Path,
    groups: Sequence[str],
    values: Mapping[str, Sequence[float]],
    label: str,
    floors: Mapping[str, Sequence[float]] | None = None,
    marked: float | None = 1.0,
    start: float = 0.0,
) -> None:
    """Grouped bars as PNG; says so on stderr where matplotlib is missing.

    Args:
        path: file to write.
        groups: what stands below each group of bars.
        values: name in the legend -> height in each group.
        label: of the axis.
        floors: heights to reach, drawn as lines across the bars of the same name.
        marked: height of a line across all bars; None: no line.
        start: of the axis.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plot: install matplotlib (pip install 'mpqc[report]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4))
    width = 0.8 / len(values)
    for index, (name, heights) in enumerate(values.items()):
        left = [place + (index - len(values) / 2) * width for place in range(len(groups))]
        axes.bar(left, heights, width, label=name, align="edge")
        for x, floor in zip(left, (floors or {}).get(name, ()), strict=False):
            axes.plot([x, x + width], [floor, floor], color="black", linewidth=1.5)
    if marked is not None:
        axes.axhline(marked, color="black", linewidth=0.5)
    axes.set_ylim(bottom=start)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(label)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars, not over them
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
