"""Which kernel runs a layer on a GPU: as asked, as measured, or by a model of its instructions.

The rates are multiply-accumulates that one multiprocessor issues a cycle, from NVIDIA's tables of
instruction throughput and its architecture papers; nothing here was measured. docs/cuda.md says
which numbers are known and which are taken low until a GPU has said them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from mpqc.cuda.kernels import QUAD, WORD, ProductLayer
from mpqc.graph import Graph, Node, Precision
from mpqc.latency import Entry, Geometry
from mpqc.schedules.conv_cpu import Tile
from mpqc.schedules.cuda_product import ProductTile, named_tile, product_tile
from mpqc.select_kernel import Choice, Selector, geometry, has_codes, table_geometry
from mpqc.target import Target

POPCOUNT, TENSOR_BITS, DOT, TENSOR_BYTES, DIRECT = (
    "and-popcount", "mma-b1", "dp4a", "mma-s8", "multiply-add",
)  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Multiply-accumulates of one multiprocessor a cycle.

    Attributes:
        popcount: of one-bit codes, by AND and POPC on the CUDA cores.
        dot: of bytes, by dp4a.
        bits: of one-bit codes on the tensor cores; 0 where they have no AND-popcount.
        bytes: of bytes on the tensor cores; 0 where our kernel has no form for them.
        direct: plain multiply-adds.
        about: where the uncertain numbers come from.
    """

    popcount: float
    dot: float
    bits: float
    bytes: float
    direct: float = 64.0
    about: str = ""


RATES: Mapping[str, Rates] = {
    "sm_75": Rates(512, 256, 0, 0, about="binary tensor cores of Turing know XOR alone"),
    "sm_80": Rates(512, 256, 16384, 2048, about="NVIDIA's A100 paper: 4992 and 624 TOPS"),
    "sm_86": Rates(512, 256, 8192, 1024, about="half an A100's multiprocessor"),
    "sm_87": Rates(512, 256, 8192, 1024, about="as sm_86"),
    "sm_89": Rates(512, 256, 8192, 1024, about="as sm_86"),
    "sm_90": Rates(
        512, 256, 2048, 2048,
        about="ptxas emits BMMA, but no paper states its rate: taken as that of bytes until "
        "measured",
    ),
}  # fmt: skip
# Of the peak, what a kernel that stages through registers is expected to reach.
_TENSOR_CORES_REACHED, _CUDA_CORES_REACHED = 0.4, 0.7
_TENSOR_CORES = (TENSOR_BITS, TENSOR_BYTES)
_STREAM = 10.0  # bytes a cycle and multiprocessor from memory: 1.5 TB/s on an A100
LEAST_GROUP = 8  # channels of a group below which the product form wastes its tiles


@dataclass(frozen=True)
class CudaChoice(Choice):
    """How one layer runs on a GPU.

    Attributes:
        shape: the layer as the product kernels see it.
        blocks: tile of a block; None for "multiply-add". ``tile`` means nothing here.
    """

    shape: ProductLayer = field(kw_only=True)
    blocks: ProductTile | None = field(kw_only=True)


@dataclass(frozen=True)
class Candidate(Selector):
    """What ``mpqc profile`` measures: one instruction and size of tile, wherever layers have them.

    Attributes:
        variant: instruction; layers that cannot have it take what the model says.
        beside: places of the tile behind the default.
    """

    variant: str = ""
    beside: int = 0

    def choose(self, graph: Graph, node: Node) -> CudaChoice:
        """As ``Selector.choose``."""
        selector = CudaSelector(self.target.cuda, self, self.variant, self.beside)
        return selector.choose(graph, node)


def candidates(target: Target, kind: str, tiles: bool) -> list[Candidate]:
    """Ways to run layers with one kind of kernel, each for a library of its own.

    Args:
        target: GPU.
        kind: "bitplane" or "int8".
        tiles: also the next smaller and the next larger tile.
    """
    known = RATES[target.cuda]
    rates = {
        "bitplane": {POPCOUNT: known.popcount, TENSOR_BITS: known.bits},
        "int8": {DOT: known.dot, TENSOR_BYTES: known.bytes},
    }[kind]
    return [
        Candidate(target, kind, variant=variant, beside=beside)
        for variant, rate in rates.items()
        if rate
        for beside in ((0, 1, -1) if tiles else (0,))
    ]


