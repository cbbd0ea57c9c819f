"""Whole networks against ONNX Runtime, float and int8 (QDQ, U8S8 per channel), in one process.

    python -m benchmarks.network [--model resnet18] [--target x86-64-v3] [--ort-isa avx2]
        [--widths w1a1,w2a2] [--threads 1,2] [--timer cpu] [-o FOLDER]
        [--markdown docs/kernels.md]

Every build and every session of ONNX Runtime runs in turn; the fastest run of each counts, medians
are kept beside it. ``--ort-isa avx2`` has ONNX Runtime compute as on a processor without AVX-512
(see ort_avx2.py), which is the fair opponent of a build for x86-64-v3. Writes JSON and, where
matplotlib is installed, a plot; ``--markdown`` writes the table into the section of a document that
is named after network and target. Compiled models are kept in the folder: a second run goes
straight to measuring.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.builds import Recipe
from benchmarks.clock import Clock
from benchmarks.ort_avx2 import ISAS, use_isa
from benchmarks.turns import REST, TIMERS, Time, take_turns
from mpqc.errors import MpqcError
from mpqc.graph import Precision

WIDTHS = "w1a1,w1a2,w2a2,w4a4,w8a8"
OPPONENTS = {"ort-fp32": "ONNX Runtime float", "ort-int8": "ONNX Runtime int8"}

# Times the opponent's speed that a build for AVX2 must reach on one thread.
FLOORS: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "resnet18": {
        "ort-int8": {"w1a1": 3.2, "w1a2": 2.9, "w2a2": 2.0, "w4a4": 1.25, "w8a8": 0.95},
        "ort-fp32": {"w1a1": 6.0, "w1a2": 5.5, "w2a2": 3.8, "w4a4": 2.4, "w8a8": 1.85},
    },
    "mobilenet_v2": {"ort-int8": {"w4a4": 1.0}, "ort-fp32": {}},
}


def model_file(name: str, folder: Path) -> Path:
    """A file as it is, or a topology of ``benchmarks.models`` with random weights."""
    if name.endswith(".onnx"):
        return Path(name)
    import onnx

    from benchmarks.models import MODELS

    path = folder / f"{name}.onnx"
    onnx.save(MODELS[name](0), path)
    return path


def measure(
    model: Path,
    widths: Sequence[str],
    recipe: Recipe,
    threads: Sequence[int],
    rounds: int,
    builds: Path,
    timer: str = "wall",
) -> dict[str, Any]:
    """Time a network at all widths and thread counts beside ONNX Runtime.

    Args:
        model: ONNX file.
        widths: of the body.
        recipe: how it is compiled.
        threads: counts.
        rounds: turns of each contestant.
        builds: folder that keeps compiled models.
        timer: of ``turns.TIMERS``.
    """
    from mpqc import pipeline
    from mpqc.bench import machine
    from mpqc.ort import Session, quantize_static
    from mpqc.verify import random_feeds

    feeds = random_feeds(pipeline.import_model(model).inputs, 2)
    runs: dict[str, Callable[[int], list[float]]] = {}

    def enter(name: str, contestant: Any, count: int) -> None:
        runs[f"{name}@{count}"] = partial(contestant.seconds, feeds[0])

    sources = {"ort-fp32": model.read_bytes(), "ort-int8": quantize_static(model, feeds)}
    compiled: dict[str, Any] = {}
    for count in threads:
        for name, source in sources.items():
            enter(name, Session(source, count, optimise=True), count)
        for width in widths:
            print(f"{model.stem} {width}, {count} threads", file=sys.stderr)
            compiled[width] = recipe.load(model, Precision.parse(width), feeds, builds, count)
            enter(width, compiled[width], count)
    clock = Clock()
    times = take_turns(runs, rounds, clock, rest=REST, timer=timer)
    return {
        "model": model.stem,
        "target": recipe.target,
        "kernel": recipe.kernel,
        "hertz": clock.hertz,
        "timer": timer,
        "macs": sum(layer["macs"] for layer in compiled[widths[0]].manifest["layers"]),
        "widths": list(widths),
        "threads": {str(count): _of(times, count) for count in threads},
        "kernels": {width: _kernels(one.manifest) for width, one in compiled.items()},
        "machine": machine(pipeline.versions()),
    }


def _of(times: Mapping[str, Time], threads: int) -> dict[str, Any]:
    ending = f"@{threads}"
    return {
        name.removesuffix(ending): asdict(time)
        for name, time in times.items()
        if name.endswith(ending)
    }


def _kernels(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Layers that run on each kernel."""
    names = [f"{layer['kernel']} {layer.get('variant') or ''}" for layer in manifest["layers"]]
    return {name.strip(): names.count(name) for name in sorted(set(names))}


