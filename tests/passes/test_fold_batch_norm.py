import numpy as np
import pytest

from mpqc.graph import Graph
from mpqc.onnx_export import to_onnx
from mpqc.ort import Session
from mpqc.passes.fold_batch_norm import FoldBatchNorm

BATCH_NORM = """
%gamma = Constant() {value=[1.0, -2.0, 0.5, 3.0]} : f32[4]
%beta = Constant() {value=[0.5, 1.0, -1.0, 0.0]} : f32[4]
%mean = Constant() {value=[0.1, 0.2, -0.3, 4.0]} : f32[4]
%var = Constant() {value=[1.0, 0.25, 2.0, 9.0]} : f32[4]
"""


def check(text: str, after: str) -> None:
    """The pass turns one text into the other and changes no result."""
    before = Graph.parse(text)
    graph = FoldBatchNorm()(before)
    assert str(graph) == after.strip()
    rng = np.random.default_rng(1)
    feeds = {name: rng.normal(size=kind.shape).astype(np.float32)
             for name, kind in before.inputs.items()}  # fmt: skip
    want, got = (Session(to_onnx(g)).run(feeds) for g in (before, graph))
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-5)


def test_conv_absorbs_batch_norm() -> None:
    check(
        f"""
%x = Input() : f32[1,2,5,5]
%w = Constant() : f32[4,1,3,3]
{BATCH_NORM}
%c = Conv(%x, %w) {{group=2}} : f32[1,4,3,3] @conv
%y = BatchNormalization(%c, %gamma, %beta, %mean, %var) {{epsilon=0.01}} : f32[1,4,3,3] @bn
return %y
""",
        """
%x = Input() : f32[1,2,5,5]
%conv.weight = Constant() : f32[4,1,3,3]
%conv.bias = Constant() : f32[4]
%y = Conv(%x, %conv.weight, %conv.bias) {group=2} : f32[1,4,3,3] @conv
return %y
""".replace("%conv.bias = Constant() : f32[4]", bias_line()),
    )


def bias_line() -> str:
    gamma, beta = np.array([1, -2, 0.5, 3]), np.array([0.5, 1, -1, 0])
    mean = np.array([0.1, 0.2, -0.3, 4], np.float32).astype(np.float64)
    var = np.array([1, 0.25, 2, 9])
    scale = gamma / np.sqrt(var + float(np.float32(0.01)))
    bias = (beta - mean * scale).astype(np.float32)
    return f"%conv.bias = Constant() {{value={bias.tolist()}}} : f32[4]"


def test_a_chain_folds_as_a_whole() -> None:
    check(
        """
%x = Input() : f32[1,1,2,2]
%w = Constant() {value=[1.0, 2.0]} : f32[2,1,1,1]
%b = Constant() {value=[1.0, -1.0]} : f32[2]
%k = Constant() {value=[2.0, 4.0]} : f32[1,2,1,1]
%one = Constant() {value=[1.0]} : f32[]
%c = Conv(%x, %w, %b) : f32[1,2,2,2]
%d = Mul(%k, %c) : f32[1,2,2,2]
%e = Sub(%one, %d) : f32[1,2,2,2]
%f = Div(%e, %k) : f32[1,2,2,2]
%y = Add(%f, %k) : f32[1,2,2,2]
return %y
""",
        """
%x = Input() : f32[1,1,2,2]
%c.weight = Constant() {value=[-1.0, -2.0]} : f32[2,1,1,1]
%c.bias = Constant() {value=[1.5, 5.25]} : f32[2]
%y = Conv(%x, %c.weight, %c.bias) : f32[1,2,2,2] @c
return %y
""",
    )


def test_matrix_product_becomes_gemm() -> None:
    check(
        """
%x = Input() : f32[3,2]
%w = Constant() {value=[1.0, 2.0, 3.0, 4.0]} : f32[2,2]
%b = Constant() {value=[0.5, -0.5]} : f32[2]
%k = Constant() {value=[2.0]} : f32[]
%c = MatMul(%x, %w) : f32[3,2] @dense
%d = Add(%b, %c) : f32[3,2]
%y = Mul(%d, %k) : f32[3,2]
return %y
""",
        """
%x = Input() : f32[3,2]
%dense.weight = Constant() {value=[2.0, 4.0, 6.0, 8.0]} : f32[2,2]
%dense.bias = Constant() {value=[1.0, -1.0]} : f32[2]
%y = Gemm(%x, %dense.weight, %dense.bias) : f32[3,2] @dense
return %y
""",
    )


