"""Generated CUDA kernels, run thread by thread on an emulated GPU, beside the numpy oracle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpqc.cuda.packing import plane_words, product_weights, quad_words
from mpqc.cuda.select import RATES, CudaChoice, CudaSelector
from mpqc.graph import Array, Graph
from mpqc.passes.base import run
from mpqc.passes.channels_last import ChannelsLast
from mpqc.schedules.cuda_product import SHARED_BYTES, product_tile
from mpqc.select_kernel import Selector
from mpqc.target import TARGETS
from tests.cuda.emulation import Emulator
from tests.graph_runner import check, lower, parse
from tests.test_lowering import CHAIN, CONCAT, RESIDUAL, SHORTCUTS

SM75, SM86 = TARGETS["cuda:sm_75"], TARGETS["cuda:sm_86"]


def convolution(
    shape: tuple[int, int, int, int],
    out: int,
    *,
    kernel: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (1, 1),
    dilations: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (1, 1, 1, 1),
    groups: int = 1,
    bits: tuple[int, int] = (2, 2),
    levels: str = "signed",
    zero_point: int = 0,
    wide: bool = False,
    packs: int = 0,
) -> Graph:
    """One layer, channels first, with a residual and a quantizer behind it.

    ``packs``: activation bits of a second layer, which reads what the first one packs.
    """
    weight_bits, activation_bits = bits
    n, channels, height, width = shape
    h, w = (
        (size + first + last - (k - 1) * d - 1) // s + 1
        for size, first, last, k, d, s in zip(
            (height, width), pads[:2], pads[2:], kernel, dilations, strides, strict=True
        )
    )
    top = 2**weight_bits - 1
    generator = np.random.default_rng(3)
    size = (out, channels // groups, *kernel)
    if wide:
        weight = generator.integers(-255, 256, size)
    elif levels == "odd":
        weight = 2 * generator.integers(0, top + 1, size) - top
    else:
        weight = generator.integers(-(top + 1) // 2, (top + 1) // 2, size)
    scale = 1 / np.sqrt(weight[0].size) / 2 ** (activation_bits + weight_bits)
    constants: dict[str, Array] = {
        "w": weight.astype(np.int16),
        "m": generator.uniform(0.5, 4, out).astype(np.float32) * np.float32(scale),
        "b": generator.normal(size=out).astype(np.float32),
    }
    attrs = (
        f"strides={list(strides)}, dilations={list(dilations)}, pads={list(pads)}, group={groups}, "
        f'activation_bits={activation_bits}, weight_bits={weight_bits}, weight_levels="{levels}", '
        f"zero_point={zero_point}"
    )
    lines = [
        f"%x = Input() : u8[{n},{channels},{height},{width}]",
        f"%r = Input() : f32[{n},{out},{h},{w}]",
        f"%w = Constant() : i16[{out},{channels // groups},{kernel[0]},{kernel[1]}]",
        f"%m = Constant() : f32[{out}]",
        f"%b = Constant() : f32[{out}]",
        f"%c = IntConv(%x, %w) {{{attrs}}} : i32[{n},{out},{h},{w}] @conv",
        f"%a = Affine(%c, %m, %b) {{axis=1}} : f32[{n},{out},{h},{w}]",
        f"%s = Add(%a, %r) : f32[{n},{out},{h},{w}]",
        f"%q = Quantize(%s) {{bits={packs or 4}, scale=0.3, zero_point={1 if packs else 3}}} "
        f": u8[{n},{out},{h},{w}]",
    ]
    if packs:
        constants["v"] = generator.integers(-2, 2, (9, out, 1, 1)).astype(np.int16)
        lines += [
            f"%v = Constant() : i16[9,{out},1,1]",
            f"%d = IntConv(%q, %v) {{activation_bits={packs}, weight_bits=2, "
            f'weight_levels="signed", zero_point=1}} : i32[{n},9,{h},{w}] @second',
        ]
    lines.append("return %d" if packs else "return %q, %s")
    return Graph.parse("\n".join(lines) + "\n", constants)


class _Feeds:
    """Codes of the layer's own width."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, graph: Graph, seed: int = 0) -> dict[str, Array]:
        generator = np.random.default_rng(seed)
        return {
            name: generator.integers(0, 2**self.bits, kind.shape).astype(np.uint8)
            if kind.dtype == "uint8"
            else generator.normal(size=kind.shape).astype(kind.dtype)
            for name, kind in graph.inputs.items()
        }


