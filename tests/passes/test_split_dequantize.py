import numpy as np

from mpqc import reference
from mpqc.graph import Graph
from mpqc.passes.split_dequantize import SplitDequantize

BEFORE = """
    %x = Input() : f32[2,3]
    %q = Quantize(%x) {bits=8, scale=0.1, zero_point=3} : u8[2,3]
    %d = Dequantize(%q) {scale=0.1, zero_point=3} : f32[2,3]
    %y = Relu(%d) : f32[2,3]
    %z = Add(%d, %d) : f32[2,3]
    return %y, %z
"""


def test_each_reader_gets_its_own() -> None:
    after = SplitDequantize()(Graph.parse(BEFORE))
    assert str(after) == str(Graph.parse("""
        %x = Input() : f32[2,3]
        %q = Quantize(%x) {bits=8, scale=0.1, zero_point=3} : u8[2,3]
        %d = Dequantize(%q) {scale=0.1, zero_point=3} : f32[2,3]
        %y = Relu(%d) : f32[2,3]
        %d.z = Dequantize(%q) {scale=0.1, zero_point=3} : f32[2,3]
        %z = Add(%d.z, %d.z) : f32[2,3]
        return %y, %z
    """))  # fmt: skip


def test_meaning_stays() -> None:
    graph = Graph.parse(BEFORE)
    feeds = {"x": np.linspace(-3, 3, 6, dtype=np.float32).reshape(2, 3)}
    before, after = (reference.run(g, feeds) for g in (graph, SplitDequantize()(graph)))
    for name in graph.outputs:
        np.testing.assert_array_equal(before[name], after[name])


def test_an_output_keeps_its_node() -> None:
    graph = Graph.parse("""
        %x = Input() : u8[4]
        %d = Dequantize(%x) {scale=0.5, zero_point=0} : f32[4]
        %y = Relu(%d) : f32[4]
        return %d, %y
    """)
    after = SplitDequantize()(graph)
    assert after.outputs == ("d", "y")
    assert after["y"].inputs == ("d.y",)
