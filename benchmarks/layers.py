"""Single convolutions against ONNX Runtime: float and int8 (QDQ, U8S8 per channel), one process.

    python benchmarks/layers.py [--target x86-64-v3] [--widths w1a1,w2a2] -o layers

Every build and both ONNX Runtime sessions run in turn; the fastest of each counts. Two times are
given for ours: *layer* is what the layer costs inside a network (padding, packing, the kernel with
its requantizing epilogue), *whole* adds the float input and output of a network of one layer, as
ONNX Runtime's times do. Writes JSON, and a plot where matplotlib is installed.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from mpqc import pipeline, runtime
from mpqc.bench import machine
from mpqc.data import open_data
from mpqc.graph import Precision
from mpqc.ort import Session, quantize_static
from mpqc.target import find_target

LAYERS = {  # name: channels in, pixels, channels out, kernel, stride, pad
    "3x3 64@56": (64, 56, 64, 3, 1, 1),
    "3x3 128@28": (128, 28, 128, 3, 1, 1),
    "3x3 256@14": (256, 14, 256, 3, 1, 1),
    "3x3 512@7": (512, 7, 512, 3, 1, 1),
    "3x3 s2 64-128": (64, 56, 128, 3, 2, 1),
    "1x1 256-512@14": (256, 14, 512, 1, 1, 0),
    "7x7 s2 stem": (3, 224, 64, 7, 2, 3),
}


def network(layer: tuple[int, int, int, int, int, int], follower: bool) -> bytes:
    """Conv + Relu as ONNX; with a follower the result is quantized again, as inside a network."""
    channels, size, out, kernel, stride, pad = layer
    rng = np.random.default_rng(0)

    def weights(name: str, o: int, i: int, k: int) -> Any:
        values = rng.normal(0, (2 / (i * k * k)) ** 0.5, (o, i, k, k)).astype(np.float32)
        return numpy_helper.from_array(values, name)

    after = (size + 2 * pad - kernel) // stride + 1
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "layer", strides=[stride] * 2, pads=[pad] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
    ]
    arrays, result, depth = [weights("w", out, channels, kernel)], "r", out
    if follower:
        nodes.append(helper.make_node("Conv", ["r", "v"], ["y"], "follower"))
        arrays.append(weights("v", 8, out, 1))
        result, depth = "y", 8
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "layer",
        [value("x", TensorProto.FLOAT, [1, channels, size, size])],
        [value(result, TensorProto.FLOAT, [1, depth, after, after])],
        arrays,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


class Build:
    """A compiled network of one layer."""

    def __init__(self, model: Path, bits: Precision, target: str, kernel: str, feeds: Any) -> None:
        data = open_data(feeds, pipeline.import_model(model))
        options = pipeline.Options(find_target(target), kernel=kernel)
        folder = model.with_suffix(f".{bits}.{target}.{kernel}")
        artifact = pipeline.compile_model(
            model, folder, options, bits=bits, ends=None, data=data, overwrite=True
        )
        self.manifest = artifact.manifest
        self.model = runtime.load(artifact.folder)
        self.feeds = feeds

    @property
    def kernel(self) -> str:
        record = self.manifest["layers"][0]
        return f"{record['kernel']} {record['variant']}"

    def whole(self) -> float:
        return min(self.model.seconds(self.feeds, 3))

    def layer(self) -> float:
        """Steps from the codes of the input to the codes of the output."""
        stepper = self.model.steps(self.feeds)
        total = 0.0
        for index, step in enumerate(self.manifest["steps"]):
            elapsed = stepper.step(index)
            if step["kind"] not in ("float", "elementwise"):
                total += elapsed
            if step["label"] == "layer" and step["kind"] != "window_sum":
                break
        return total


def measure(name: str, widths: list[str], target: str, kernel: str, rounds: int) -> dict[str, Any]:
    """Times [s] of one layer."""
    layer = LAYERS[name]
    rng = np.random.default_rng(1)
    feeds = {"x": rng.normal(size=(1, layer[0], layer[1], layer[1])).astype(np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        single, inner = Path(folder) / "single.onnx", Path(folder) / "inner.onnx"
        single.write_bytes(network(layer, follower=False))
        inner.write_bytes(network(layer, follower=True))
        runs = {"ort-fp32": Session(single, optimise=True)}
        runs["ort-int8"] = Session(quantize_static(single, [feeds]), optimise=True)
        whole = {w: Build(single, Precision.parse(w), target, kernel, feeds) for w in widths}
        inside = {w: Build(inner, Precision.parse(w), target, kernel, feeds) for w in widths}
        best: dict[str, float] = {}

        def keep(key: str, seconds: float) -> None:
            best[key] = min(best.get(key, seconds), seconds)

        for _ in range(rounds):
            for key, session in runs.items():
                keep(key, min(session.seconds(feeds, 3)))
            for width in widths:
                keep(f"{width} whole", whole[width].whole())
                keep(f"{width} layer", inside[width].layer())
        channels, size, out, window, stride, pad = layer
        macs = channels * out * window**2 * ((size + 2 * pad - window) // stride + 1) ** 2
        return {
            "layer": name, "macs": macs, "seconds": best,
            "kernels": {width: inside[width].kernel for width in widths},
        }  # fmt: skip


def table(results: list[dict[str, Any]], widths: list[str]) -> str:
    """Ratios of ONNX Runtime's time to the layer's, and multiply-accumulates a nanosecond."""
    columns = ("us", "GMAC/s", "x int8", "x fp32")
    lines = [f"{'layer':16s} {'width':5s} " + " ".join(f"{c:>7s}" for c in columns) + "  kernel"]
    for result in results:
        seconds = result["seconds"]
        for width in widths:
            own = seconds[f"{width} layer"]
            lines.append(
                f"{result['layer']:16s} {width:5s} {own * 1e6:7.0f} "
                f"{result['macs'] / own / 1e9:7.0f} {seconds['ort-int8'] / own:7.2f} "
                f"{seconds['ort-fp32'] / own:7.2f}  {result['kernels'][width]}"
            )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], widths: list[str], path: Path) -> None:
    """Bars of the speed-up over ONNX Runtime int8."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 4))
    for index, width in enumerate(widths):
        values = [r["seconds"]["ort-int8"] / r["seconds"][f"{width} layer"] for r in results]
        places = np.arange(len(results)) + (index - len(widths) / 2) * 0.8 / len(widths)
        axes.bar(places, values, 0.8 / len(widths), label=width, align="edge")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(results)), [r["layer"] for r in results], rotation=20)
    axes.set_ylabel("times ONNX Runtime int8")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--target", default="native")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--widths", default="w1a1,w1a2,w2a2,w4a4,w8a8")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, default=Path("layers"))
    args = parser.parse_args()
    widths = args.widths.split(",")
    results = []
    for name in args.layers.split(","):
        start = time.perf_counter()
        results.append(measure(name, widths, args.target, args.kernel, args.rounds))
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    print(table(results, widths))
    facts = machine(pipeline.versions())
    report = {"target": args.target, "threads": 1, "machine": facts, "layers": results}
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    try:
        plot(results, widths, args.output.with_suffix(".png"))
    except ImportError:
        print("no plot: install matplotlib (pip install 'mpqc[report]')", file=sys.stderr)


if __name__ == "__main__":
    main()