CASES: dict[str, dict[str, Any]] = {
    "plain": {"shape": (1, 64, 6, 7), "out": 40},
    "words of a half": {"shape": (1, 48, 5, 5), "out": 33, "bits": (2, 3)},
    "batch": {"shape": (3, 32, 5, 4), "out": 32, "bits": (1, 1), "levels": "odd"},
    "odd levels": {"shape": (1, 40, 5, 6), "out": 24, "bits": (2, 2), "levels": "odd"},
    "odd levels, zero point": {
        "shape": (1, 40, 5, 6), "out": 24, "bits": (2, 2), "levels": "odd", "zero_point": 2,
    },
    "zero point": {"shape": (1, 36, 5, 6), "out": 20, "bits": (3, 4), "zero_point": 9},
    "three channels": {"shape": (1, 3, 9, 9), "out": 16, "kernel": (5, 5), "bits": (8, 8),
                       "strides": (2, 2), "zero_point": 128},
    "stride and dilation": {"shape": (2, 32, 11, 9), "out": 17, "strides": (2, 1),
                            "dilations": (1, 2), "pads": (2, 0, 1, 3)},
    "pointwise": {"shape": (1, 130, 4, 5), "out": 66, "kernel": (1, 1), "pads": (0, 0, 0, 0)},
    "groups": {"shape": (1, 64, 5, 5), "out": 64, "groups": 2, "bits": (2, 2)},
    "odd groups": {"shape": (1, 60, 5, 5), "out": 54, "groups": 3, "bits": (1, 2),
                   "levels": "odd", "zero_point": 1},
    "depthwise": {"shape": (1, 35, 6, 6), "out": 35, "groups": 35, "bits": (4, 4),
                  "zero_point": 5},
    "nine-bit weights": {"shape": (1, 20, 5, 5), "out": 18, "bits": (8, 8), "wide": True,
                         "zero_point": 100},
    "packs for the next": {"shape": (1, 32, 5, 5), "out": 40, "packs": 2},
    "packs several words": {"shape": (2, 16, 4, 4), "out": 100, "packs": 3, "bits": (1, 1),
                            "levels": "odd"},
    "many tiles": {"shape": (1, 16, 30, 31), "out": 70, "kernel": (1, 1),
                   "pads": (0, 0, 0, 0)},
}  # fmt: skip


ON_CUDA_CORES = ("odd levels, zero point", "three channels", "odd groups", "nine-bit weights",
                 "packs several words")  # fmt: skip


