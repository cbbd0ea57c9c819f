from pathlib import Path

import numpy as np
import pytest

from mpqc import importer
from mpqc.graph import Graph
from mpqc.onnx_export import to_onnx
from mpqc.passes.drop_dead import DropDead
from mpqc.passes.read_arithmetic import ReadArithmetic
from mpqc.reference import run

# Everything but the integer product itself, which importing alone does not recognise.
QUANTIZED = Graph.parse(
    """
    %x = Input() : f32[2,6]
    %w = Constant() : i16[6,4]
    %m = Constant() {value=[0.01, 0.02, 0.5, 0.001]} : f32[4]
    %b = Constant() {value=[1.0, -2.0, 0.25, 0.0]} : f32[4]
    %q = Quantize(%x) {scale=0.25, zero_point=5, bits=4} : u8[2,6]
    %acc = IntMatMul(%q, %w) {activation_bits=4, weight_bits=3, weight_levels="signed", \
zero_point=5} : i32[2,4]
    %r = Requantize(%acc, %m, %b) {axis=1, bits=3, zero_point=2} : u8[2,4]
    %y = Affine(%acc, %m, %b) {axis=1} : f32[2,4]
    %d = Dequantize(%r) {scale=0.5, zero_point=2} : f32[2,4]
    %z = Add(%d, %y) : f32[2,4]
    return %z
    """,
    {"w": np.random.default_rng(0).integers(-4, 4, (6, 4)).astype(np.int16)},
)


def spelled(path: Path) -> Graph:
    """The graph in standard operators, with the integer product put back."""
    path.write_bytes(to_onnx(QUANTIZED))
    graph = importer.load(path)
    nodes = []
    for node in graph:
        if node.op == "MatMulInteger":
            product = QUANTIZED["acc"]
            nodes.append(
                type(node)(
                    node.name, product.op, (node.inputs[0], "w"), node.outputs, product.attrs
                )
            )
        else:
            nodes.append(node)
    return graph.with_(nodes, constants={"w": QUANTIZED.constants["w"]})


def test_reads_back_what_is_spelled_out(tmp_path: Path) -> None:
    found = DropDead()(ReadArithmetic()(spelled(tmp_path / "m.onnx")))
    wanted = {node.output: node for node in QUANTIZED}
    assert {node.output for node in found} == wanted.keys()
    for node in found:
        assert node.op == wanted[node.output].op
        assert dict(node.attrs) == dict(wanted[node.output].attrs)
    x = np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)
    for value, array in run(QUANTIZED, {"x": x}, ["r", "z"]).items():
        np.testing.assert_array_equal(run(found, {"x": x}, [value])[value], array)


def graph(body: str) -> Graph:
    return Graph.parse(
        f"""
        %x = Input() : f32[2,3]
        %s = Constant() {{value=[0.5]}} : f32[1]
        %v = Constant() {{value=[0.5, 0.25, 0.125]}} : f32[3]
        %half = Constant() {{value=[0.5]}} : f32[1]
        %z = Constant() {{value=[3.0]}} : f32[1]
        %low = Constant() {{value=[0.0]}} : f32[1]
        %high = Constant() {{value=[15.0]}} : f32[1]
        %top = Constant() {{value=[300.0]}} : f32[1]
        {body}
        return %y
        """
    )


CODES = """
    %d = Div(%x, %{scale}) : f32[2,3]
    %r = {round}(%d) : f32[2,3]
    %a = Add(%r, %{zero}) : f32[2,3]
    %c = Clip(%a, %low, %{high}) : f32[2,3]
    %y = Cast(%c) {{to={to}}} : {type}[2,3]
"""
GOOD = {"scale": "s", "round": "Round", "zero": "z", "high": "high", "to": 2, "type": "u8"}


def test_a_quantizer() -> None:
    (node,) = DropDead()(ReadArithmetic()(graph(CODES.format(**GOOD))))
    assert node.op == "Quantize"
    assert dict(node.attrs) == {"scale": 0.5, "zero_point": 3, "bits": 4}


@pytest.mark.parametrize(
    "other",
    [
        {"scale": "v"},  # a scale for each channel
        {"round": "Floor"},
        {"zero": "half"},  # no code
        {"high": "top"},  # beyond uint8
        {"to": 3, "type": "i8"},
    ],
)
def test_what_means_something_else_stays(other: dict[str, object]) -> None:
    before = graph(CODES.format(**GOOD | other))
    assert str(ReadArithmetic()(before)) == str(before)
