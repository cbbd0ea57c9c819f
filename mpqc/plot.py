"""Door to matplotlib: pictures of results, with the extra ``mpqc[report]``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpqc.errors import EnvironmentLacks
from mpqc.verdict import COSTS, Build, pareto, quality_of

_AXES = {
    "size": ("weights [kB]", 1e-3),
    "bitops": ("BitOPs [G]", 1e-9),
    "latency": ("latency [ms]", 1e3),
}
_QUALITY = {
    "accuracy": ("accuracy [%]", 100.0),
    "agreement": ("same class as the float model [%]", 100.0),
    "sqnr_db": ("signal to quantization noise [dB]", 1.0),
}
_LOOKS = {"uniform": ("o", "tab:blue"), "plan": ("D", "tab:red"), "opponent": ("s", "tab:gray")}


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise EnvironmentLacks(
            f'plots need matplotlib ({error}): pip install "mpqc[report]"'
        ) from error
    return pyplot


def pareto_plot(builds: Sequence[Build], title: str, output: Path) -> None:
    """Quality against each cost, the builds that none beats joined by a line: a PNG.

    Raises:
        EnvironmentLacks: matplotlib is not installed.
    """
    pyplot = _pyplot()
    quality = quality_of(builds)
    named, scale = _QUALITY[quality]
    figure, panels = pyplot.subplots(1, len(COSTS), figsize=(13, 4.5), sharey=True)
    named_points: list[list[tuple[str, float, float]]] = []
    for panel, cost in zip(panels, COSTS, strict=True):
        label, factor = _AXES[cost]
        points: list[tuple[str, float, float]] = []
        for build in builds:
            x, y = build.metric(cost), build.metric(quality)
            if x is None or y is None:
                continue
            marker, colour = _LOOKS[build.role]
            panel.plot(x * factor, y * scale, marker, color=colour)
            points.append((build.name, x * factor, y * scale))
        best = [build for build in builds if build.name in pareto(builds, cost)]
        front = sorted((float(b.metric(cost) or 0), float(b.metric(quality) or 0)) for b in best)
        if front:
            xs, ys = zip(*((x * factor, y * scale) for x, y in front), strict=True)
            panel.step(xs, ys, where="post", color="tab:green", alpha=0.6, linewidth=1)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        named_points.append(points)
    panels[0].set_ylabel(named)
    figure.suptitle(title)
    figure.tight_layout()  # labels go where there is room, which depends on the final scales
    for panel, points in zip(panels, named_points, strict=True):
        _name_points(panel, points)
    figure.savefig(output, dpi=120, format="png")
    pyplot.close(figure)


_MARK = 8  # width of a point [pixels]
# Offsets of a label from its point [points of the page], and which side of it is there.
_PLACES = [
    (4 * side, step, "left" if side > 0 else "right")
    for step in (4, -10, 14, -20, 24, -30)
    for side in (1, -1)
]


def _name_points(panel: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Write names beside points, at the first place that no other name and no point has."""
    from matplotlib.transforms import Bbox

    middles = panel.transData.transform([(x, y) for _, x, y in points]) if points else ()
    taken = [Bbox.from_bounds(x - _MARK / 2, y - _MARK / 2, _MARK, _MARK) for x, y in middles]
    for name, x, y in points:
        for right, up, side in _PLACES:
            text = panel.annotate(
                name, (x, y), xytext=(right, up), textcoords="offset points", ha=side, fontsize=8
            )
            box = text.get_window_extent()
            inside = panel.bbox.containsx(box.x0) and panel.bbox.containsx(box.x1)
            inside = inside and panel.bbox.containsy(box.y0) and panel.bbox.containsy(box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:  # no room anywhere: at the first place
            right, up, side = _PLACES[0]
            text = panel.annotate(
                name, (x, y), xytext=(right, up), textcoords="offset points", ha=side, fontsize=8
            )
            box = text.get_window_extent()
        taken.append(box)