@pytest.mark.parametrize("kernel", ["bitplane", "int8"])
@pytest.mark.parametrize(
    ("case", "target"),
    [*((case, SM86) for case in CASES), *((case, SM75) for case in ON_CUDA_CORES)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_layers_compute_what_the_graph_means(
    case: str,
    kernel: str,
    target: Any,
    tmp_path: Path,
    gpu: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = convolution(**CASES[case])
    monkeypatch.setattr("tests.graph_runner.feeds", _Feeds(CASES[case].get("bits", (2, 2))[1]))
    program = lower(graph, target, kernel)
    record = program.layers[0]
    if case == "nine-bit weights":
        kernel = "int8"
    assert record.kernel == kernel
    if case != "depthwise" or kernel != "int8":
        tensor_cores = target is SM86
        assert record.variant in (
            ({"mma-b1", "mma-s8"} if tensor_cores else set()) | {"and-popcount", "dp4a"}
        )
    check(graph, program, tmp_path, target)
    assert gpu.sources


@pytest.mark.parametrize("text", [CHAIN, RESIDUAL, SHORTCUTS, CONCAT])
@pytest.mark.parametrize("kernel", ["auto", "bitplane"])
def test_graphs_of_layers(text: str, kernel: str, tmp_path: Path, gpu: Emulator) -> None:
    graph = parse(text)
    check(graph, lower(graph, SM86, kernel), tmp_path, SM86)
    assert gpu.sources


def test_a_producer_packs_for_its_reader(tmp_path: Path, gpu: Emulator) -> None:
    program = lower(parse(CHAIN), SM86, "bitplane")
    packed = [step for step in program.steps if step.kind == "pack"]
    assert len(packed) == 1  # the graph's input alone: conv1 writes words for conv2 itself
    check(parse(CHAIN), program, tmp_path, SM86)
    assert gpu.sources


def choice(graph: Graph, arch: str, kernel: str = "auto") -> CudaChoice:
    last = run(graph, ChannelsLast())
    node = next(node for node in last if node.op == "IntConv")
    return CudaSelector(arch, Selector(TARGETS["cuda:sm_86"], kernel)).choose(last, node)


LARGE = {"shape": (8, 256, 14, 14), "out": 256}


def test_the_model_follows_the_instructions_of_the_architecture() -> None:
    binary = convolution(**LARGE, bits=(1, 1), levels="odd")  # type: ignore[arg-type]
    assert choice(binary, "sm_75").variant == "and-popcount"
    assert choice(binary, "sm_80").variant == "mma-b1"
    wide = convolution(**LARGE, bits=(8, 8))  # type: ignore[arg-type]
    assert choice(wide, "sm_75").variant == "dp4a"
    assert choice(wide, "sm_80").variant == "mma-s8"
    assert choice(wide, "sm_80", "bitplane").kind == "bitplane"
    few = convolution((1, 32, 8, 8), 32, groups=32)
    assert choice(few, "sm_90").variant == "multiply-add"


def test_what_gpus_have_no_kernel_for_is_said() -> None:
    found = choice(convolution(**LARGE), "sm_86", "bitplane-lut")  # type: ignore[arg-type]
    assert found.kind == "bitplane"
    assert "no bitplane-lut kernel" in found.reason


@pytest.mark.parametrize("mma", [False, True])
@pytest.mark.parametrize("planes", [(1, 1), (2, 2), (8, 8), (8, 1)])
@pytest.mark.parametrize("shape", [(49, 10, 3), (1, 1000, 2048), (100352, 64, 576), (784, 512, 72)])
def test_tiles_fit_shared_memory_and_whole_warps(
    shape: tuple[int, int, int], planes: tuple[int, int], mma: bool
) -> None:
    tile = product_tile(*shape, planes, sums=True, mma=mma)
    assert 4 * tile.shared_words(*planes, sums=True) <= SHARED_BYTES
    assert tile.threads % 32 == 0
    assert tile.threads <= 1024
    assert tile.rows * tile.columns % tile.threads == 0
    assert tile.columns % 32 == 0


def test_words_hold_channels_in_order() -> None:
    codes = np.random.default_rng(0).integers(0, 8, (3, 37)).astype(np.uint8)
    words = plane_words(codes, 3)
    assert words.shape == (3, 3, 2)
    for plane, pixel, channel in ((0, 0, 0), (1, 2, 31), (2, 1, 36)):
        bit = words[plane, pixel, channel // 32] >> (channel % 32) & 1
        assert bit == codes[pixel, channel] >> plane & 1
    assert not (words[:, :, 1] >> 5).any()
    values = np.array([[-128, 127, 1, 2, 3]], np.int16)
    assert quad_words(values).view(np.int8).tolist() == [[-128, 127, 1, 2, 3, 0, 0, 0]]


def test_weights_lie_as_blocks_read_them() -> None:
    found = choice(convolution((1, 36, 5, 5), 40, groups=1, bits=(2, 2)), "sm_86", "bitplane")
    assert found.blocks is not None
    codes = np.random.default_rng(0).integers(0, 4, (40, 36, 3, 3)).astype(np.uint8)
    packed = product_weights(codes, found.shape, found.blocks)
    depth, columns = found.blocks.depth, found.blocks.columns
    plain = plane_words(codes.transpose(0, 2, 3, 1), 2).reshape(2, 40, -1)
    for plane, out, word in ((0, 0, 0), (1, 39, 17), (0, 33, 5)):
        at = (out // columns, word // depth, plane, out % columns, word % depth)
        assert packed[at] == plain[plane, out, word]
    assert packed.sum(dtype=np.uint64) == plain.sum(dtype=np.uint64)  # the rest is padding


def test_every_target_has_rates() -> None:
    assert {target.cuda for target in TARGETS.values() if target.cuda} == RATES.keys()
