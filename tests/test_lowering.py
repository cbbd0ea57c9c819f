"""Which nodes become one kernel, in which form values pass between them, and what comes out."""

from pathlib import Path

import pytest

from mpqc import pipeline
from mpqc.demo import files
from mpqc.graph import Graph, Precision
from mpqc.grouping import form_groups
from mpqc.passes.base import run
from mpqc.passes.channels_last import ChannelsLast
from mpqc.passes.drop_dead import DropDead
from mpqc.plan import Plan
from mpqc.program import SLACK, Program, plan_memory
from mpqc.select_kernel import KERNELS
from mpqc.target import TARGETS, native
from tests.graph_runner import check, lower, parse
from tests.test_program import check as check_memory

INT = 'activation_bits=2, weight_bits=2, weight_levels="signed", zero_point=0'
PAD = f"pads=[1, 1, 1, 1], {INT}"

CHAIN = f"""
%x = Input() : u8[1,16,6,7]
%w1 = Constant() : i16[32,16,3,3]
%c1_m = Constant() : f32[32]
%c1_b = Constant() : f32[32]
%w2 = Constant() : i16[24,32,3,3]
%c2_m = Constant() : f32[24]
%c2_b = Constant() : f32[24]
%c1 = IntConv(%x, %w1) {{{PAD}}} : i32[1,32,6,7] @conv1
%q1 = Requantize(%c1, %c1_m, %c1_b) {{axis=1, bits=2, zero_point=0}} : u8[1,32,6,7]
%c2 = IntConv(%q1, %w2) {{{PAD}, strides=[2, 2]}} : i32[1,24,3,4] @conv2
%y = Affine(%c2, %c2_m, %c2_b) {{axis=1}} : f32[1,24,3,4]
return %y
"""

RESIDUAL = f"""
%x = Input() : f32[1,16,5,5]
%w1 = Constant() : i16[16,16,3,3]
%c1_m = Constant() : f32[16]
%c1_b = Constant() : f32[16]
%w2 = Constant() : i16[16,16,3,3]
%c2_m = Constant() : f32[16]
%c2_b = Constant() : f32[16]
%q = Quantize(%x) {{bits=2, scale=0.4, zero_point=0}} : u8[1,16,5,5]
%c1 = IntConv(%q, %w1) {{{PAD}}} : i32[1,16,5,5] @conv1
%q1 = Requantize(%c1, %c1_m, %c1_b) {{axis=1, bits=2, zero_point=0}} : u8[1,16,5,5]
%c2 = IntConv(%q1, %w2) {{{PAD}}} : i32[1,16,5,5] @conv2
%a2 = Affine(%c2, %c2_m, %c2_b) {{axis=1}} : f32[1,16,5,5]
%s = Add(%a2, %x) : f32[1,16,5,5]
%r = Relu(%s) : f32[1,16,5,5]
%q2 = Quantize(%r) {{bits=2, scale=0.7, zero_point=0}} : u8[1,16,5,5]
%w3 = Constant() : i16[8,16,1,1]
%c3 = IntConv(%q2, %w3) {{{INT}}} : i32[1,8,5,5] @conv3
return %c3, %r
"""

SHORTCUTS = f"""
%x = Input() : u8[1,16,4,4]
%w1 = Constant() : i16[16,16,1,1]
%a1_m = Constant() : f32[16]
%a1_b = Constant() : f32[16]
%w2 = Constant() : i16[16,16,3,3]
%a2_m = Constant() : f32[16]
%a2_b = Constant() : f32[16]
%c1 = IntConv(%x, %w1) {{{INT}}} : i32[1,16,4,4] @conv1
%a1 = Affine(%c1, %a1_m, %a1_b) {{axis=1}} : f32[1,16,4,4]
%c2 = IntConv(%x, %w2) {{{PAD}}} : i32[1,16,4,4] @conv2
%a2 = Affine(%c2, %a2_m, %a2_b) {{axis=1}} : f32[1,16,4,4]
%s = Add(%a1, %a2) : f32[1,16,4,4]
%y = Quantize(%s) {{bits=3, scale=0.2, zero_point=4}} : u8[1,16,4,4]
return %y
"""

