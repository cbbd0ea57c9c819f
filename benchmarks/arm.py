"""Cycles per multiply-accumulate of the inner loops on ARM cores, estimated: no board is needed.

    python -m benchmarks.arm [--json FILE] [--core cortex-a72] [--tiles]

Every kernel is compiled for a 3x3 layer; its innermost loop and the flush around it are cut out of
the assembly, instructions are counted, and ``llvm-mca`` estimates the cycles, all data in the
first cache. That is an upper bound of what a board reaches, and a fair comparison of kernels: they
are all estimated alike. LLVM models Cortex-A72 as A57 and has no model of A76: its twin Neoverse N1
stands in.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import tvm

from mpqc import kernels
from mpqc.compute import Window
from mpqc.errors import EnvironmentLacks, MpqcError
from mpqc.kernels import Kernel, Layer, Output
from mpqc.schedules.arm_intrinsics import POPCOUNTS
from mpqc.schedules.conv_cpu import Tile
from mpqc.schedules.dot_intrinsics import DOTS
from mpqc.schedules.lut_intrinsics import lookup_of
from mpqc.target import TARGETS, Target, llvm_target

# Core -> target that is built for it, and LLVM's model.
CORES = {
    "cortex-a53": ("rpi3", "cortex-a53"),
    "cortex-a72": ("rpi4", "cortex-a72"),
    "cortex-a76": ("rpi5", "neoverse-n1"),
    "cortex-a9": ("armv7", "cortex-a9"),
}
WIDTHS = ((1, 1), (2, 2), (4, 4), (8, 8))
TRIPLES = {"aarch64": "aarch64-linux-gnu", "armv7": "armv7-linux-gnueabihf"}

# Instruction -> products of the layer in one of it, for w weight and a activation bits.
_MARKERS = {
    "bitplane": {
        r"v?cnt(?:\.8)?\b.*(?:\.16b|\bq\d)": 128.0,
        r"v?cnt(?:\.8)?\b.*(?:\.8b|\bd\d)": 64.0,
    },
    "bitplane-lut": {r"tbl\b.*\.16b, ?v\d+\.16b|tbl\b.*\.16b": 64.0},
    "multiply-add": {r"[su]mlal2?\b.*\.4s|vmlal\.[su]16|vmla\.i32\s+q": 4.0},
    "smlal": {r"sm(?:ull|lal)2?\b.*\.8h|vm(?:ull|lal)\.s8": 8.0},
    "sdot": {r"sdot\b": 16.0},
}  # fmt: skip
_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH = re.compile(r"^\s+(?:b\.?\w*|cbn?z|tbn?z)\s+(?:\S+,\s*)*(\.L\w+)\s*(?://.*|@.*)?$")


@dataclass(frozen=True)
class Estimate:
    """One kernel on one core.

    Attributes:
        core, kernel, variant: which.
        weight_bits, activation_bits: widths of the layer.
        tile: pixels x vectors x lanes.
        instructions: of the inner loop.
        vector: those that work on vector registers, loads aside.
        products: multiply-accumulates of the layer in one turn of the loop.
        cycles: of one turn, the flush around the loop spread over its turns.
        counts: instructions of the inner loop by name.
    """

    core: str
    kernel: str
    variant: str
    weight_bits: int
    activation_bits: int
    tile: str
    instructions: int
    vector: int
    products: float
    cycles: float
    counts: dict[str, int]

    @property
    def cycles_per_mac(self) -> float:
        return self.cycles / self.products


@cache
def analyser() -> str:
    """Path of the newest llvm-mca.

    Raises:
        EnvironmentLacks: there is none.
    """
    names = [f"llvm-mca-{version}" for version in range(30, 13, -1)] + ["llvm-mca"]
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise EnvironmentLacks("the estimates need llvm-mca (Debian: apt install llvm)")


def cycles(lines: Iterable[str], core: str, arch: str, turns: int = 100) -> float:
    """Cycles of one turn of straight code in a loop.

    Raises:
        MpqcError: llvm-mca does not know an instruction.
    """
    source = "\n".join(lines)
    if not source:
        return 0.0
    result = subprocess.run(
        [analyser(), f"-mtriple={TRIPLES[arch]}", f"-mcpu={core}", f"-iterations={turns}",
         *(["-mattr=+neon"] if arch == "armv7" else [])],
        input=source, capture_output=True, text=True, check=False,
    )  # fmt: skip
    total = re.search(r"Total Cycles:\s+(\d+)", result.stdout)
    if total is None:
        raise MpqcError(f"llvm-mca refuses the code of {core}: {result.stderr[:500]}")
    return int(total[1]) / turns


@dataclass(frozen=True)
class _Loop:
    """Lines [first, last] of the assembly, the last one a branch back to the first."""

    first: int
    last: int

    def holds(self, other: "_Loop") -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def _loops(lines: Sequence[str]) -> list[_Loop]:
    labels = {m[1]: i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    found = []
    for index, line in enumerate(lines):
        branch = _BRANCH.match(line)
        if branch and labels.get(branch[1], index) < index:
            found.append(_Loop(labels[branch[1]], index))
    return found


def _code(lines: Iterable[str]) -> list[str]:
    """Instructions alone: no labels, directives and comments."""
    kept = [line.split("//")[0].split("@")[0].strip() for line in lines if line.startswith("\t")]
    return [line for line in kept if line and not line.startswith(".")]


def _products(code: Sequence[str], kernel: str) -> float:
    return sum(
        next((n for pattern, n in _MARKERS[kernel].items() if re.match(pattern, line)), 0.0)
        for line in code
    )


def estimate(core: str, kernel: str, layer: Layer, tile: Tile | None = None) -> Estimate:
    """Compile one kernel for a core and estimate its inner loop.

    Args:
        core: of ``CORES``.
        kernel: "bitplane", "bitplane-lut", "multiply-add", or an instruction of ``DOTS``.
        layer: geometry and widths.
        tile: by default the target's own.

    Raises:
        EnvironmentLacks: no llvm-mca.
        MpqcError: the compiled code holds no inner loop of the kernel.
    """
    target_name, model = CORES[core]
    target = TARGETS[target_name]
    built, tile, chunk = _build(kernel, layer, target, tile)
    kind = "sdot" if kernel.startswith("sdot") else "smlal" if kernel in DOTS else kernel
    lines = _assembly(built, target).splitlines()
    planes = {"bitplane": layer.weight_bits * layer.activation_bits,
              "bitplane-lut": layer.weight_bits}.get(kind, 1)  # fmt: skip
    loops = _loops(lines)
    inner = [
        loop
        for loop in loops
        if _products(_code(lines[loop.first : loop.last + 1]), kind)
        and not any(loop.holds(other) for other in loops)
    ]
    if not inner:
        raise MpqcError(f"{kernel} on {core} has no inner loop with its instruction")
    loop = max(inner, key=lambda a: _products(_code(lines[a.first : a.last + 1]), kind))
    code = _code(lines[loop.first : loop.last + 1])
    products = _products(code, kind) / planes
    spent = cycles(code, model, target.arch)
    around = [other for other in loops if other.holds(loop)]
    flushed = any(re.match(r"uaddw|uadalp|uaddl|ushll|vaddw", line) for line in code)
    if around and chunk and not flushed:
        outer = min(around, key=lambda a: a.last - a.first)
        flush = _code(lines[outer.first : loop.first]) + _code(
            lines[loop.last + 1 : outer.last + 1]
        )
        turns = max(1.0, tile.pixels * tile.block * chunk / planes / products)
        spent += cycles(flush, model, target.arch) / turns
    counts = Counter(line.split()[0] for line in code)
    vector = sum(
        bool(re.search(r"\bv\d+\.|\bq\d+", line)) and not re.match(r"v?(ld|st)", line)
        for line in code
    )
    return Estimate(
        core, kernel, built.variant, layer.weight_bits, layer.activation_bits,
        f"{tile.pixels}x{tile.vectors}x{tile.lanes}", len(code), vector, products, round(spent, 2),
        dict(counts.most_common()),
    )  # fmt: skip


def _build(
    kernel: str, layer: Layer, target: Target, tile: Tile | None
) -> tuple[Kernel, Tile, int]:
    """The kernel, its tile, and the plane products of a lane between two flushes (0: none)."""
    outputs = [Output("y", lambda read: read("acc"))]
    if kernel == "bitplane":
        tile = tile or kernels.bitplane_tile(layer, target)
        run = layer.run_pixels * layer.group_bytes
        how = kernels.popcount_instruction(layer, target)
        chunk = 0 if how in POPCOUNTS else 8 * kernels.largest_divisor(run, 31)
        return kernels.bitplane_kernel(layer, [], outputs, tile, how), tile, chunk
    if kernel == "bitplane-lut":
        tile = tile or kernels.lut_tile(layer, target)
        name = lookup_of(target.arch, tile.lanes)
        run = layer.run_pixels * kernels.lut_image(layer)[3]
        chunk = 4 * kernels.largest_divisor(run, 255 // (4 * (2**layer.activation_bits - 1)))
        return kernels.lut_kernel(layer, [], outputs, tile, name), tile, chunk
    if kernel == "multiply-add":
        tile = tile or kernels.grouped_tile(layer, target)
        return kernels.grouped_kernel(layer, [], outputs, tile), tile, 0
    tile = tile or kernels.dot_tile(layer, target, kernel)
    return kernels.dot_kernel(layer, [], outputs, tile, kernel), tile, 0


def _assembly(kernel: Kernel, target: Target) -> str:
    module = tvm.IRModule({"main": kernel.func.with_attr("global_symbol", "main")})
    return str(tvm.compile(module, target=llvm_target(target)).mod.inspect_source("asm"))


def layer_of(weight: int, activation: int, channels: int = 128, size: int = 16) -> Layer:
    """A 3x3 layer with as many outputs as inputs."""
    window = Window(1, size, size, 3, 3, 1, 1, 1, 1)
    image = (1, window.ih, window.iw, channels)
    return Layer(window, image, channels, 1, weight, activation, False, False)


def kernels_of(core: str, weight: int, activation: int) -> list[str]:
    """Kernels that the core could run a layer of these widths with."""
    target = TARGETS[CORES[core][0]]
    found = ["bitplane"]
    if target.arch == "aarch64":
        if activation <= 6:
            found.append("bitplane-lut")
        if target.has("dotprod"):
            found.append("sdot-offset" if activation == 8 else "sdot")
        else:
            offset = "-offset" if activation == 8 else ""
            found += [f"smlal16{offset}", f"smlal32{offset}"]
            found += ["smull32-offset"] if offset else []
            if 2 ** (weight - 1) * (2**activation - 1) < 2**13:
                found.append("smlal32-small")
    else:
        found.append("vmlal16-offset" if activation == 8 else "vmlal16")
    return [*found, "multiply-add"]


def table(cores: Sequence[str]) -> list[Estimate]:
    """Every kernel at every width on the cores."""
    return [
        estimate(core, kernel, layer_of(weight, activation))
        for core in cores
        for weight, activation in WIDTHS
        for kernel in kernels_of(core, weight, activation)
    ]


def best(rows: Sequence[Estimate], core: str, weight: int, activation: int) -> Estimate:
    """The fastest kernel of a width."""
    return min(
        (
            row
            for row in rows
            if row.core == core and (row.weight_bits, row.activation_bits) == (weight, activation)
        ),
        key=lambda row: row.cycles_per_mac,
    )


def tiles(core: str, kernel: str, layer: Layer) -> list[Estimate]:
    """The kernel with other register tiles, fastest first."""
    lanes = 4 if kernel in DOTS else 8 if kernel == "bitplane" else 16
    found = []
    for vectors in (1, 2, 4, 8):
        for pixels in (2, 4, 7, 8):
            if vectors * pixels > 28 or layer.out_channels % (vectors * lanes):
                continue
            window = replace(layer.window, ow=layer.window.ow // pixels * pixels)
            found.append(
                estimate(core, kernel, replace(layer, window=window), Tile(pixels, vectors, lanes))
            )
    return sorted(found, key=lambda row: row.cycles_per_mac)


def show(rows: Sequence[Estimate], cores: Sequence[str]) -> str:
    """The rows as text; a star marks the fastest kernel of a width."""
    lines = []
    for core in cores:
        lines.append(f"\n{core}: cycles per multiply-accumulate (multiply-accumulates per cycle)")
        base = best(rows, core, 8, 8).cycles_per_mac
        for weight, activation in WIDTHS:
            least = best(rows, core, weight, activation)
            for row in rows:
                if row.core != core or (row.weight_bits, row.activation_bits) != (
                    weight,
                    activation,
                ):
                    continue
                mark = "*" if row == least else " "
                lines.append(
                    f" {mark} w{weight}a{activation} {row.kernel:13} tile {row.tile:7} "
                    f"{row.instructions:4} instructions, {row.vector:3} vector  "
                    f"{row.cycles_per_mac:.4f} ({1 / row.cycles_per_mac:5.1f})  "
                    f"{row.cycles_per_mac / base:.2f} of w8a8"
                )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Estimate, print, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--core", action="append", choices=list(CORES), help="default: A53, A72, A76"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--tiles", metavar="KERNEL", help="compare register tiles of one kernel")
    parser.add_argument("--bits", default="2,2", help="widths for --tiles")
    options = parser.parse_args(arguments)
    cores = options.core or ["cortex-a53", "cortex-a72", "cortex-a76"]
    try:
        if options.tiles:
            weight, activation = map(int, options.bits.split(","))
            rows = [
                row
                for core in cores
                for row in tiles(core, options.tiles, layer_of(weight, activation, size=56))
            ]
            for row in rows:
                print(row.core, row.kernel, row.tile, f"{row.cycles_per_mac:.4f}", row.counts)
        else:
            rows = table(cores)
            print(show(rows, cores))
    except EnvironmentLacks as error:
        print(f"skipped: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        content = [{**asdict(row), "cycles_per_mac": row.cycles_per_mac} for row in rows]
        options.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