@dataclass(frozen=True)
class CudaSelector:
    """Chooses kernels for a GPU.

    Attributes:
        arch: "sm_90" and the like.
        asked: what the user asked for, by layer and for all, and what was measured.
        variant, beside: of a ``Candidate``.
    """

    arch: str
    asked: Selector
    variant: str = ""
    beside: int = 0

    def choose(self, graph: Graph, node: Node) -> CudaChoice:
        """Decide for an IntConv or IntMatMul node of a channels-last graph."""
        layer, pads, source = geometry(graph, node)
        weight = graph.constants[node.inputs[1]]
        zero = node.int_attr("zero_point", 0)
        asked = self.asked.by_layer.get(node.name, "auto")
        asked = self.asked.kernel if asked == "auto" else asked
        least, most = int(weight.min(initial=0)), int(weight.max(initial=0))
        wide = not (least >= -128 and most <= 127)
        shapes = {"int8": ProductLayer(layer, source, pads, zero, False, wide)}
        forms = {"int8": self._bytes(shapes["int8"], least >= -256 and most <= 255)}
        if has_codes(node, weight):
            shapes["bitplane"] = ProductLayer(layer, source, pads, zero, True)
            forms["bitplane"] = self._planes(shapes["bitplane"])
        rates = {kind: max(found.values()) for kind, found in forms.items()}
        where = table_geometry(node.op, layer, pads, source)
        precision = Precision(layer.weight_bits, layer.activation_bits)
        kind, reason, chosen = asked, "", "asked"
        if asked == "auto":
            kind, chosen = self._fastest(where, precision, rates)
        elif asked not in forms and asked == "bitplane-lut":
            kind = "bitplane" if "bitplane" in forms else "int8"
            reason = "no bitplane-lut kernel: GPUs have no byte shuffle"
        elif asked not in forms:
            kind, reason = "int8", f"no {asked} kernel: its weights have no code of eight bits"
        table = self.asked.table
        row = None if table is None else table.best_row(where, precision, kind)
        variant = self._variant(forms[kind], row)
        shape = shapes[kind]
        return CudaChoice(
            kind, variant, layer, Tile(1, 1, 1), pads, source, rates, reason, chosen,
            shape=shape, blocks=self._blocks(shape, variant, row),
        )  # fmt: skip

    def _fastest(
        self, where: Geometry, precision: Precision, rates: Mapping[str, float]
    ) -> tuple[str, str]:
        """Kind, and what says so: a table that measured what the model expects, or the model."""
        table = self.asked.table
        expected = max(rates, key=rates.__getitem__)
        if table is not None and table.decides(where, expected):
            kind, measured = table.best_kernel(where, precision)
            if kind in rates:
                return kind, "measured" if measured else "model"
        return expected, "model"

    def _variant(self, rates: Mapping[str, float], row: Entry | None) -> str:
        """The candidate's, the fastest of those measured, or the fastest by the model."""
        for wanted in (self.variant, "" if row is None else row.variant):
            if wanted in rates:
                return wanted
        return max(rates, key=rates.__getitem__)

    def _blocks(self, shape: ProductLayer, variant: str, row: Entry | None) -> ProductTile | None:
        if variant == DIRECT:
            return None
        if row is not None and row.variant == variant and not self.variant:
            mma = variant in _TENSOR_CORES
            found = named_tile(
                row.tile, shape.layer.group_out, shape.depth, _planes_of(shape), shape.sums, mma
            )
            if found is not None:
                return found
        return self._tile(shape, variant, self.beside)

    def _tile(self, shape: ProductLayer, variant: str, beside: int = 0) -> ProductTile:
        return product_tile(
            shape.rows, shape.layer.group_out, shape.depth, _planes_of(shape), shape.sums,
            variant in _TENSOR_CORES, beside,
        )  # fmt: skip

    def _planes(self, shape: ProductLayer) -> dict[str, float]:
        """Rates of the bitplane kernel by variant."""
        known, pairs = RATES[self.arch], shape.data_planes * shape.weight_planes
        return self._rates(
            shape, {POPCOUNT: known.popcount / pairs, TENSOR_BITS: known.bits / pairs}
        )

    def _bytes(self, shape: ProductLayer, fits: bool) -> dict[str, float]:
        """Rates of the int8 kernel by variant; whether weights fit into one or two bytes."""
        known, layer, parts = RATES[self.arch], shape.layer, shape.weight_planes
        few = layer.groups > 1 and (layer.group_out < LEAST_GROUP or layer.group_in < LEAST_GROUP)
        if few or not fits:
            return {DIRECT: known.direct * _CUDA_CORES_REACHED}
        return self._rates(shape, {DOT: known.dot / parts, TENSOR_BYTES: known.bytes / parts})

    def _rates(self, shape: ProductLayer, peaks: Mapping[str, float]) -> dict[str, float]:
        def rate(variant: str) -> float:
            filled = _filled(shape, self._tile(shape, variant))
            return _streamed(shape, peaks[variant] * filled * _reached(variant))

        return {variant: rate(variant) for variant, peak in peaks.items() if peak}


def _planes_of(shape: ProductLayer) -> tuple[int, int]:
    return shape.data_planes, shape.weight_planes


def _reached(variant: str) -> float:
    """Of the peak, what the kernel is expected to reach."""
    return _TENSOR_CORES_REACHED if variant in _TENSOR_CORES else _CUDA_CORES_REACHED


def _filled(shape: ProductLayer, tile: ProductTile) -> float:
    """How much of the tiles is the layer's own work."""
    layer = shape.layer
    down, across = shape.blocks(tile)
    each = WORD if shape.planes else QUAD
    depth = -(-shape.depth // tile.depth) * tile.depth * each
    whole = down * tile.rows * across * tile.columns * depth
    return shape.rows * layer.group_out * layer.reduction / whole


def _streamed(shape: ProductLayer, rate: float) -> float:
    """The rate when codes and weights come from memory once: what planes of few bits save."""
    layer = shape.layer
    data = shape.data_planes * prod(shape.source[:3]) * shape.words
    weights = shape.weight_planes * layer.out_channels * shape.depth
    macs = shape.rows * layer.out_channels * layer.reduction
    return 1 / (1 / rate + 4 * (data + weights) / (_STREAM * macs))