CONCAT = f"""
%x = Input() : u8[1,8,4,4]
%w1 = Constant() : i16[8,8,1,1]
%c1_m = Constant() : f32[8]
%c1_b = Constant() : f32[8]
%c1 = IntConv(%x, %w1) {{{INT}}} : i32[1,8,4,4] @conv1
%q1 = Requantize(%c1, %c1_m, %c1_b) {{axis=1, bits=2, zero_point=0}} : u8[1,8,4,4]
%j = Concat(%x, %q1) {{axis=1}} : u8[1,16,4,4]
%w2 = Constant() : i16[8,16,3,3]
%y = IntConv(%j, %w2) {{{PAD}}} : i32[1,8,4,4] @conv2
return %y
"""

POOL = f"""
%x = Input() : u8[1,8,8,8]
%w1 = Constant() : i16[16,8,3,3]
%c1_m = Constant() : f32[16]
%c1_b = Constant() : f32[16]
%c1 = IntConv(%x, %w1) {{{PAD}}} : i32[1,16,8,8] @conv1
%q1 = Requantize(%c1, %c1_m, %c1_b) {{axis=1, bits=2, zero_point=0}} : u8[1,16,8,8]
%p = MaxPool(%q1) {{kernel_shape=[2, 2], strides=[2, 2]}} : u8[1,16,4,4]
%w2 = Constant() : i16[10,16,3,3]
%y = IntConv(%p, %w2) {{{INT}, dilations=[1, 2], pads=[0, 1, 2, 3]}} : i32[1,10,4,4] @conv2
return %y
"""

DEPTHWISE = f"""
%x = Input() : u8[1,12,6,6]
%w1 = Constant() : i16[12,1,3,3]
%c1_m = Constant() : f32[12]
%c1_b = Constant() : f32[12]
%c1 = IntConv(%x, %w1) {{{PAD}, group=12}} : i32[1,12,6,6] @depthwise
%q1 = Requantize(%c1, %c1_m, %c1_b) {{axis=1, bits=2, zero_point=1}} : u8[1,12,6,6]
%w2 = Constant() : i16[20,12,1,1]
%y = IntConv(%q1, %w2) {{activation_bits=2, weight_bits=2, weight_levels="signed", zero_point=1}} : i32[1,20,6,6] @pointwise
return %y
"""  # noqa: E501

GROUPED = f"""
%x = Input() : u8[2,15,5,4]
%w1 = Constant() : i16[9,5,3,3]
%c1_m = Constant() : f32[9]
%c1_b = Constant() : f32[9]
%c1 = IntConv(%x, %w1) {{{PAD}, group=3}} : i32[2,9,5,4] @grouped
%q1 = Requantize(%c1, %c1_m, %c1_b) {{axis=1, bits=2, zero_point=0}} : u8[2,9,5,4]
%w_odd = Constant() : i16[6,3,3,3]
%y = IntConv(%q1, %w_odd) {{activation_bits=2, group=3, weight_bits=2, weight_levels="odd", zero_point=0}} : i32[2,6,3,2] @odd
return %y
"""  # noqa: E501

ONE_DIMENSION = f"""
%x = Input() : u8[1,6,20]
%w1 = Constant() : i16[16,6,5]
%c1_m = Constant() : f32[16]
%c1_b = Constant() : f32[16]
%c1 = IntConv(%x, %w1) {{{INT}, pads=[2, 1], strides=[2]}} : i32[1,16,10] @conv1
%q1 = Requantize(%c1, %c1_m, %c1_b) {{axis=1, bits=2, zero_point=2}} : u8[1,16,10]
%w2 = Constant() : i16[7,16,3]
%y = IntConv(%q1, %w2) {{activation_bits=2, dilations=[2], pads=[2, 2], weight_bits=2, weight_levels="signed", zero_point=2}} : i32[1,7,10] @conv2
return %y
"""  # noqa: E501

SHARED = f"""
%x = Input() : u8[1,16,5,5]
%w1 = Constant() : i16[8,16,3,3]
%w2 = Constant() : i16[8,16,1,1]
%w_odd = Constant() : i16[8,16,3,3]
%y1 = IntConv(%x, %w1) {{{PAD}}} : i32[1,8,5,5] @conv1
%y2 = IntConv(%x, %w2) {{{INT}, strides=[2, 2]}} : i32[1,8,3,3] @conv2
%y3 = IntConv(%x, %w_odd) {{activation_bits=2, pads=[1, 1, 1, 1], weight_bits=2, weight_levels="odd", zero_point=0}} : i32[1,8,5,5] @conv3
%f = Dequantize(%x) {{scale=0.5, zero_point=1}} : f32[1,16,5,5]
return %y1, %y2, %y3, %f
"""  # noqa: E501