def test_gemm_keeps_alpha_and_takes_beta_in() -> None:
    check(
        """
%x = Input() : f32[1,2]
%w = Constant() {value=[1.0, 2.0, 3.0, 4.0]} : f32[2,2]
%b = Constant() {value=[1.0, 2.0]} : f32[1,2]
%k = Constant() {value=[2.0, 3.0]} : f32[2]
%c = Gemm(%x, %w, %b) {alpha=0.5, beta=3.0, transB=1} : f32[1,2]
%y = Mul(%c, %k) : f32[1,2]
return %y
""",
        """
%x = Input() : f32[1,2]
%c.weight = Constant() {value=[2.0, 4.0, 9.0, 12.0]} : f32[2,2]
%c.bias = Constant() {value=[6.0, 18.0]} : f32[2]
%y = Gemm(%x, %c.weight, %c.bias) {alpha=0.5, transB=1} : f32[1,2] @c
return %y
""",
    )


def test_transposed_convolution_scales_its_own_channels() -> None:
    check(
        """
%x = Input() : f32[1,2,1,1]
%w = Constant() {value=[1.0, 2.0, 3.0, 4.0]} : f32[2,2,1,1]
%k = Constant() {value=[1.0, 10.0, 100.0, 1000.0]} : f32[4,1,1]
%c = ConvTranspose(%x, %w) {group=2} : f32[1,4,1,1]
%y = Mul(%c, %k) : f32[1,4,1,1]
return %y
""",
        """
%x = Input() : f32[1,2,1,1]
%c.weight = Constant() {value=[1.0, 20.0, 300.0, 4000.0]} : f32[2,2,1,1]
%c.bias = Constant() {value=[0.0, 0.0, 0.0, 0.0]} : f32[4]
%y = ConvTranspose(%x, %c.weight, %c.bias) {group=2} : f32[1,4,1,1] @c
return %y
""",
    )


def test_lone_batch_norm_becomes_mul_and_add() -> None:
    check(
        """
%x = Input() : f32[1,2,3]
%gamma = Constant() {value=[1.0, 2.0]} : f32[2]
%mean = Constant() {value=[1.0, 3.0]} : f32[2]
%var = Constant() {value=[4.0, 1.0]} : f32[2]
%y = BatchNormalization(%x, %gamma, %mean, %mean, %var) {epsilon=0.0} : f32[1,2,3] @bn
return %y
""",
        """
%x = Input() : f32[1,2,3]
%bn.scale = Constant() {value=[0.5, 2.0]} : f32[2,1]
%bn.shift = Constant() {value=[0.5, -3.0]} : f32[2,1]
%bn.scaled = Mul(%x, %bn.scale) : f32[1,2,3]
%y = Add(%bn.scaled, %bn.shift) : f32[1,2,3] @bn
return %y
""",
    )


CONV = """
%x = Input() : f32[1,2,4,4]
%w = Constant() : f32[4,2,1,1]
%k = Constant() : f32[4,1,1]
%rows = Constant() : f32[4,1]
%zero = Constant() {value=[0.0]} : f32[1]
%c = Conv(%x, %w) : f32[1,4,4,4]
"""


@pytest.mark.parametrize(
    "rest",
    [
        "%y = Add(%c, %k) : f32[1,4,4,4]\nreturn %y, %c",  # somebody wants the sum itself
        "%y = Add(%c, %k) : f32[1,4,4,4]\n%z = Relu(%c) : f32[1,4,4,4]\nreturn %y, %z",
        "%y = Add(%c, %rows) : f32[1,4,4,4]\nreturn %y",  # along the wrong axis
        "%y = Add(%c, %c) : f32[1,4,4,4]\nreturn %y",
        "%y = Div(%k, %c) : f32[1,4,4,4]\nreturn %y",
        "%y = Div(%c, %zero) : f32[1,4,4,4]\nreturn %y",
        "%y = Relu(%c) : f32[1,4,4,4]\n%z = Add(%y, %k) : f32[1,4,4,4]\nreturn %z",
    ],
)
def test_other_neighbours_stay(rest: str) -> None:
    before = Graph.parse(CONV + rest)
    assert str(FoldBatchNorm()(before)) == str(before)


def test_batch_norm_after_a_shared_conv_stays_apart() -> None:
    before = Graph.parse(
        f"""
        %x = Input() : f32[1,2,4,4]
        %w = Constant() : f32[4,2,1,1]
        {BATCH_NORM}
        %c = Conv(%x, %w) : f32[1,4,4,4]
        %y = BatchNormalization(%c, %gamma, %beta, %mean, %var) : f32[1,4,4,4]
        return %y, %c
        """
    )
    assert [node.op for node in FoldBatchNorm()(before)] == ["Conv", "Mul", "Add"]
