"""Our 3x3 layers beside TVM's own bit-serial convolution, ``tvm.topi.nn.bitserial_conv2d_nhwc``.

    python -m benchmarks.topi [--target x86-64-v3] [--widths w1a1,w2a2] [-o FOLDER]
        [--markdown docs/kernels.md]

TVM 0.27 still defines the operator but ships no schedule for it. This is the schedule that its
users could write with the same tools: weights packed ahead of time with output channels innermost,
output rows in parallel, pixels by channels in registers, channels vectorized, planes unrolled so
that shifts are by constants, activations packed by rows. For every layer and width the fastest of
the word types and tiles below is taken, after its result was compared with an integer convolution.

The unsigned definition is taken, with one popcount. The other one, *bipolar* (weight bits are -1 or
+1), needs two and is not exact: its differences wrap in words narrower than the sums, and on AVX2
some wider ones come out wrong too. The time ends with integer sums: what would make the weights
signed, and requantization, are not in it; ours includes both (see layers.py: *inside*).
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import te, topi
from tvm.s_tir import Schedule

from benchmarks import layers, report
from benchmarks.builds import Recipe
from benchmarks.clock import Clock
from benchmarks.layers import LAYERS, LONGER, Convolution
from benchmarks.turns import take_turns
from mpqc import pipeline
from mpqc.artifact import Artifact
from mpqc.bench import machine
from mpqc.errors import MpqcError
from mpqc.graph import Array, Precision
from mpqc.target import Target, find_target, llvm_target
from mpqc.verify import verify

PIXELS = (2, 4, 7)
CHANNELS = (16, 32, 64)
WORDS = (8, 16, 32, 64)
TRIALS = 5  # runs of a candidate


@dataclass(frozen=True)
class Form:
    """One way to compute a layer with topi.

    Attributes:
        word: bits that are packed into one integer.
        pixels: of a row, in registers.
        channels: of the same tile.
    """

    word: int
    pixels: int
    channels: int

    def __str__(self) -> str:
        return f"uint{self.word}, {self.pixels}x{self.channels}"


class _ChannelsInnermost:
    """Packed weights as topi reads them: [ky, kx, word, channel, plane].

    Packed weights are the operator's fifth argument form, but it takes the number of channels from
    the last axis and reads the planes there. This view has the shape and the indices that it wants.
    """

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor  # [ky, kx, word, plane, channel]
        self.shape = tensor.shape

    def __getitem__(self, index: tuple[Any, ...]) -> Any:
        ky, kx, word, channel, plane = index
        return self._tensor[ky, kx, word, plane, channel]


def convolution(layer: Convolution, bits: Precision, form: Form) -> Any:
    """The scheduled function: uint8 codes NHWC and packed weights to sums NHWC."""
    size, word = layer.size, f"uint{form.word}"
    data = te.placeholder((1, size, size, layer.channels), "uint8", "data")
    kernel = te.placeholder(
        (layer.kernel, layer.kernel, layer.channels // form.word, bits.weight, layer.out), word,
        "kernel",
    )  # fmt: skip
    sums = topi.nn.bitserial_conv2d_nhwc(
        data, _ChannelsInnermost(kernel), layer.stride, layer.pad, bits.activation, bits.weight,
        word, _sum_type(layer, bits), unipolar=False,
    )  # fmt: skip
    sch = Schedule(te.create_prim_func([data, kernel, sums], index_dtype_override="int64"), seed=1)
    _schedule_pack(sch, bits.activation)

    conv = sch.get_sblock("Conv2dOutput")
    _, y, x, channel, *reduction = sch.get_loops(conv)
    words, ky, kx, plane_w, plane_a = reduction
    x, pixel = sch.split(x, [None, form.pixels])
    channel, lane = sch.split(channel, [None, form.channels])
    sch.reorder(y, channel, x, ky, kx, words, plane_w, plane_a, pixel, lane)
    sch.parallel(y)
    own = sch.cache_write(conv, 0, "global")
    sch.reverse_compute_at(own, x)
    *_, row, column = sch.get_loops(own)
    sch.unroll(row)
    sch.vectorize(column)
    for loop in (plane_w, plane_a, pixel):
        sch.unroll(loop)
    sch.vectorize(lane)
    zero = sch.decompose_reduction(conv, ky)
    *_, row, column = sch.get_loops(zero)
    sch.unroll(row)
    sch.vectorize(column)
    return sch.mod["main"]


def _schedule_pack(sch: Schedule, planes: int) -> None:
    """Pack each padded row where it is needed, every plane by straight code."""
    if planes > 1:
        sch.compute_inline(sch.get_sblock("T_concat"))
    names = [f"QuantizeInput_v{i}" for i in range(planes)] if planes > 1 else ["QuantizeInput"]
    for name in names:
        sch.parallel(sch.get_loops(sch.get_sblock(name))[1])
    _, y, *_, plane = sch.get_loops(sch.get_sblock("PaddedInput"))
    sch.parallel(y)
    sch.unroll(plane)


def _sum_type(layer: Convolution, bits: Precision) -> str:
    """The narrowest type of the sums."""
    most = layer.channels * layer.kernel**2 * (2**bits.weight - 1) * (2**bits.activation - 1)
    return "int16" if most < 2**15 else "int32"


def pack_weights(codes: Array, bits: int, word: int) -> Array:
    """Codes OIHW to [ky, kx, word, plane, channel], the first channel in the highest bit."""
    o, i, kh, kw = codes.shape
    planes = (codes[None] >> np.arange(bits).reshape(-1, 1, 1, 1, 1)) & 1
    split = planes.reshape(bits, o, i // word, word, kh, kw).astype(np.uint64)
    weight = np.uint64(1) << np.arange(word - 1, -1, -1, dtype=np.uint64)
    packed = (split * weight.reshape(-1, 1, 1)).sum(axis=3, dtype=np.uint64)
    return np.ascontiguousarray(packed.transpose(3, 4, 2, 0, 1).astype(f"uint{word}"))


def expected(codes: Array, weights: Array, layer: Convolution) -> Array:
    """Exact sums NHWC: codes [H, W, C] by weights OIHW, in float64, which holds them."""
    pad, kernel, size = layer.pad, layer.kernel, layer.out_size
    padded = np.pad(codes.astype(np.float64), ((pad, pad), (pad, pad), (0, 0)))
    total = np.zeros((size, size, layer.out))
    for ky in range(kernel):
        for kx in range(kernel):
            under = padded[ky : ky + size, kx : kx + size]
            total += under @ weights[:, :, ky, kx].T.astype(np.float64)
    return total[None].astype(np.int64)


def forms(layer: Convolution) -> Iterator[Form]:
    """Candidates."""
    for word in WORDS:
        for pixels in PIXELS:
            for channels in CHANNELS:
                if layer.out_size % pixels == 0 and layer.channels % word == 0:
                    yield Form(word, pixels, channels)


@dataclass(frozen=True)
class Contestant:
    """The fastest form of a layer, ready to run."""

    form: Form
    function: Any
    arguments: tuple[Any, ...]

    def seconds(self, repeat: int) -> list[float]:
        timer = self.function.time_evaluator("main", tvm.cpu(), number=1, repeat=repeat)
        return list(timer(*self.arguments).results)


def best_form(layer: Convolution, bits: Precision, target: Target, threads: int = 1) -> Contestant:
    """Try all forms; every one must be exact.

    Raises:
        MpqcError: a form computes something else.
    """
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    random = np.random.default_rng(0)
    codes = random.integers(0, 2**bits.activation, (1, layer.size, layer.size, layer.channels))
    shape = (layer.out, layer.channels, layer.kernel, layer.kernel)
    weights = random.integers(0, 2**bits.weight, shape)
    wanted = expected(codes[0], weights, layer)
    best: tuple[float, Contestant] | None = None
    packed = {
        word: tvm.runtime.tensor(pack_weights(weights, bits.weight, word))
        for word in WORDS
        if layer.channels % word == 0
    }
    data = tvm.runtime.tensor(codes.astype(np.uint8))
    out = (1, layer.out_size, layer.out_size, layer.out)
    for form in forms(layer):
        module = tvm.IRModule({"main": convolution(layer, bits, form)})
        function = tvm.compile(module, target=llvm_target(target))
        result = tvm.runtime.tensor(np.zeros(out, _sum_type(layer, bits)))
        contestant = Contestant(form, function.mod, (data, packed[form.word], result))
        function["main"](*contestant.arguments)
        if not np.array_equal(result.numpy(), wanted):
            raise MpqcError(f"topi's {form} is not exact at {bits}")
        time = min(contestant.seconds(TRIALS))
        if best is None or time < best[0]:
            best = time, contestant
    assert best is not None
    return best[1]


def measure(
    name: str, widths: Sequence[str], recipe: Recipe, rounds: int, builds: Path, clock: Clock
) -> list[dict[str, Any]]:
    """Times of one layer at every width, ours and topi's in turn.

    Raises:
        MpqcError: one of them is not exact.
    """
    layer, target, found = LAYERS[name], find_target(recipe.target), []
    shape = (1, layer.channels, layer.size, layer.size)
    feeds = [{"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}]
    for width in widths:
        print(name, width, file=sys.stderr)
        bits = Precision.parse(width)
        other = best_form(layer, bits, target)
        runs: dict[str, Callable[[int], list[float]]] = {"topi": other.seconds}
        with tempfile.TemporaryDirectory() as folder:
            for length in (1, LONGER):
                model = Path(folder, f"{name.replace(' ', '-').replace('@', '-')}x{length}.onnx")
                model.write_bytes(layers.network(layer, length))
                artifact = Artifact(recipe.artifact(model, bits, feeds, builds))
                if not verify(artifact, max_samples=1, model=model).passed:
                    raise MpqcError(f"{artifact.folder} differs from its reference")
                own = recipe.load(model, bits, feeds, builds)
                runs[str(length)] = partial(own.seconds, feeds[0])
            times = take_turns(runs, rounds, clock)
        ours = (times[str(LONGER)].best - times["1"].best) / (LONGER - 1)
        found.append(
            {"layer": name, "width": width, "macs": layer.macs, "form": str(other.form),
             "topi": times["topi"].best, "ours": ours}
        )  # fmt: skip
    return found


def summary(content: dict[str, Any]) -> str:
    """The table, Markdown."""
    rows = [
        [row["layer"], row["width"], f"{row['ours'] * 1e6:.0f}", f"{row['topi'] * 1e6:.0f}",
         f"{row['macs'] / row['ours'] / content['hertz']:.1f}",
         f"{row['macs'] / row['topi'] / content['hertz']:.1f}",
         f"{row['topi'] / row['ours']:.1f}", row["form"]]
        for row in content["rows"]
    ]  # fmt: skip
    head = ["layer", "width", "us, ours", "us, topi", "MAC/cycle, ours", "topi", "times as fast",
            "topi's best form"]  # fmt: skip
    return report.table(head, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="native")
    parser.add_argument("--widths", default=layers.WIDTHS)
    square = [name for name, layer in LAYERS.items() if layer.repeats]
    parser.add_argument("--layers", default=",".join(square))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="document to update")
    args = parser.parse_args(arguments)
    recipe, clock = Recipe(args.target, ends=None), Clock()
    try:
        rows = [
            row
            for name in args.layers.split(",")
            for row in measure(
                name, args.widths.split(","), recipe, args.rounds, args.output / "builds", clock
            )
        ]
        content = {
            "target": args.target, "hertz": clock.hertz, "rows": rows,
            "machine": machine(pipeline.versions()),
        }  # fmt: skip
        report.save(args.output / f"topi-{args.target}.json", content)
        text = (
            f"{content['machine']['processor']} at {clock.hertz / 1e9:.2f} GHz, one thread; target "
            f"{args.target}.\n\n{summary(content)}"
        )
        print(text)
        if args.markdown:
            report.replace_section(args.markdown, f"topi {args.target}", text)
    except MpqcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
