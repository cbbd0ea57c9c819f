"""Run one quantized kernel beside a plain integer convolution; shared by the kernel tests."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import tvm

from mpqc import accumulators, compute, kernels, numerics, packing, winograd
from mpqc.compute import Padded, Window
from mpqc.graph import Array
from mpqc.kernels import Kernel, Layer, Operand, Output
from mpqc.schedules.arm_intrinsics import POPCOUNTS
from mpqc.schedules.dot_intrinsics import DOTS
from mpqc.target import Target, llvm_target, native
from tests import arm_emulator

SLACK = 64  # dot kernels may read a little behind their data


@dataclass(frozen=True)
class Case:
    """A quantized convolution over an image that is padded already."""

    window: Window
    channels: int
    out: int
    groups: int = 1
    weight_bits: int = 2
    activation_bits: int = 2
    levels: str = "signed"
    zero_point: int = 0
    seed: int = 0
    extreme: str = ""  # "most" or "least": every product the largest or the smallest there is

    @property
    def layer(self) -> Layer:
        image = (self.window.n, self.window.ih, self.window.iw, self.channels)
        return Layer(
            self.window, image, self.out, self.groups, self.weight_bits, self.activation_bits,
            self.levels == "odd", self.zero_point != 0,
        )  # fmt: skip

    @property
    def worst_weights(self) -> list[Array]:
        """All weights the largest, and all the smallest."""
        return [replace(self, extreme=extreme).weights() for extreme in ("most", "least")]

    def chunk(self, taps: int) -> int:
        """Steps that int16 sums whatever the weights, 0 if there are none."""
        top = 2**self.activation_bits - 1
        steps = [packing.dot_weights(w, taps, 1, 4, "int16") for w in self.worst_weights]
        return min(accumulators.half_chunk(w[..., 0, :], top) for w in steps)

    def codes(self) -> Array:
        """uint8 [N, H, W, C]."""
        shape, top = self.layer.image, 2**self.activation_bits
        if self.extreme:
            return np.full(shape, top - 1, np.uint8)
        generator = np.random.default_rng(self.seed)
        return generator.integers(0, top, shape).astype(np.uint8)

    def weights(self) -> Array:
        """int16 [O, C/G, KH, KW]."""
        shape = (self.out, self.channels // self.groups, self.window.kh, self.window.kw)
        codes = np.random.default_rng(self.seed + 1).integers(0, 2**self.weight_bits, shape)
        if self.extreme:
            every = numerics.weight_values(
                np.arange(2**self.weight_bits), self.weight_bits, self.levels
            )
            wanted = every.max() if self.extreme == "most" else every.min()
            codes = np.full(shape, np.flatnonzero(every == wanted)[0])
        return numerics.weight_values(codes, self.weight_bits, self.levels)


def convolve(codes: Array, weight: Array, window: Window, groups: int) -> Array:
    """Exact int64 convolution, NHWC by OIHW, one tap at a time."""
    n, _, _, c = codes.shape
    o = weight.shape[0]
    inside, outside = c // groups, o // groups
    result = np.zeros((n, window.oh, window.ow, o), np.int64)
    for ky in range(window.kh):
        for kx in range(window.kw):
            rows = slice(
                ky * window.dy, ky * window.dy + (window.oh - 1) * window.sy + 1, window.sy
            )
            columns = slice(
                kx * window.dx, kx * window.dx + (window.ow - 1) * window.sx + 1, window.sx
            )
            under = codes[:, rows, columns].astype(np.int64)
            for g in range(groups):
                taps = weight[g * outside : (g + 1) * outside, :, ky, kx].astype(np.int64)
                result[..., g * outside : (g + 1) * outside] += (
                    under[..., g * inside : (g + 1) * inside] @ taps.T
                )
    return result


@dataclass(frozen=True)
class Built:
    kernel: Kernel
    library: Any
    sums: Any  # library of the window sums that odd levels need, or None
    sums_of_codes: bool  # they are made of codes, not of what the kernel reads
    tables: Any  # library that makes what the kernel reads from codes, or None
    block: int
    taps: int
    vector: int = 0  # of the lookup kernel's weights
    slices: int = 1  # the same


def build(case: Case, kind: str, target: Target) -> Built:
    """The kernel of a case; the values in it do not matter."""
    return _build(replace(case, seed=0, extreme=""), kind, target)


@cache
def _build(case: Case, kind: str, target: Target) -> Built:
    layer = case.layer
    outputs = [
        Output("total", lambda read: read("acc")),
        Output(
            "y",
            lambda read: compute.fence(read("acc").astype("float32") * read("m")) + read("b"),
        ),
    ]
    packs = case.out % 8 == 0 and case.groups == 1
    operands = [Operand("m", True, "float32"), Operand("b", True, "float32")]

    def coded(packs: bool) -> Output:
        return Output(
            "q", lambda read: compute.requantize(read("y"), 1, 0, 7), 3, keep=True, planes=packs
        )

    sums = tables = of_codes = None
    vector, slices = 0, 1
    if kind == "bitplane":
        layer = kernels.flatten_pixels(layer, 14)
        tile = kernels.bitplane_tile(layer, target)
        outputs.append(coded(packs and tile.block % 8 == 0))
        how = kernels.popcount_instruction(layer, target)
        kernel = kernels.bitplane_kernel(layer, operands, outputs, tile, how)
        if layer.odd:
            sums = compiled(kernels.window_sum_kernel(layer), target)
    elif kind == "bitplane-lut":
        layer = kernels.flatten_pixels(layer, 14)
        tile = kernels.lut_tile(layer, target)
        outputs.append(coded(packs and tile.block % 8 == 0))
        how = kernels.lut_instruction(layer, tile, target)
        kernel = kernels.lut_kernel(layer, operands, outputs, tile, how)
        vector = kernels.lut_vector(layer, tile, how)
        slices = kernels.lut_slices(layer, target.arch)
        n, h, w, channels = layer.image
        beside = layer.window.sx if how.endswith(kernels.PAIRS) else 0
        if kernels.reads_patterns(layer, target.arch):
            made = kernels.pattern_kernel(layer, Padded(*layer.image), beside)
        else:
            made = kernels.expand_kernel(n * h * w, channels, target.arch, beside, slices)
        tables = compiled(made, target)
        if layer.odd and not kernels.reads_patterns(layer, target.arch):
            of_codes = kernels.code_sum_kernel(layer, target.arch)
            sums = compiled(of_codes or kernels.row_sum_kernel(layer), target)
    elif kind == "multiply-add":
        tile = kernels.grouped_tile(layer, target)
        outputs.append(coded(False))
        kernel = kernels.grouped_kernel(layer, operands, outputs, tile)
    elif kind.startswith(kernels.WINOGRAD):
        how = kind.removeprefix(kernels.WINOGRAD)
        layer = kernels.winograd_layer(layer)
        tile = kernels.winograd_tile(layer, target, how)
        outputs.append(coded(packs and tile.block % 8 == 0))
        chunk = min(winograd.half_chunk(w, case.activation_bits) for w in case.worst_weights)
        kernel = kernels.winograd_kernel(layer, operands, outputs, tile, how, chunk)
        tables = compiled(kernels.winograd_image_kernel(layer, how, target), target)
    else:
        layer = kernels.flatten_pixels(layer, 14)
        tile = kernels.dot_tile(layer, target, kind)
        outputs.append(coded(packs and tile.block % 8 == 0))
        kernel = kernels.dot_kernel(layer, operands, outputs, tile, kind, case.chunk(layer.taps))
    library = compiled(kernel, target)
    return Built(
        kernel, library, sums, of_codes is not None, tables, tile.block, layer.taps, vector, slices
    )


def compiled(kernel: Kernel, target: Target) -> Any:
    """The kernel as TVM's own library, function ``main``, or as a program under an emulator."""
    if target.arch != native().arch:
        return arm_emulator.Library(kernel, target)
    module = tvm.IRModule({"main": kernel.func.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=llvm_target(target))


def assembly(case: Case, kind: str, target: Target) -> str:
    """What LLVM made of the kernel."""
    return str(build(case, kind, target).library.mod.inspect_source("asm"))


def tensor(array: Array) -> Any:
    """A TVM tensor on memory that goes on a little behind the array, aligned to 64 bytes."""
    memory = np.full(array.nbytes + SLACK + 64, 0xA5, np.uint8)
    start = -memory.ctypes.data % 64
    view = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return tvm.runtime.from_dlpack(view)


def scales(total: Array, out: int, seed: int) -> tuple[Array, Array]:
    """Draw m and b that bring the accumulators to a few codes, and cancel often."""
    generator = np.random.default_rng(seed + 2)
    m = generator.normal(0, 4 / max(1, np.abs(total).max()), out).astype(np.float32)
    return m, (-m * total[0, 0, 0] + generator.normal(0, 1, out)).astype(np.float32)


def run(case: Case, kind: str, target: Target) -> tuple[dict[str, Array], dict[str, Array]]:
    """The kernel's results and what they must be: total int32, y float32, q codes, its planes."""
    built, layer = build(case, kind, target), case.layer
    codes, weight = case.codes(), case.weights()
    total = convolve(codes.astype(np.int64) - case.zero_point, weight, case.window, case.groups)
    m, b = scales(total, case.out, case.seed)
    product, offset = total.astype(np.float32) * m, 0
    y = product + b
    q = np.clip(np.rint(y) + 1, 0, 7).astype(np.uint8)
    expected = {"total": total, "y": y, "q": q, "planes": packing.bits_to_bytes(q, 3)}

    if kind == "bitplane":
        split = codes.reshape(*codes.shape[:3], case.groups, -1)
        padded = np.pad(split, [(0, 0)] * 4 + [(0, -layer.group_in % 8)])
        data = packing.bits_to_bytes(padded.reshape(*codes.shape[:3], -1), case.activation_bits)
        stored = numerics.weight_codes(weight, case.weight_bits, case.levels)
        pairwise = built.kernel.variant in POPCOUNTS
        pack = packing.popcount_weights if pairwise else packing.bitplane_weights
        packed = pack(stored, case.weight_bits, case.groups, built.taps, built.block)
    elif kind == "bitplane-lut":
        stored = numerics.weight_codes(weight, case.weight_bits, case.levels)
        packed = packing.lut_weights(
            stored, case.weight_bits, built.taps, built.block, built.vector, built.slices
        )
        data = np.zeros(built.kernel.inputs[0].shape, built.kernel.inputs[0].dtype)
    elif kind.startswith(kernels.WINOGRAD):
        dot = DOTS[kind.removeprefix(kernels.WINOGRAD)]
        packed = winograd.winograd_weights(weight, built.block, dot.group, dot.weight)
        data = np.zeros(built.kernel.inputs[0].shape, dot.data)
        after = kernels.winograd_layer(layer).image
        grown = [(0, 0), (0, after[1] - layer.image[1]), (0, after[2] - layer.image[2]), (0, 0)]
        codes = np.pad(codes, grown, constant_values=2**case.activation_bits - 1)
    elif kind == "multiply-add":
        data, packed = codes, packing.grouped_weights(weight, built.block)
    else:
        dot = DOTS[kind]
        offset = dot.offset
        data = (codes.astype(np.int16) - offset).astype(dot.data)
        packed = packing.dot_weights(weight, built.taps, built.block, dot.group, dot.weight)
    arguments = [tensor(data.reshape(built.kernel.inputs[0].shape))]
    if data.dtype == np.uint16:
        arguments.append(tensor(packing.pattern_tables(case.activation_bits)))
    arguments.append(tensor(packed))
    pixels = []
    if built.tables is not None:
        if data.dtype == np.uint16 and layer.odd:
            pixels = [tensor(np.zeros(codes.shape[:3], np.int32).reshape(-1))]
        built.tables["main"](tensor(codes.reshape(-1)), arguments[0], *pixels)
    if kind.startswith(kernels.WINOGRAD):
        signed = dot.data == "int16"
        places = winograd.correction(weight, case.activation_bits, signed, case.zero_point)
        arguments.append(tensor(places))
    elif case.zero_point or offset:
        sums = weight.reshape(case.out, -1).astype(np.int64).sum(axis=1)
        arguments.append(tensor(((offset - case.zero_point) * sums).astype(np.int32)))
    if built.sums is not None:
        shape = built.kernel.inputs[len(arguments)].shape
        window_sums = tensor(np.zeros(shape, np.int32))
        source = tensor(codes.reshape(-1)) if built.sums_of_codes else arguments[0]
        built.sums["main"](source, window_sums)
        arguments.append(window_sums)
    arguments += [*pixels, tensor(m), tensor(b)]
    results = [tensor(np.zeros(kind.shape, kind.dtype)) for kind in built.kernel.outputs]
    built.library["main"](*arguments, *results)
    names = ("total", "y", "q", "planes")[: len(results)]
    got = {
        name: result.numpy().reshape(expected[name].shape)
        for name, result in zip(names, results, strict=True)
    }
    return got, {name: expected[name] for name in names}
