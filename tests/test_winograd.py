"""Winograd's F(2x2, 3x3) in integers against a plain convolution, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqc import accumulators, winograd
from mpqc.compute import Window
from mpqc.graph import Array
from mpqc.kernels import WINOGRAD
from mpqc.schedules.dot_intrinsics import DOTS
from mpqc.target import Target
from tests.kernel_runner import Case, assembly, convolve, run
from tests.test_kernels import HERE, V3, instructions

LEVELS = ("signed", "odd")
ON_KINDS = pytest.mark.parametrize(
    ("target", "kind"),
    [pytest.param(t, k, id=f"{t.name}-{k}") for t in HERE for k in instructions(t)],
)


def square(oh: int, ow: int, n: int = 1) -> Window:
    return Window(n, oh, ow, 3, 3, 1, 1, 1, 1)


def fits(kind: str, case: Case) -> bool:
    """Whether every integer of the case holds, for the largest weights and codes there are."""
    dot = DOTS[kind]
    for weight in case.worst_weights:
        transformed = winograd.transform_weights(weight)
        found = winograd.bounds(transformed, case.activation_bits, signed=dot.data == "int16")
        if found.total >= 2**31:
            return False
        if dot.data == "uint8" and (found.weight > 127 or found.image > 255):
            return False
        if dot.halves and not winograd.half_chunk(weight, case.activation_bits):
            return False
    return True


def check(case: Case, kind: str, target: Target) -> None:
    got, expected = run(case, WINOGRAD + kind, target)
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=f"{name} of {case}")


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("weight", "activation"), [(1, 1), (2, 2), (4, 4), (3, 6), (8, 8)])
@ON_KINDS
def test_every_instruction(
    weight: int, activation: int, levels: str, target: Target, kind: str
) -> None:
    case = Case(square(4, 6), 16, 32, 1, weight, activation, levels, 2**activation // 2)
    if not fits(kind, case):
        pytest.skip("some integer would not hold: never chosen")
    check(case, kind, target)


@pytest.mark.parametrize("rows", [26, 27, 30])
@ON_KINDS
def test_rows_that_patches_do_not_divide(rows: int, target: Target, kind: str) -> None:
    """Threads share out whole patches."""
    case = Case(square(rows, 27), 32, 64, 1, 2, 2)
    if not fits(kind, case):
        pytest.skip("some integer would not hold: never chosen")
    check(case, kind, target)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    window = square(draw(st.integers(1, 9)), draw(st.integers(1, 15)), draw(st.integers(1, 2)))
    activation = draw(st.integers(1, 8))
    return Case(
        window, draw(st.sampled_from([4, 12, 64])), draw(st.sampled_from([1, 3, 10, 64, 70])), 1,
        draw(st.integers(1, 8)), activation, draw(st.sampled_from(LEVELS)),
        draw(st.sampled_from([0, 1, 2**activation - 1])), draw(st.integers(0, 2**20)),
    )  # fmt: skip


@settings(max_examples=20)
@given(case=cases(), which=st.integers(0, 20))
def test_any_geometry(case: Case, which: int) -> None:
    if not HERE:
        pytest.skip("no x86-64 here")
    target = HERE[which % len(HERE)]
    found = instructions(target)
    kind = found[which // len(HERE) % len(found)]
    if fits(kind, case):
        check(case, kind, target)


@pytest.mark.parametrize("extreme", ["most", "least"])
@pytest.mark.parametrize("levels", LEVELS)
@ON_KINDS
def test_extremes(target: Target, kind: str, levels: str, extreme: str) -> None:
    """Largest and smallest products everywhere: what saturates, saturates here."""
    case = Case(square(3, 5), 64, 32, 1, 8, 8, levels)
    while not fits(kind, case):  # the widest layer that the kernel may be asked for
        narrower = case.weight_bits - 1, case.activation_bits - 1
        case = replace(case, weight_bits=narrower[0], activation_bits=narrower[1])
        if not min(narrower):
            pytest.skip("needs fewer bits than one")
    check(replace(case, extreme=extreme), kind, target)


@pytest.mark.parametrize("levels", LEVELS)
def test_the_transform_is_the_convolution(levels: str) -> None:
    case = Case(square(2, 2), 8, 5, 1, 8, 8, levels)
    codes, weight = case.codes().astype(np.int64), case.weights()
    rows = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
    values = np.einsum("py,yxc,qx->pqc", rows, codes[0], rows)
    products = np.einsum("pqc,ocpq->pqo", values, winograd.transform_weights(weight))
    total = np.einsum("ip,pqo,jq->ijo", winograd._OUTPUT, products, winograd._OUTPUT)
    np.testing.assert_array_equal(total, 4 * convolve(codes, weight, case.window, 1)[0])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 6, 8])
def test_bounds_are_reached_and_hold(bits: int, signed: bool) -> None:
    case = Case(square(2, 2), 8, 4, 1, 4, bits)
    transformed = winograd.transform_weights(case.weights())
    found = winograd.bounds(transformed, bits, signed)
    generator = np.random.default_rng(0)
    corners = generator.integers(0, 2, (2000, 4, 4)) * (2**bits - 1)
    rows = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
    values = np.einsum("py,nyx,qx->npq", rows, corners, rows) + winograd.offsets(bits, signed)
    assert np.abs(values).max() == found.image
    assert signed or values.min() == 0
    assert np.abs(transformed).max() == found.weight


# Narrow sums ---------------------------------------------------------------------------------


def narrow_sums(weight: Array, codes: Array, chunk: int) -> Array:
    """All prefix sums of int16 lanes: weight and codes [..., S, 4]."""
    lanes = (weight.astype(np.int64) * codes).reshape(*weight.shape[:-1], 2, 2).sum(axis=-1)
    runs = lanes.reshape(*lanes.shape[:-2], -1, chunk, 2)
    return np.cumsum(runs, axis=-2)


@settings(max_examples=60)
@given(
    steps=st.sampled_from([1, 2, 6, 16, 36]),
    most=st.integers(1, 255),
    scale=st.integers(1, 127),
    seed=st.integers(0, 2**20),
)
def test_int16_sums_hold_and_would_not_hold_longer(
    steps: int, most: int, scale: int, seed: int
) -> None:
    weight = np.random.default_rng(seed).integers(-scale, scale + 1, (3, steps, 4))
    chunk = accumulators.half_chunk(weight, most)
    worst = [np.where(weight * sign > 0, most, 0) for sign in (1, -1)]  # adversarial codes
    if chunk:
        assert all(np.abs(narrow_sums(weight, c, chunk)).max() < 2**15 for c in worst)
    longer = [d for d in range(chunk + 1, steps + 1) if steps % d == 0]
    if longer:
        assert any(np.abs(narrow_sums(weight, c, longer[0])).max() >= 2**15 for c in worst)


def test_one_step_too_large_is_refused() -> None:
    weight = np.array([[[64, 64, 0, 0]]])
    assert accumulators.half_chunk(weight, 255) == 1  # 2 * 64 * 255 = 32640
    assert accumulators.half_chunk(weight + np.eye(1, 4, dtype=int), 255) == 0
    assert accumulators.half_chunk(-weight, 255) == 1


def test_products_come_before_sums() -> None:
    """Two products, then two sums: in turns they would wait for each other's ports."""
    case = Case(square(4, 16), 32, 64, 1, 4, 4)
    lines = [line.split()[0] for line in assembly(case, f"{WINOGRAD}vpmaddubsw256", V3).split("\n")
             if line.startswith("\tv")]  # fmt: skip
    pairs = [i for i, word in enumerate(lines[:-3]) if word == "vpmaddubsw"]
    together = [lines[i : i + 4] for i in pairs]
    assert ["vpmaddubsw", "vpmaddubsw", "vpaddw", "vpaddw"] in together
