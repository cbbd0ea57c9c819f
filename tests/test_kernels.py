"""Every kernel of the quantized layers against a plain integer convolution, bit for bit."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqc import compute, kernels, packing
from mpqc.compute import Padded, Window
from mpqc.graph import Array
from mpqc.kernels import Operand, Output
from mpqc.schedules.dot_intrinsics import DOTS
from mpqc.select_kernel import MOST_LUT_BITS
from mpqc.target import TARGETS, Target, native
from tests import kernel_runner
from tests.kernel_runner import Case, assembly, compiled, convolve, run, tensor

V2, V3 = TARGETS["x86-64-v2"], TARGETS["x86-64-v3"]
HERE = [
    target
    for target in (V2, V3, TARGETS["x86-64-v4-vnni"])
    if target.arch == native().arch and target.runs_here
]
BITS = range(1, 9)
PAIRS = [(w, a) for w in BITS for a in BITS]
LEVELS = ("signed", "odd")


def instructions(target: Target) -> list[str]:
    """Dot-product instructions that the target has."""
    found = [name for name in DOTS if name.startswith(("vpmaddwd", "vpmaddubsw"))]
    found = [name for name in found if int(name[-3:]) <= target.vector_bits]
    return found + (["vpdpbusd512"] if target.has("vnni") else [])


def kinds(target: Target) -> list[str]:
    return ["bitplane", "bitplane-lut", "multiply-add", *instructions(target)]


def fits(kind: str, case: Case) -> bool:
    """Whether the selector would ever ask this kernel for this layer."""
    if kind == "bitplane-lut":
        return case.groups == 1 and case.activation_bits <= MOST_LUT_BITS
    if kind not in DOTS:
        return True
    if case.groups > 1:
        return False
    bytes_alone = DOTS[kind].weight == "int8"
    if bytes_alone and case.levels == "odd" and case.weight_bits == 8:
        return False
    return not DOTS[kind].halves or case.chunk(case.layer.taps) > 0


def check(case: Case, kind: str, target: Target) -> None:
    got, expected = run(case, kind, target)
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=f"{name} of {case}")


ON_KINDS = pytest.mark.parametrize(
    ("target", "kind"),
    [pytest.param(t, kind, id=f"{t.name}-{kind}") for t in HERE for kind in kinds(t)],
)


@pytest.fixture(scope="module")
def best() -> Target:
    if not HERE:
        pytest.skip("these kernels are built for x86-64; this machine is not one")
    return HERE[-1]


# Widths --------------------------------------------------------------------------------------

SMALL = Window(1, 2, 3, 3, 1, 1, 1, 1, 1)


@pytest.mark.parametrize(("weight", "activation"), PAIRS, ids=[f"w{w}a{a}" for w, a in PAIRS])
def test_bitplane_at_every_width_pair(weight: int, activation: int, best: Target) -> None:
    levels = LEVELS[(weight + activation) % 2]
    zero_point = (2**activation - 1) // 2 * (weight % 2)
    check(Case(SMALL, 17, 16, 1, weight, activation, levels, zero_point), "bitplane", best)


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "activation"), PAIRS, ids=[f"w{w}a{a}" for w, a in PAIRS])
@ON_KINDS
def test_every_kernel_at_every_width_pair_and_level(
    weight: int, activation: int, target: Target, kind: str
) -> None:
    for levels in LEVELS:
        for zero_point in (0, 2**activation - 1):
            case = Case(SMALL, 17, 16, 1, weight, activation, levels, zero_point)
            if fits(kind, case):
                check(case, kind, target)


@pytest.mark.parametrize(("weight", "activation"), [(1, 1), (5, 3)])
@ON_KINDS
def test_every_kernel_on_every_instruction_set(
    weight: int, activation: int, target: Target, kind: str
) -> None:
    case = Case(SMALL, 17, 16, 1, weight, activation, "signed", 2**activation // 2)
    if not fits(kind, case):
        pytest.skip("the instruction would overflow: never chosen")
    check(case, kind, target)


# Geometry ------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel = st.sampled_from([(1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (2, 1)])
    step = st.integers(1, 3)
    kh, kw = draw(kernel)
    window = Window(
        draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 9)), kh, kw,
        draw(step), draw(step), draw(st.integers(1, 2)), draw(st.integers(1, 2)),
    )  # fmt: skip
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 8]))
    inside = draw(st.sampled_from([1, 3, 8, 17, 24]))
    outside = draw(st.sampled_from([1, 3, 8, 10, 17, 32]))
    if groups == 1:
        inside = draw(st.sampled_from([1, 3, 16, 17, 130]))
        outside = draw(st.sampled_from([1, 3, 10, 16, 64, 70, 130]))
    activation = draw(st.integers(1, 8))
    return Case(
        window, inside * groups, outside * groups, groups,
        draw(st.integers(1, 8)), activation, draw(st.sampled_from(LEVELS)),
        draw(st.sampled_from([0, 1, 2**activation - 1])), draw(st.integers(0, 2**20)),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["bitplane", "bitplane-lut", "multiply-add", "dot"])
@settings(max_examples=12)
@given(case=cases(), which=st.integers(0, 10))
def test_any_geometry(case: Case, kind: str, which: int) -> None:
    targets = [target for target in HERE if kind != "dot" or instructions(target)]
    if not targets:
        pytest.skip("no x86-64 here")
    target = targets[which % len(targets)]
    if kind == "dot":
        found = instructions(target)
        kind = found[which // len(targets) % len(found)]
    if fits(kind, case):
        check(case, kind, target)


@pytest.mark.parametrize("channels", [3, 17, 130])
@pytest.mark.parametrize("size", [1, 5, 7])
def test_odd_channels_and_square_windows(channels: int, size: int, best: Target) -> None:
    window = Window(1, 3, 5, size, size, 1, 2, 1, 1)
    check(Case(window, channels, 19, 1, 2, 3, "signed", 2), "bitplane", best)
    check(Case(window, channels, 19, 1, 3, 3, "odd", 2), instructions(best)[-1], best)
    check(Case(window, channels, 19, 1, 3, 3, "odd", 2), "bitplane-lut", best)


@pytest.mark.parametrize("channels", [3, 17, 130])
def test_depthwise(channels: int, best: Target) -> None:
    case = Case(Window(1, 4, 6, 3, 3, 2, 1, 1, 2), channels, channels, channels, 4, 5, "signed", 7)
    check(case, "multiply-add", best)
    check(case, "bitplane", best)


@settings(max_examples=10)
@given(
    images=st.integers(1, 3),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    fill=st.integers(0, 255),
    wide=st.booleans(),
)
def test_padding_writes_the_border_and_nothing_else(
    images: int, size: tuple[int, int, int], pads: tuple[int, int, int, int], fill: int, wide: bool
) -> None:
    dtype = "int16" if wide else "uint8"
    kernel = kernels.pad_kernel(images, size, pads, [fill], ("uint8", dtype))
    image = np.random.default_rng(fill).integers(0, 256, (images, *size)).astype(np.uint8)
    top, left, bottom, right = pads
    edges = [(0, 0), (top, bottom), (left, right), (0, 0)]
    expected = np.pad(image, edges, constant_values=fill).astype(dtype)
    result = tensor(np.zeros(kernel.outputs[0].shape, dtype))
    compiled(kernel, native())["main"](tensor(image.reshape(kernel.inputs[0].shape)), result)
    np.testing.assert_array_equal(result.numpy().reshape(expected.shape), expected)


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (17, 1), (130, 1), (12, 4), (51, 3)])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_packing_pads_every_group_with_zero_bits(channels: int, groups: int, bits: int) -> None:
    kernel = kernels.pack_kernel(7, channels, groups, bits)
    codes = np.random.default_rng(bits).integers(0, 2**bits, (7, channels)).astype(np.uint8)
    result = tensor(np.zeros(kernel.outputs[0].shape, np.uint8))
    compiled(kernel, native())["main"](tensor(codes), result)
    inside = channels // groups
    padded = np.pad(codes.reshape(7, groups, inside), [(0, 0), (0, 0), (0, -inside % 8)])
    np.testing.assert_array_equal(
        result.numpy(), packing.bits_to_bytes(padded.reshape(7, -1), bits)
    )


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@pytest.mark.parametrize(("pixels", "channels"), [(1, 16), (5, 4), (3, 36), (2, 16), (40, 64)])
@pytest.mark.parametrize("bits", [1, MOST_LUT_BITS])
def test_tables_are_sums_of_four_codes(
    pixels: int, channels: int, bits: int, target: Target
) -> None:
    kernel = kernels.expand_kernel(pixels, channels, target.arch)
    codes = np.random.default_rng(bits).integers(0, 2**bits, pixels * channels).astype(np.uint8)
    codes[:4] = 2**bits - 1
    entries = np.arange(16)[:, None] >> np.arange(4) & 1
    result = tensor(np.zeros(kernel.outputs[0].shape, np.uint8))
    compiled(kernel, target)["main"](tensor(codes), result)
    np.testing.assert_array_equal(result.numpy(), codes.reshape(-1, 4) @ entries.T)


PAIRED = [
    Case(Window(2, 3, 4, 3, 3, 1, 1, 1, 1), 16, 64, 1, 1, 1, "odd"),
    Case(Window(1, 3, 2, 3, 3, 2, 2, 1, 1), 32, 40, 1, 3, 1, "signed", 1),
    Case(Window(1, 2, 6, 3, 3, 1, 3, 2, 2), 48, 16, 1, 2, 1, "signed"),
    Case(Window(1, 1, 2, 1, 1, 1, 1, 1, 1), 48, 128, 1, 8, 1, "odd", 1),
    Case(Window(1, 1, 2, 3, 3, 1, 1, 1, 1), 256, 128, 1, 1, 1, "odd"),
]


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_two_pixels_share_a_byte(case: Case, target: Target) -> None:
    layer = kernels.flatten_pixels(case.layer, 14)
    assert kernels.pairs_pixels(layer, target.arch)
    for extreme in ("", "most", "least"):
        check(replace(case, extreme=extreme), "bitplane-lut", target)


SLICED = [
    Case(Window(1, 7, 7, 3, 3, 1, 1, 1, 1), 512, 40, 1, 2, 2, "signed", 1),
    Case(Window(2, 4, 12, 3, 3, 1, 1, 1, 1), 256, 32, 1, 2, 1, "odd"),  # pairs of pixels
    Case(Window(1, 4, 7, 3, 3, 2, 2, 1, 1), 320, 64, 1, 1, 3, "odd", 1),
    Case(Window(1, 6, 5, 2, 5, 1, 1, 2, 1), 448, 8, 1, 3, 5, "signed"),
    Case(Window(1, 7, 7, 3, 3, 1, 1, 1, 1), 512, 16, 1, 8, 6, "odd", 3),
]


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@pytest.mark.parametrize("case", SLICED, ids=str)
def test_slices_of_channels_one_after_the_other(case: Case, target: Target) -> None:
    assert not kernels.reads_patterns(case.layer, target.arch)
    assert kernels.lut_slices(case.layer, target.arch) > 1
    assert kernels.lut_rows(case.layer, target.arch) > 1
    for extreme in ("", "most", "least"):
        check(replace(case, extreme=extreme), "bitplane-lut", target)


PATTERNS = [
    Case(Window(1, 7, 7, 3, 3, 1, 1, 1, 1), 512, 256, 1, 1, 2, "signed", 1),  # rows share weights
    Case(Window(1, 7, 7, 3, 3, 1, 1, 1, 1), 32, 40, 1, 1, 1, "odd"),  # odd rows: no pairs
    Case(Window(2, 4, 12, 3, 3, 1, 1, 1, 1), 256, 32, 1, 1, 1, "odd"),
    Case(Window(1, 4, 7, 3, 3, 2, 2, 1, 1), 80, 64, 1, 8, 2, "odd", 3),
    Case(Window(1, 6, 5, 2, 5, 1, 1, 2, 2), 48, 8, 1, 3, 2, "signed", 2),
]


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@pytest.mark.parametrize("case", PATTERNS, ids=str)
def test_tables_of_all_patterns(case: Case, target: Target) -> None:
    assert kernels.reads_patterns(case.layer, target.arch)
    for extreme in ("", "most", "least"):
        check(replace(case, extreme=extreme), "bitplane-lut", target)


BORDERED = [  # images, height, width, channels, pads, fill
    Padded(1, 1, 1, 16),
    Padded(2, 3, 5, 48, (1, 1, 1, 1)),
    Padded(1, 4, 2, 32, (0, 2, 3, 1), 1),
    Padded(2, 40, 9, 64, (3, 0, 0, 2)),
]


def bordered(image: Padded, bits: int) -> tuple[Array, Array]:
    """Codes as they lie in memory, and with their border."""
    shape = (image.images, image.height, image.width, image.channels)
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape).astype(np.uint8)
    top, left, bottom, right = image.pads
    edges = [(0, 0), (top, bottom), (left, right), (0, 0)]
    return codes, np.pad(codes, edges, constant_values=image.fill)


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@pytest.mark.parametrize("image", BORDERED, ids=str)
@pytest.mark.parametrize(
    ("bits", "beside", "levels"), [(1, 0, "odd"), (1, 1, "signed"), (1, 2, "odd"), (2, 0, "odd")]
)
def test_patterns_are_places_of_tables(
    image: Padded, bits: int, beside: int, levels: str, target: Target
) -> None:
    codes, padded = bordered(image, bits)
    layer = Case(Window(1, 1, 1, 1, 1, 1, 1, 1, 1), 16, 16, 1, 1, bits, levels).layer
    kernel = kernels.pattern_kernel(layer, image, beside)
    results = [tensor(np.zeros(kind.shape, kind.dtype)) for kind in kernel.outputs]
    compiled(kernel, target)["main"](tensor(codes.reshape(-1)), *results)
    for sums in results[1:]:
        np.testing.assert_array_equal(sums.numpy(), padded.sum(axis=3).reshape(-1))
    assert len(results) == 1 + (levels == "odd")
    places = results[0].numpy().reshape(*padded.shape[:3], -1)
    tables = packing.pattern_tables(bits).reshape(-1, 16)
    rows = tables[places // 16]
    chosen = np.arange(16)[:, None] >> np.arange(4) & 1
    expected = padded.reshape(*rows.shape[:-1], 4) @ chosen.T
    np.testing.assert_array_equal(places % 16, 0)
    if not beside:
        np.testing.assert_array_equal(rows, expected)
        return
    inside = slice(0, padded.shape[2] - beside)  # what is beside the last columns means nothing
    np.testing.assert_array_equal(rows % 16, expected)
    np.testing.assert_array_equal(rows[:, :, inside] // 16, expected[:, :, beside:])


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@pytest.mark.parametrize("channels", [16, 48, 1024])
def test_codes_are_added_up_under_each_window(channels: int, target: Target) -> None:
    case = Case(Window(2, 3, 4, 3, 2, 2, 1, 1, 2), channels, 16, 1, 1, 6, "odd")
    kernel = kernels.code_sum_kernel(case.layer, target.arch)
    assert kernel is not None
    codes = case.codes()
    expected = convolve(codes, np.ones((1, channels, 3, 2), np.int16), case.window, 1)
    result = tensor(np.zeros(kernel.outputs[0].shape, np.int32))
    compiled(kernel, target)["main"](tensor(codes.reshape(-1)), result)
    np.testing.assert_array_equal(result.numpy(), expected)


# Extremes ------------------------------------------------------------------------------------

# 255 * 255 * K and 255 * 128 * K just below 2**31
LARGEST_K = {"odd": 33_024, "signed": 65_792}


@pytest.mark.parametrize("extreme", ["most", "least"])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", ["bitplane", "multiply-add", "dot"])
def test_the_accumulator_holds_its_bound(
    kind: str, levels: str, extreme: str, best: Target
) -> None:
    case = Case(
        Window(1, 1, 1, 1, 1, 1, 1, 1, 1), LARGEST_K[levels], 4, 1, 8, 8, levels, 0, 0, extreme
    )
    if kind == "dot":
        kind = next(name for name in instructions(best) if name.startswith("vpmaddwd"))
    got, expected = run(case, kind, best)
    bound = {"most": 255 if levels == "odd" else 127, "least": -255 if levels == "odd" else -128}
    assert expected["total"].flat[0] == bound[extreme] * 255 * LARGEST_K[levels]
    np.testing.assert_array_equal(got["total"], expected["total"])
    assert 2**31 - 2**26 < np.abs(255 * bound["least"] * LARGEST_K[levels]) < 2**31


@pytest.mark.parametrize("channels", [65_528, 65_536])
@pytest.mark.parametrize("levels", LEVELS)
def test_plane_pairs_count_beyond_sixteen_bits(channels: int, levels: str, best: Target) -> None:
    window = Window(1, 1, 1, 1, 1, 1, 1, 1, 1)
    check(Case(window, channels, 8, 1, 1, 1, levels, 0, 0, "most"), "bitplane", best)
    check(Case(window, channels, 8, 1, 1, 1, levels, 0, 0, "least"), "bitplane", best)


@pytest.mark.parametrize("levels", LEVELS)
@ON_KINDS
def test_extreme_windows(target: Target, kind: str, levels: str) -> None:
    """Largest and smallest products everywhere: what saturates, saturates here."""
    window = Window(1, 1, 2, 3, 3, 1, 1, 1, 1)
    widest = Case(window, 65, 32, 1, 8, 8, levels, 255)
    while not fits(kind, widest):  # the largest products that the kernel may be asked for
        shorter = widest.activation_bits - 1
        widest = replace(widest, activation_bits=shorter, zero_point=2**shorter - 1)
        if not shorter:
            pytest.skip("needs weights of bytes")
    for extreme in ("most", "least"):
        zero_point = widest.zero_point if levels == "odd" else 0
        check(replace(widest, extreme=extreme, zero_point=zero_point), kind, target)


# Rounding ------------------------------------------------------------------------------------


def contracted(acc: Array, m: Array, b: Array) -> Array:
    """``acc * m + b`` in one rounding: float64 holds the product of two float32 exactly."""
    rounded: Array = (acc.astype(np.float64) * m + b).astype(np.float32)
    return rounded


def test_requantize_rounds_twice(best: Target) -> None:
    generator = np.random.default_rng(5)
    rows, channels = 64, 64
    acc = generator.integers(-(2**24), 2**24, (rows, channels)).astype(np.int32)
    m = generator.normal(size=channels).astype(np.float32)
    b = (-m * acc[0] + generator.normal(0, 3, channels)).astype(np.float32)
    twice = acc.astype(np.float32) * m + b
    once = contracted(acc, m, b)
    codes = [np.clip(np.rint(y) + 2, 0, 255).astype(np.uint8) for y in (twice, once)]
    assert (twice != once).mean() > 0.1  # the values tell the two apart

    def affine(read: kernels.Reader) -> object:
        return compute.fence(read("acc").astype("float32") * read("m")) + read("b")

    kernel = kernels.elementwise_kernel(
        (1, 1, rows, channels),
        [Operand("acc", False, "int32"), Operand("m", True, "float32"),
         Operand("b", True, "float32")],
        [Output("y", affine),
         Output("q", lambda read: compute.requantize(affine(read), 2, 0, 255), bits=8)],
    )  # fmt: skip
    for target in HERE:
        results = [tensor(np.zeros(kind.shape, kind.dtype)) for kind in kernel.outputs]
        arguments = [tensor(acc.reshape(kernel.inputs[0].shape)), tensor(m), tensor(b)]
        compiled(kernel, target)["main"](*arguments, *results)
        np.testing.assert_array_equal(results[0].numpy().reshape(twice.shape), twice)
        np.testing.assert_array_equal(results[1].numpy().reshape(twice.shape), codes[0])


@pytest.mark.parametrize("zero_point", [0, 1, 128, 255])
def test_codes_round_half_to_even_and_clip(zero_point: int, best: Target) -> None:
    halves = np.arange(-300, 600, 0.5, dtype=np.float32)
    beside = [np.nextafter(halves, np.float32(-np.inf)), np.nextafter(halves, np.float32(np.inf))]
    far = np.array([1e9, -1e9, 3e38, -3e38, np.inf, -np.inf, 1e-40, -0.0], np.float32)
    values = np.concatenate([halves, *beside, far])
    kernel = kernels.elementwise_kernel(
        (1, 1, 1, values.size),
        [Operand("x", False, "float32")],
        [Output("q", lambda read: compute.requantize(read("x"), zero_point, 0, 255), bits=8)],
    )
    expected = np.clip(np.rint(values) + np.float32(zero_point), 0, 255).astype(np.uint8)
    for target in HERE:
        result = tensor(np.zeros(kernel.outputs[0].shape, np.uint8))
        arguments = tensor(values.reshape(kernel.inputs[0].shape))
        compiled(kernel, target)["main"](arguments, result)
        np.testing.assert_array_equal(result.numpy().reshape(-1), expected)


ASM = Case(Window(1, 2, 4, 3, 3, 1, 1, 1, 1), 32, 64, 1, 2, 2)
FUSED = re.compile(r"\tvfn?m(add|sub)")


@pytest.mark.parametrize("kind", ["bitplane", "vpmaddwd256", "multiply-add"])
def test_no_fused_multiply_add(kind: str) -> None:
    assert "vmulps" in assembly(ASM, kind, V3)
    assert not FUSED.search(assembly(ASM, kind, V3))


def test_without_the_fence_llvm_would_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "fence", lambda value: value)
    unfenced = kernel_runner._build.__wrapped__(ASM, "bitplane", V3)
    assert FUSED.search(str(unfenced.library.mod.inspect_source("asm")))


@pytest.mark.parametrize("kind", ["bitplane", "vpmaddwd128", "multiply-add"])
def test_the_oldest_target_stays_within_sse(kind: str) -> None:
    text = assembly(ASM, kind, V2)
    vector = {line.split()[0] for line in text.splitlines() if re.match(r"\tv[a-z0-9]+\s", line)}
    assert vector == set()
    assert not re.search(r"%[yz]mm", text)
    assert re.search(r"%xmm", text)


def test_the_widest_target_uses_what_it_has(best: Target) -> None:
    if not best.has("bitalg"):
        pytest.skip("no AVX-512 BITALG here")
    assert "vpopcntb" in assembly(ASM, "bitplane", best)
    assert "vpdpbusd" in assembly(ASM, "vpdpbusd512", best)