# pairs of neighbouring pixels, in rows of 8 and of 12
PAIRED = """
%f = Input() : f32[1,48,6,8]
%x = Quantize(%f) {bits=1, scale=1.0, zero_point=0} : u8[1,48,6,8]
%w_odd = Constant() : i16[8,48,3,3]
%v_odd = Constant() : i16[8,48,1,1]
%y2 = IntConv(%x, %v_odd) {activation_bits=1, weight_bits=2, weight_levels="odd", zero_point=0} : i32[1,8,6,8] @conv2
%y1 = IntConv(%x, %w_odd) {activation_bits=1, weight_bits=2, weight_levels="odd", zero_point=0} : i32[1,8,4,6] @conv1
return %y1, %y2
"""  # noqa: E501

INNER = CHAIN.replace("return %y", "return %q1, %y, %c1")

ALIASES = """
%x = Input() : f32[2,3]
%i = Identity(%x) : f32[2,3]
%r = Relu(%x) : f32[2,3]
%sh = Constant() {value=[6]} : i64[1]
%v = Reshape(%r, %sh) : f32[6]
%k = Constant() {value=[1.0, 2.0]} : f32[2]
return %x, %i, %r, %v, %k
"""

MATMUL = f"""
%x = Input() : f32[2,5,12]
%w1 = Constant() : i16[12,40]
%a1_m = Constant() : f32[40]
%a1_b = Constant() : f32[40]
%w2 = Constant() : i16[40,10]
%a2_m = Constant() : f32[1]
%a2_b = Constant() : f32[10]
%q = Quantize(%x) {{bits=2, scale=0.5, zero_point=2}} : u8[2,5,12]
%c1 = IntMatMul(%q, %w1) {{activation_bits=2, weight_bits=2, weight_levels="signed", zero_point=2}} : i32[2,5,40] @fc1
%q1 = Requantize(%c1, %a1_m, %a1_b) {{axis=2, bits=2, zero_point=0}} : u8[2,5,40]
%c2 = IntMatMul(%q1, %w2) {{{INT}}} : i32[2,5,10] @fc2
%y = Affine(%c2, %a2_m, %a2_b) {{axis=2}} : f32[2,5,10]
return %y
"""  # noqa: E501

ELEMENTWISE = """
%x = Input() : f32[1,8,3,3]
%lo = Constant() {value=[-0.5]} : f32[1]
%hi = Constant() {value=[1.5]} : f32[1]
%k = Constant() {value=[0.3]} : f32[1]
%t = Constant() : f32[8,1,1]
%w1 = Constant() : i16[8,8,3,3]
%a1_m = Constant() : f32[8]
%a1_b = Constant() : f32[8]
%q = Quantize(%x) {bits=2, scale=0.4, zero_point=1} : u8[1,8,3,3]
%c1 = IntConv(%q, %w1) {activation_bits=2, pads=[1, 1, 1, 1], weight_bits=2, weight_levels="signed", zero_point=1} : i32[1,8,3,3] @conv1
%a1 = Affine(%c1, %a1_m, %a1_b) {axis=1} : f32[1,8,3,3]
%l = LeakyRelu(%a1) {alpha=0.1} : f32[1,8,3,3]
%n = Neg(%l) : f32[1,8,3,3]
%d = Dequantize(%q) {scale=0.4, zero_point=1} : f32[1,8,3,3]
%s = Sub(%n, %d) : f32[1,8,3,3]
%e = Mul(%s, %k) : f32[1,8,3,3]
%g = Div(%e, %t) : f32[1,8,3,3]
%h = Abs(%g) : f32[1,8,3,3]
%j = Clip(%h, %lo, %hi) : f32[1,8,3,3]
%y = Quantize(%j) {bits=8, scale=0.01, zero_point=0} : u8[1,8,3,3]
return %y
"""  # noqa: E501

GRAPHS = {
    "chain": CHAIN, "residual": RESIDUAL, "shortcuts": SHORTCUTS, "concat": CONCAT, "pool": POOL,
    "depthwise": DEPTHWISE, "grouped": GROUPED, "one dimension": ONE_DIMENSION,
    "shared": SHARED, "inner": INNER, "aliases": ALIASES, "matmul": MATMUL,
    "elementwise": ELEMENTWISE, "paired": PAIRED,
}  # fmt: skip


