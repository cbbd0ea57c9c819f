"""Results as tables for people, one function a verb."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mpqc.artifact import Artifact
    from mpqc.bench import Benchmark
    from mpqc.demo_run import DemoResult
    from mpqc.doctor import Check
    from mpqc.inspect_model import Forecast, Inspection
    from mpqc.target import Target
    from mpqc.verify import Verification


def quantity(value: float, unit: str = "") -> str:
    """``1570000`` -> ``1.57 M``; three significant digits."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """``0.00123`` -> ``1.23 ms``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A column whose name starts with ``>`` holds numbers. Names fold, they are never cut."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        number = column.startswith(">")
        table.add_column(
            Text(column.lstrip(">")),
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _lines(*lines: str) -> list[RenderableType]:
    return [Text(line) for line in lines]


# Verbs ---------------------------------------------------------------------------------------


def compile_table(artifact: "Artifact") -> RenderableType:
    """Layers, sizes, seconds and fallbacks of a compilation."""
    manifest, report = artifact.manifest, artifact.report
    rows = [
        (
            layer["name"], _ran(layer),
            " ".join(filter(None, (layer["kernel"], layer["variant"]))),
            f"{layer['accumulator']} < {quantity(layer['bound'] + 1)}" if layer["bound"] else "",
            quantity(layer["macs"]) if layer["macs"] else "",
        )
        for layer in manifest["layers"]
    ]  # fmt: skip
    fallbacks: dict[str, list[str]] = {}
    kept: dict[str, list[str]] = {}
    for layer in manifest["layers"]:
        if layer["reason"]:
            fallbacks.setdefault(layer["reason"], []).append(layer["name"])
    for name, why in manifest["kept"].items():
        if name not in {layer["name"] for layer in manifest["layers"]}:
            kept.setdefault(why, []).append(name)
    cost, size, seconds = report["cost"], report["bytes"], report["seconds"]
    phases = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    return Group(
        _table(
            f"{artifact.folder}: {manifest['model']['file']} for {manifest['target']['name']}",
            ("layer", "runs as", "kernel", ">accumulator", ">MACs"),
            rows,
        ),
        *_lines(
            f"costs    weights {quantity(cost['size'], 'B')}, scales and biases "
            f"{quantity(cost['scale_bytes'] + cost['bias_bytes'], 'B')}, "
            f"{quantity(cost['bitops'])} BitOPs",
            f"files    model.so {quantity(size['library'], 'B')}, working memory "
            f"{quantity(size['arena'], 'B')}",
            f"seconds  {sum(seconds.values()):.2f}: {phases}",
        ),
        *_lines(*(f"fallback {why}: {', '.join(names)}" for why, names in fallbacks.items())),
        *_lines(*(f"in float {why}: {', '.join(names)}" for why, names in kept.items())),
    )


def _ran(layer: Mapping[str, Any]) -> str:
    """Widths; what the plan says of channels stands before what runs."""
    run: str = layer["run"] or "float"
    if not layer.get("channels"):
        return run
    counts = " ".join(f"{count}x{bits}" for bits, count in layer["channels"].items())
    return f"{run} (bits {counts})"


def verify_table(result: "Verification") -> RenderableType:
    """Values, agreement, verdict."""
    seen = {row.value for row in result.layers}
    shown = [*result.layers, *(row for row in result.outputs if row.value not in seen)]
    rows = [(row.value, row.layer, row.kernel, row.verdict) for row in shown]
    lines = []
    agreement = result.agreement
    if agreement is not None:
        facts = []
        if agreement.top1 is not None:
            facts.append(f"same class on {agreement.top1:.2%}")
        facts += [
            f"{name} SQNR {'no noise' if noise is None else f'{noise:.1f} dB'}"
            for name, noise in agreement.sqnr_db.items()
        ]
        name = "original model" if result.original else "float model"
        lines.append(f"{name}: {', '.join(facts)} ({agreement.samples} samples)")
        if agreement.accuracy is not None and agreement.float_accuracy is not None:
            lines.append(
                f"accuracy: {agreement.accuracy:.2%}; {name} {agreement.float_accuracy:.2%}"
            )
    elif result.note and not result.original:
        lines.append(f"float model not compared: {result.note}")
    if result.original is not None:
        lines.append(f"{result.original.file}: {result.original.message}")
    table = _table("values", ("value", "layer", "kernel", "against the reference"), rows)
    return Group(table, *_lines(*lines, result.message))


def bench_table(result: "Benchmark") -> RenderableType:
    """Contestants, then layers where asked for."""
    own = result.timings[0].best
    timings = [
        (timing.name, duration(timing.best), duration(timing.median), str(timing.runs),
         f"{timing.best / own:.2f} x")
        for timing in result.timings
    ]  # fmt: skip
    threads = f"{result.threads} thread{'' if result.threads == 1 else 's'}"
    parts: list[RenderableType] = [
        _table(
            f"batch {result.batch}, {threads}, {result.machine['processor']}",
            ("", ">fastest", ">median", ">runs", ">time against mpqc"),
            timings,
        )
    ]
    if result.layers:
        rows = [
            (layer.layer, layer.kernel, duration(layer.best), duration(layer.median),
             f"{layer.macs_per_second / 1e9:.3g}" if layer.macs else "")
            for layer in result.layers
        ]  # fmt: skip
        columns = ("step", "kernel", ">fastest", ">median", ">GMAC/s")
        parts.append(_table("steps", columns, rows))
    return Group(*parts)


def inspect_table(result: "Inspection") -> RenderableType:
    """Interface, layers, costs, problems."""
    operators = ", ".join(f"{op} {count}" for op, count in result.operators.items())
    types = [f"input    {name} {kind}" for name, kind in result.inputs.items()]
    types += [f"output   {name} {kind}" for name, kind in result.outputs.items()]
    layers = [
        (row.name, row.op, _shape(row.input), _shape(row.output),
         quantity(row.macs) if row.macs else "", quantity(row.weights) if row.weights else "",
         row.widths or ("yes" if row.quantizable else f"no: {row.reason}"))
        for row in result.layers
    ]  # fmt: skip
    gains = result.forecast.gains if result.forecast else {}
    costs = [
        (cost.widths, quantity(cost.size, "B"), quantity(cost.scale_bytes + cost.bias_bytes, "B"),
         quantity(cost.bitops), _times(gains.get(cost.widths.removeprefix("others "))))
        for cost in result.costs
    ]  # fmt: skip
    columns = ["every layer at", ">weights", ">scales, biases", ">BitOPs", ">expected gain"]
    if not gains:
        columns, costs = columns[:-1], [row[:-1] for row in costs]  # type: ignore[misc]
    told = {row.name for row in result.layers if row.reason}
    parts: list[RenderableType] = [
        *_lines(f"model    {result.model} (opset {result.opset})", *types),
        *_lines(f"nodes    {result.nodes}: {operators}"),
        _table(
            "layers", ("layer", "op", "input", "output", ">MACs", ">weights", "quantizable"), layers
        ),
        _table("costs", columns, costs),
    ]
    if result.forecast:
        parts += _forecast(result.forecast)
    kept = {name: why for name, why in result.kept.items() if name not in told}
    if kept:
        parts.append(_table("stays in float", ("node", "why"), kept.items()))
    if result.problems:
        rows = [(problem.node, problem.op, problem.reason) for problem in result.problems]
        parts.append(_table("cannot be compiled", ("node", "op", "why, and what to do"), rows))
    return Group(*parts, *_lines(result.message))


def _forecast(forecast: "Forecast") -> list[RenderableType]:
    if not forecast.layers:
        return []
    columns = list(dict.fromkeys(widths for by in forecast.layers.values() for widths in by))
    rows = [
        (name, *(f"{by[w].kernel} {by[w].gain:.2f} x" if w in by else "" for w in columns))
        for name, by in forecast.layers.items()
    ]
    title = f"kernels expected on {forecast.target}, and their speed against int8 kernels"
    return [_table(title, ("layer", *columns), rows)]


def _times(gain: float | None) -> str:
    return "" if gain is None else f"{gain:.2f} x"


def doctor_table(found: Sequence["Check"]) -> RenderableType:
    """One line a check."""
    rows = [
        ("ok" if check.ok else "MISSING" if check.required else "-", check.name, check.found,
         check.needed_for, check.cure)
        for check in found
    ]  # fmt: skip
    columns = ("", "what", "found", "needed for", "to do")
    return _table("this machine", columns, rows)


def targets_table(targets: Sequence["Target"]) -> RenderableType:
    """One line a target."""
    rows = [
        (target.name, target.arch, " ".join(sorted(target.features)),
         "yes" if target.runs_here else "no", target.about)
        for target in targets
    ]  # fmt: skip
    columns = ("target", "architecture", "extensions used", "runs here", "what it is")
    return _table("targets", columns, rows)


def demo_table(result: "DemoResult") -> RenderableType:
    """Builds beside the float model."""
    own = result.builds[0]
    rows = [
        (build.name, f"{build.accuracy:.2%}", f"{build.agreement:.2%}",
         f"{build.size:,.0f}", quantity(build.bitops), duration(build.seconds),
         f"{own.seconds / build.seconds:.2f} x",
         {None: "", True: "bit for bit", False: "FAILED"}[build.verified])
        for build in result.builds
    ]  # fmt: skip
    columns = (
        "build", ">accuracy", ">same as float", ">weights [B]", ">BitOPs", ">latency", ">speedup",
        "verified",
    )  # fmt: skip
    return Group(
        _table(
            f"digits: {result.samples} test pictures; latency of one, 1 thread, fastest run; "
            "float is ONNX Runtime",
            columns,
            rows,
        ),
        *_lines(
            f"artifacts in {_inside(result.folder)}: "
            f"{', '.join(f'{b.folder}/' for b in result.builds if b.folder)}; model and data "
            f"beside them; {result.seconds:.0f} s in all",
            *([f"plot in {_inside(result.folder)}demo.png"] if result.plotted else []),
        ),
    )


def _inside(folder: Path) -> str:
    return f"{folder}/"


def plain(result: Any) -> RenderableType:
    """The result's one-line message."""
    return Text(result.message)