def ratio(result: Mapping[str, Any], opponent: str, width: str, threads: str = "1") -> float:
    """How many times longer the opponent takes."""
    times = result["threads"][threads]
    return float(times[opponent]["best"] / times[width]["best"])


def summary(result: Mapping[str, Any]) -> str:
    """The table of a result, Markdown."""
    counts = list(result["threads"])
    first, rest = counts[0], counts[1:]
    floors = FLOORS.get(result["model"], {}) if result["ort_isa"] == "avx2" else {}
    head = ["", "ms", "median", "MAC/cycle"]
    head += ["x int8", "floor", "x float", "floor"] if floors else ["x int8", "x float"]
    for count in rest:
        head += [f"ms, {count} threads", "speed-up", "x int8", "x float"]
    rows = []
    for name in [*OPPONENTS, *result["widths"]]:
        time = result["threads"][first][name]
        rate = result["macs"] / (time["best"] * result["hertz"])
        row = [OPPONENTS.get(name, name), *_milliseconds(time), f"{rate:.1f}"]
        for opponent in ("ort-int8", "ort-fp32"):
            row.append(f"{ratio(result, opponent, name, first):.2f}")
            if floors:
                floor = floors[opponent].get(name)
                row.append(f"{floor:.2f}" if floor else "")
        for count in rest:
            several = result["threads"][count][name]
            row += [_milliseconds(several)[0], f"{time['best'] / several['best']:.2f}"]
            row += [f"{ratio(result, o, name, count):.2f}" for o in ("ort-int8", "ort-fp32")]
        rows.append(row)
    return report.table(head, rows)


def _milliseconds(time: Mapping[str, float]) -> tuple[str, str]:
    return f"{time['best'] * 1e3:.2f}", f"{time['median'] * 1e3:.2f}"


def conditions(result: Mapping[str, Any]) -> str:
    """One line on where the figures come from."""
    isa = "AVX2" if result["ort_isa"] == "avx2" else "all that the processor has"
    machine = result["machine"]
    return (
        f"{machine['processor']} at {result['hertz'] / 1e9:.2f} GHz; target {result['target']}; "
        f"ONNX Runtime {machine['measured_with']['onnxruntime']} on {isa}"
        + ("; CPU time of a thread on a busy machine." if result.get("timer") == "cpu" else ".")
    )


def write(result: Mapping[str, Any], folder: Path, document: Path | None) -> None:
    """Print the table; write JSON, plot and the document's section."""
    name = f"{result['model']} {result['target']}"
    path = folder / f"network-{name.replace(' ', '-')}.json"
    report.save(path, result)
    text = f"{conditions(result)}\n\n{summary(result)}"
    print(f"{result['model']}: {text}")
    widths = result["widths"]
    floors = FLOORS.get(result["model"], {}) if result["ort_isa"] == "avx2" else {}
    first = next(iter(result["threads"]))
    report.bars(
        path.with_suffix(".png"),
        widths,
        {
            OPPONENTS[opponent]: [ratio(result, opponent, width, first) for width in widths]
            for opponent in OPPONENTS
        },
        f"{result['model']}: times as fast as",
        {
            OPPONENTS[opponent]: [values.get(width, float("nan")) for width in widths]
            for opponent, values in floors.items()
        },
    )
    if document:
        report.replace_section(document, f"network {name}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="of benchmarks.models, or an ONNX file")
    parser.add_argument("--target", default="native")
    parser.add_argument("--ort-isa", choices=ISAS, default="native")
    parser.add_argument("--kernel", default="auto", help="force one kind of kernel")
    parser.add_argument("--latencies", type=Path, help="table of mpqc profile to choose kernels by")
    parser.add_argument("--widths", default=WIDTHS)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--timer", choices=TIMERS, default="wall", help="cpu: of one thread")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="document to update")
    args = parser.parse_args(arguments)
    try:
        use_isa(args.ort_isa)
        recipe = Recipe(args.target, args.kernel, args.latencies)
        threads = [int(word) for word in args.threads.split(",")]
        with tempfile.TemporaryDirectory() as folder:
            model = model_file(args.model, Path(folder))
            widths = args.widths.split(",")
            builds = args.output / "builds"
            result = measure(model, widths, recipe, threads, args.rounds, builds, args.timer)
        write({"ort_isa": args.ort_isa, **result}, args.output, args.markdown)
    except MpqcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