def groups(text: str) -> list[str]:
    graph = run(parse(text), ChannelsLast(), DropDead())
    return [f"{g.kind}: {' '.join(node.name for node in g.nodes)}" for g in form_groups(graph)]


def moved(program: Program) -> set[str]:
    """Types that go between steps, as text without shapes."""
    written = {name for step in program.steps for name in step.outputs}
    read = {name for step in program.steps for name in step.inputs}
    return {program.buffers[program.root(name)].dtype for name in written & read}


# Meaning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", GRAPHS)
def test_computes_what_the_graph_means(name: str, kernel: str, tmp_path: Path) -> None:
    graph = parse(GRAPHS[name])
    program = lower(graph, kernel=kernel)
    check_memory(program, plan_memory(program))
    check(graph, program, tmp_path)


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise", "matmul"])
@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3"])
def test_older_machines_compute_the_same(name: str, target: str, tmp_path: Path) -> None:
    if not TARGETS[target].runs_here:
        pytest.skip(f"this machine does not run {target}")
    graph = parse(GRAPHS[name])
    check(graph, lower(graph, TARGETS[target]), tmp_path, TARGETS[target])


# Groups --------------------------------------------------------------------------------------


def test_requantization_fuses_with_its_layer() -> None:
    assert groups(CHAIN) == ["region: x.nhwc.turn", "layer: conv1 q1", "layer: conv2 y",
                             "region: y.turn"]  # fmt: skip


def test_a_residual_addition_and_the_next_quantizer_fuse() -> None:
    assert [line for line in groups(RESIDUAL) if not line.startswith("region")] == [
        "elementwise: q",
        "layer: conv1 q1",
        "layer: conv2 a2 s r q2",
        "layer: conv3",
    ]


def test_one_of_two_branches_takes_their_sum() -> None:
    assert groups(SHORTCUTS) == [
        "region: x.nhwc.turn",
        "layer: conv1 a1",
        "layer: conv2 a2 s y",
        "region: y.turn",
    ]


def test_a_pool_of_codes_stays_between_layers() -> None:
    found = groups(POOL)
    assert [line for line in found if line.startswith("layer")] == [
        "layer: conv1 q1", "layer: conv2",
    ]  # fmt: skip
    assert moved(lower(parse(POOL))) <= {"uint8", "int16", "int32"}


def test_a_clip_whose_bounds_are_computed_is_not_fused() -> None:
    text = ELEMENTWISE.replace(
        "%lo = Constant() {value=[-0.5]} : f32[1]",
        "%zero = Input() : f32[1]\n%lo = Neg(%zero) : f32[1]",
    )
    assert not any("j" in line.split() for line in groups(text) if line.startswith("layer"))


def test_a_group_never_waits_for_itself() -> None:
    text = f"""
    %x = Input() : u8[1,8,4,4]
    %w1 = Constant() : i16[8,8,1,1]
    %w2 = Constant() : i16[8,8,1,1]
    %a_m = Constant() : f32[8]
    %a_b = Constant() : f32[8]
    %c1 = IntConv(%x, %w1) {{{INT}}} : i32[1,8,4,4] @conv1
    %q1 = Requantize(%c1, %a_m, %a_b) {{axis=1, bits=2, zero_point=0}} : u8[1,8,4,4]
    %f1 = Affine(%c1, %a_m, %a_b) {{axis=1}} : f32[1,8,4,4]
    %c2 = IntConv(%q1, %w2) {{{INT}}} : i32[1,8,4,4] @conv2
    %f2 = Affine(%c2, %a_m, %a_b) {{axis=1}} : f32[1,8,4,4]
    %y = Add(%f1, %f2) : f32[1,8,4,4]
    return %y
    """
    layers = [line for line in groups(text) if line.startswith("layer")]
    assert layers == ["layer: conv1 q1 f1", "layer: conv2 f2 y"]


# Forms ---------------------------------------------------------------------------------------


def test_neighbours_exchange_planes_and_no_floats() -> None:
    program = lower(parse(CHAIN), kernel="bitplane")
    assert "q1.nhwc" not in {name for step in program.steps for name in step.inputs}
    assert program.buffers["q1.nhwc.planes"].shape[0] == 2
    written = {name for step in program.steps for name in step.outputs}
    floats = {name for name in written if program.buffers[name].dtype == "float32"}
    assert floats == {"y", "y.nhwc"}  # the model's output alone


