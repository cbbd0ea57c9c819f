"""Single convolutions against ONNX Runtime: float and int8 (QDQ, U8S8 per channel), one process.

    python -m benchmarks.layers [--target x86-64-v3] [--ort-isa avx2] [--widths w1a1,w2a2]
        [-o FOLDER] [--markdown docs/kernels.md]

Every build and every session of ONNX Runtime runs in turn; the fastest run of each counts. Two
times are given for every contestant: *alone* is a network of this layer and nothing else, float in
and float out; *inside* is what one more such layer costs within a network, a fourth of the
difference between five layers in a row and one: padding, packing, the kernel, and the requantizing
epilogue, but no float tensor. Layers that cannot follow themselves are timed alone. Options are
those of network.py.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.builds import Recipe
from benchmarks.clock import Clock
from benchmarks.ort_avx2 import ISAS, use_isa
from benchmarks.turns import TIMERS, take_turns
from mpqc.errors import MpqcError
from mpqc.graph import Precision

WIDTHS = "w1a1,w1a2,w2a2,w4a4,w8a8"
OPPONENTS = ("ort-int8", "ort-fp32")
LONGER = 5  # layers of the longer network

# Times the opponent's speed that a build for AVX2 must reach on one thread, in 3x3 layers.
FLOORS: Mapping[str, Mapping[str, float]] = {
    "ort-int8": {"w1a1": 5.0, "w1a2": 4.2, "w2a2": 2.5, "w4a4": 1.25, "w8a8": 0.95},
    "ort-fp32": {"w1a1": 10.0, "w1a2": 8.5, "w2a2": 5.0, "w4a4": 2.5, "w8a8": 1.9},
}


@dataclass(frozen=True)
class Convolution:
    """Geometry of a square layer."""

    channels: int
    size: int
    out: int
    kernel: int
    stride: int = 1

    @property
    def pad(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.pad - self.kernel) // self.stride + 1

    @property
    def macs(self) -> int:
        return self.channels * self.out * self.kernel**2 * self.out_size**2

    @property
    def repeats(self) -> bool:
        """Whether its output may be its input."""
        return self.channels == self.out and self.stride == 1


LAYERS = {
    "3x3 64@56": Convolution(64, 56, 64, 3),
    "3x3 128@28": Convolution(128, 28, 128, 3),
    "3x3 256@14": Convolution(256, 14, 256, 3),
    "3x3 512@7": Convolution(512, 7, 512, 3),
    "3x3 s2 64-128": Convolution(64, 56, 128, 3, 2),
    "1x1 256-512@14": Convolution(256, 14, 512, 1),
    "7x7 s2 stem": Convolution(3, 224, 64, 7, 2),
}


def network(layer: Convolution, length: int) -> bytes:
    """Convolutions, each with ReLU, in a row, as ONNX."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    shape = (layer.out, layer.channels, layer.kernel, layer.kernel)
    deviation = (2 / (layer.channels * layer.kernel**2)) ** 0.5
    for i in range(length):
        weight = random.normal(0, deviation, shape).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes += [
            helper.make_node(
                "Conv", [value, f"w{i}"], [f"c{i}"], f"layer{i}",
                strides=[layer.stride] * 2, pads=[layer.pad] * 4,
            ),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"], f"relu{i}"),
        ]  # fmt: skip
        value = f"r{i}"
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "layers",
        [tensor("x", TensorProto.FLOAT, [1, layer.channels, layer.size, layer.size])],
        [tensor(value, TensorProto.FLOAT, [1, layer.out, layer.out_size, layer.out_size])],
        weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def bound(kernel: str, bits: Precision, wide: bool) -> float:
    """Multiply-accumulates a cycle that the inner loop's instructions allow; 0: not known.

    Args:
        kernel: kind and variant, as manifests write them.
        bits: widths.
        wide: whether vectors have 512 bits, which the core executes in two halves.
    """
    kind, _, variant = kernel.partition(" ")
    if variant == "and-popcount":
        return (341 if wide else 128) / (bits.weight * bits.activation)
    if kind == "bitplane-lut":
        rate = 128 if variant.startswith("vpshufb128") else 256
        # of pairs: ten operations for what takes twelve
        return rate * (1.2 if variant.endswith("-pairs") else 1.0) / bits.weight
    return _MULTIPLY.get(variant, 0)


# Two multiplications of 256 bits a cycle, or one of 512 or two of 128.
_MULTIPLY: Mapping[str, float] = {
    "vpmaddubsw128": 32, "vpmaddubsw256": 64, "vpmaddubsw512": 64,
    "vpmaddwd128": 16, "vpmaddwd256": 32, "vpmaddwd512": 32,
    "vpdpbusd256": 64, "vpdpbusd512": 64,
}  # fmt: skip


