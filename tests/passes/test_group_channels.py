"""Channels of equal width as layers of their own: exact, cheap, and said in the manifest."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mpqc import lowering
from mpqc.graph import Array, Graph
from mpqc.passes.base import run
from mpqc.passes.channels_last import ChannelsLast
from mpqc.passes.drop_dead import DropDead
from mpqc.passes.group_channels import GroupChannels, part_of
from mpqc.quantizers import channel_widths, quantize_weights, stored_levels
from mpqc.select_kernel import Selector
from mpqc.target import native
from tests.graph_runner import check

INT = 'activation_bits=2, weight_bits=4, weight_levels="signed", zero_point=0'
BODY = f"""
%x = Input() : u8[1,16,5,6]
%w1 = Constant() : i16[24,16,3,3]
%m1 = Constant() : f32[24]
%b1 = Constant() : f32[24]
%w2 = Constant() : i16[16,24,3,3]
%m2 = Constant() : f32[16]
%b2 = Constant() : f32[16]
%c1 = IntConv(%x, %w1) {{pads=[1, 1, 1, 1], {INT}}} : i32[1,24,5,6] @first
%q1 = Requantize(%c1, %m1, %b1) {{axis=1, bits=2, zero_point=0}} : u8[1,24,5,6]
"""
CHAIN = f"""{BODY}
%c2 = IntConv(%q1, %w2) {{pads=[1, 1, 1, 1], strides=[2, 2], {INT}}} : i32[1,16,3,3] @second
%y = Affine(%c2, %m2, %b2) {{axis=1}} : f32[1,16,3,3]
return %y
"""
SEEN = CHAIN.replace("return %y", "return %y, %q1")
DEPTHWISE = f"""{BODY.replace("[16,24,3,3]", "[24,1,3,3]").replace("f32[16]", "f32[24]")}
%c2 = IntConv(%q1, %w2) {{group=24, pads=[1, 1, 1, 1], {INT}}} : i32[1,24,5,6] @second
%y = Affine(%c2, %m2, %b2) {{axis=1}} : f32[1,24,5,6]
return %y
"""
MATRICES = f"""
%x = Input() : u8[3,20]
%w1 = Constant() : i16[20,16]
%m1 = Constant() : f32[16]
%b1 = Constant() : f32[16]
%w2 = Constant() : i16[16,8]
%c1 = IntMatMul(%x, %w1) {{{INT}}} : i32[3,16] @first
%q1 = Requantize(%c1, %m1, %b1) {{axis=1, bits=2, zero_point=0}} : u8[3,16]
%c2 = IntMatMul(%q1, %w2) {{{INT}}} : i32[3,8] @second
return %c2
"""
SUMS = f"""
%x = Input() : u8[1,16,4,4]
%w1 = Constant() : i16[16,16,1,1]
%c1 = IntConv(%x, %w1) {{{INT}}} : i32[1,16,4,4] @first
return %c1
"""


def rows(widths: Sequence[int], size: int, seed: int) -> Array:
    """int16 [channels, size] that use the whole of their widths."""
    random = np.random.default_rng(seed)
    made = np.zeros((len(widths), size), np.int16)
    for row, bits in zip(made, widths, strict=True):
        if bits == 1:
            row[:] = random.choice([-1, 1], size)
        elif bits:
            row[:] = random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), size)
            row[0] = -(2 ** (bits - 1))
    return made


def graph(text: str, widths: Sequence[int], offset: float = 0.0) -> Graph:
    """The layer ``first`` has channels of the given widths, pruned ones the offset."""
    found = Graph.parse(text, {})
    random = np.random.default_rng(1)
    constants: dict[str, Array] = {}
    for name, array in found.constants.items():
        if array.dtype == np.int16:
            first, matrix = name == "w1", array.ndim == 2
            channels = array.shape[1] if matrix else array.shape[0]
            of = widths if first else [4] * channels
            made = rows(of, array.size // channels, 3 if first else 4)
            constants[name] = made.T if matrix else made.reshape(array.shape)
        else:
            spread = random.uniform(0.02, 0.1, array.shape)
            constants[name] = spread.astype(np.float32)
    if "b1" in constants:
        constants["b1"] = np.where(np.array(widths) == 0, offset, constants["b1"])
        constants["b1"] = constants["b1"].astype(np.float32)
    return Graph.parse(text, constants)


MIXED = [4, 2, 2, 0, 1, 2, 4, 4, 2, 2, 1, 1, 3, 3, 0, 0, 4, 2, 1, 2, 2, 0, 0, 0]
CASES = {
    "chain": (CHAIN, MIXED),
    "seen": (SEEN, MIXED),
    "depthwise": (DEPTHWISE, MIXED),
    "matrices": (MATRICES, MIXED[:16]),
    "sums": (SUMS, MIXED[:16]),
    "sorted": (SUMS, [2] * 8 + [4] * 8),
}


def grouped(found: Graph) -> Graph:
    return run(found, ChannelsLast(), GroupChannels(), DropDead())


def firsts(found: Graph) -> dict[int, int]:
    """Width -> channels of the parts of the layer ``first``."""
    return {
        node.int_attr("weight_bits"): found.shape(node.output)[-1]
        for node in found
        if part_of(node) == "first"
    }


@pytest.mark.parametrize(
    ("case", "offset"), [*((case, 1.7) for case in CASES), ("chain", -3.0), ("matrices", 0.0)]
)
def test_computes_the_same(case: str, offset: float, tmp_path: Path) -> None:
    """The library built of the parts gives what the whole layer gives."""
    found = graph(*CASES[case], offset)
    last = grouped(found)
    assert len(firsts(last)) > 1
    check(found, lowering.lower(last, native(), Selector(native())), tmp_path)


def test_each_channel_runs_at_its_width() -> None:
    """One part for each width; zeros ride with the narrowest where they have to be computed."""
    assert firsts(grouped(graph(SEEN, MIXED))) == {1: 4, 2: 14, 3: 2, 4: 4}
    parts = firsts(grouped(graph(SUMS, [1] * 8 + [2] * 4 + [3] * 3 + [4])))
    assert parts == {1: 8, 2: 4, 3: 3, 4: 1}


@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_readers_lose_the_weights_of_pruned_channels(offset: float) -> None:
    """Channels whose code is the zero point of the readers are gone, in multiples of eight."""
    pruned = [2] * 10 + [0] * 14
    last = grouped(graph(CHAIN, pruned, offset))
    second = last["second"]
    assert last.constants[second.inputs[1]].shape[1] == 16
    assert sum(firsts(last).values()) == 16
    kept = grouped(graph(CHAIN, pruned, 1.7))  # their code is 2: a constant that readers need
    assert kept.constants[kept["second"].inputs[1]].shape[1] == 24


def test_nothing_to_split_stays() -> None:
    """Layers of one width are left alone."""
    found = run(graph(CHAIN, [4] * 24), ChannelsLast(), DropDead())
    assert str(GroupChannels()(found)) == str(found)


def test_split_only_where_it_pays() -> None:
    """A model of time decides which widths stay together."""
    found = run(graph(SUMS, [2] * 8 + [4] * 8), ChannelsLast(), DropDead())
    assert len(firsts(GroupChannels(lambda *_: 1e5)(found))) == 1  # a part costs as much

    def by_planes(lone: Graph, node: object) -> float:
        (layer,) = lone
        return 1e5 * layer.int_attr("weight_bits") * lone.shape("sums")[-1]

    assert firsts(GroupChannels(by_planes)(found)) == {2: 8, 4: 8}


def test_widths_of_channels() -> None:
    """The least width that holds the integers."""
    values = np.array([[0, 0], [1, -1], [1, 0], [-2, 1], [2, 0], [3, -4], [-5, 0], [127, -128]])
    assert channel_widths(values).tolist() == [0, 1, 2, 2, 3, 3, 4, 8]
    weights = np.random.default_rng(0).normal(size=(9, 40)).astype(np.float32)
    made = quantize_weights(weights, tuple(range(9)), 0)
    assert (channel_widths(made.values) <= np.arange(9)).all()
    assert not made.values[0].any()
    assert (made.bits, made.levels) == (8, "signed")
    assert stored_levels([1, 1]) == (1, "odd")
    assert stored_levels([0, 1]) == (2, "signed")
    assert stored_levels(3) == (3, "signed")