def test_a_residual_stream_stays_float_and_codes_stay_codes() -> None:
    program = lower(parse(RESIDUAL))
    floats = {
        name.removesuffix(".nhwc")
        for step in program.steps
        for name in step.outputs
        if program.buffers[program.root(name)].dtype == "float32"
    }
    assert floats == {"x", "r"}


def test_floats_between_layers_have_a_reason() -> None:
    assert lower(parse(RESIDUAL)).floats == {"r": "an output of the model"}
    assert lower(parse(CHAIN)).floats == {"y": "an output of the model"}
    (reason,) = lower(parse(SHORTCUTS)).floats.values()
    assert reason.endswith("(Add) computes with floats")


def test_readers_of_one_tensor_share_its_planes() -> None:
    program = lower(parse(SHARED), kernel="bitplane")
    packs = [step for step in program.steps if step.kind == "pack"]
    assert len(packs) == 1


def test_equal_kernels_are_compiled_once() -> None:
    text = f"""
    %x = Input() : u8[1,16,6,6]
    %w1 = Constant() : i16[16,16,3,3]
    %a_m = Constant() : f32[16]
    %a_b = Constant() : f32[16]
    %w2 = Constant() : i16[16,16,3,3]
    %c1 = IntConv(%x, %w1) {{{PAD}}} : i32[1,16,6,6] @conv1
    %q1 = Requantize(%c1, %a_m, %a_b) {{axis=1, bits=2, zero_point=0}} : u8[1,16,6,6]
    %c2 = IntConv(%q1, %w2) {{{PAD}}} : i32[1,16,6,6] @conv2
    %q2 = Requantize(%c2, %a_m, %a_b) {{axis=1, bits=2, zero_point=0}} : u8[1,16,6,6]
    %c3 = IntConv(%q2, %w1) {{{PAD}}} : i32[1,16,6,6] @conv3
    %q3 = Requantize(%c3, %a_m, %a_b) {{axis=1, bits=2, zero_point=0}} : u8[1,16,6,6]
    return %q3
    """
    steps = {step.label: step.kernel for step in lower(parse(text), kernel="bitplane").steps}
    assert steps["conv1"] == steps["conv2"] != steps["conv3"]  # the last one writes plain codes


def test_every_output_has_a_buffer_of_its_own() -> None:
    for name in ("aliases", "inner"):
        program = lower(parse(GRAPHS[name]))
        buffers = list(program.results.values())
        assert len(set(buffers)) == len(buffers) == len(program.outputs)
        assert not set(buffers) & set(program.inputs)


def test_layers_say_what_runs_them_and_prove_their_accumulators() -> None:
    program = lower(parse(MATMUL), kernel="int8")
    graph = parse(MATMUL)
    records = {record.name: record for record in program.layers}
    assert [record.kernel for record in program.layers] == ["int8", "int8"]
    for name, weight, reach in (("fc1", "w1", 2), ("fc2", "w2", 3)):
        largest = abs(graph.constants[weight].astype(int)).sum(axis=0).max() * reach
        assert records[name].bound == largest
        assert records[name].run == "w2a2"
    assert records["fc1"].macs == 2 * 5 * 12 * 40


# Real programs -------------------------------------------------------------------------------


def quantized(path: Path, bits: str) -> Graph:
    """A trained model with ranges of random inputs: enough to lower."""
    from mpqc.data import open_data
    from tests.graph_runner import feeds

    graph = pipeline.import_model(path)
    plan = Plan.uniform(graph, Precision.parse(bits))
    options = pipeline.Options(native(), max_samples=2)
    name = next(iter(graph.inputs))
    data = open_data({name: feeds(graph)[name]}, graph)
    return pipeline.quantize(graph, plan, pipeline.calibrate_plan(graph, plan, data, options))


@pytest.mark.parametrize("bits", ["w2a2", "w8a8"])
def test_memory_is_near_its_lower_bound(bits: str, shared_models: Path) -> None:
    for path in (files().model, shared_models / "cifar10_resnet20.onnx",
                 shared_models / "mobilenet_v1_0.25_224.onnx"):  # fmt: skip
        graph = quantized(path, bits)
        program = pipeline.lower(graph, None, pipeline.Options(native()))
        plan = plan_memory(program)
        check_memory(program, plan)
        assert plan.size - SLACK <= 1.2 * plan.lower_bound, path.name