def measure(
    name: str,
    widths: Sequence[str],
    recipe: Recipe,
    rounds: int,
    builds: Path,
    clock: Clock,
    timer: str = "wall",
) -> dict[str, Any]:
    """Times of one layer.

    Args:
        name: of ``LAYERS``.
        widths: to build for.
        recipe: how.
        rounds: turns of each contestant.
        builds: folder that keeps compiled models.
        clock: looks at the clock now and then.
        timer: of ``turns.TIMERS``.
    """
    import numpy as np

    from mpqc.ort import Session, quantize_static

    layer = LAYERS[name]
    shape = (1, layer.channels, layer.size, layer.size)
    feeds = [{"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}]
    runs: dict[str, Callable[[int], list[float]]] = {}
    kernels: dict[str, str] = {}

    def enter(name: str, contestant: Any) -> None:
        runs[name] = partial(contestant.seconds, feeds[0])

    with tempfile.TemporaryDirectory() as folder:
        for length in (1, LONGER) if layer.repeats else (1,):
            model = Path(folder, f"{name.replace(' ', '-').replace('@', '-')}x{length}.onnx")
            model.write_bytes(network(layer, length))
            enter(f"ort-fp32 {length}", Session(model, optimise=True))
            enter(f"ort-int8 {length}", Session(quantize_static(model, feeds), optimise=True))
            for width in widths:
                compiled = recipe.load(model, Precision.parse(width), feeds, builds)
                enter(f"{width} {length}", compiled)
                # the last has no successor, the first reads floats: one between tells
                record = compiled.manifest["layers"][length // 2]
                kernels[width] = f"{record['kernel']} {record.get('variant') or ''}".strip()
        times = take_turns(runs, rounds, clock, timer=timer)
    seconds = {}
    for contestant in (*OPPONENTS, *widths):
        alone = times[f"{contestant} 1"]
        seconds[contestant] = {"alone": alone.best, "median": alone.median}
        if layer.repeats:
            more = times[f"{contestant} {LONGER}"].best - alone.best
            seconds[contestant]["inside"] = more / (LONGER - 1)
    return {"layer": name, "macs": layer.macs, "seconds": seconds, "kernels": kernels}


def time_of(result: Mapping[str, Any], contestant: str) -> float:
    """Inside a network where the layer can be, else alone [s]."""
    seconds = result["seconds"][contestant]
    return float(seconds.get("inside", seconds["alone"]))


def summary(content: Mapping[str, Any]) -> str:
    """The table of the results, Markdown."""
    head = [
        "layer", "width", "kernel", "us inside", "us alone", "MAC/cycle", "bound", "% of it",
        "x int8", "x float", "alone x int8", "alone x float",
    ]  # fmt: skip
    rows = []
    for result in content["layers"]:
        for width in content["widths"]:
            seconds, own = result["seconds"], time_of(result, width)
            rate = result["macs"] / own / content["hertz"]
            kernel = result["kernels"][width]
            limit = bound(kernel, Precision.parse(width), content["wide"])
            inside = seconds[width].get("inside")
            row = [result["layer"], width, kernel, f"{inside * 1e6:.0f}" if inside else ""]
            row += [f"{seconds[width]['alone'] * 1e6:.0f}", f"{rate:.1f}"]
            row += [f"{limit:.0f}", f"{100 * rate / limit:.0f}"] if limit else ["", ""]
            row += [f"{time_of(result, opponent) / own:.2f}" for opponent in OPPONENTS]
            alone = seconds[width]["alone"]
            row += [f"{seconds[opponent]['alone'] / alone:.2f}" for opponent in OPPONENTS]
            rows.append(row)
    return report.table(head, rows)


def against_floors(content: Mapping[str, Any]) -> str:
    """The least ratio over the 3x3 layers beside what is asked for, Markdown."""
    results = [r for r in content["layers"] if LAYERS[r["layer"]].repeats]
    rows = []
    for opponent in OPPONENTS:
        for where in ("inside", "alone"):
            row = [f"{opponent}, {where}"]
            for width in content["widths"]:
                ratios = [r["seconds"][opponent][where] / r["seconds"][width][where]
                          for r in results]  # fmt: skip
                floor = FLOORS[opponent].get(width)
                asked = f" (floor {floor:g})" if floor else ""
                row.append(f"{min(ratios):.2f} to {max(ratios):.2f}{asked}")
            rows.append(row)
    return report.table(["3x3 layers, times as fast as", *content["widths"]], rows)


def write(content: Mapping[str, Any], folder: Path, document: Path | None) -> None:
    """Print the tables; write JSON, plot and the document's section."""
    path = folder / f"layers-{content['target']}.json"
    report.save(path, content)
    from benchmarks.network import conditions

    text = f"{conditions(content)}\n\n{summary(content)}"
    if content["ort_isa"] == "avx2" and any(LAYERS[r["layer"]].repeats for r in content["layers"]):
        text += f"\n\n{against_floors(content)}"
    print(text)
    report.bars(
        path.with_suffix(".png"),
        [result["layer"] for result in content["layers"]],
        {
            width: [time_of(r, "ort-int8") / time_of(r, width) for r in content["layers"]]
            for width in content["widths"]
        },
        "times as fast as ONNX Runtime int8",
    )
    if document:
        report.replace_section(document, f"layers {content['target']}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="native")
    parser.add_argument("--ort-isa", choices=ISAS, default="native")
    parser.add_argument("--kernel", default="auto", help="force one kind of kernel")
    parser.add_argument("--latencies", type=Path, help="table of mpqc profile to choose kernels by")
    parser.add_argument("--widths", default=WIDTHS)
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--timer", choices=TIMERS, default="wall", help="cpu: of one thread")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="document to update")
    args = parser.parse_args(arguments)
    try:
        use_isa(args.ort_isa)

        from mpqc import pipeline
        from mpqc.bench import machine
        from mpqc.target import find_target

        recipe = Recipe(args.target, args.kernel, args.latencies, ends=None)
        clock, widths, results = Clock(), args.widths.split(","), []
        for name in args.layers.split(","):
            print(name, file=sys.stderr)
            builds = args.output / "builds"
            results.append(measure(name, widths, recipe, args.rounds, builds, clock, args.timer))
        content = {
            "target": args.target, "ort_isa": args.ort_isa, "kernel": args.kernel, "threads": 1,
            "timer": args.timer,
            "wide": find_target(args.target).vector_bits == 512, "hertz": clock.hertz,
            "widths": widths, "layers": results, "machine": machine(pipeline.versions()),
        }  # fmt: skip
        write(content, args.output, args.markdown)
    except MpqcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
