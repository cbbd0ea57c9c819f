"""Fake quantizers give the compiler's integers, and the gradients of their papers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.errors import UsageError
from mpqc.graph import Array
from mpqc.numerics import weight_codes, weight_values
from mpqc.quantizers import ActivationQuantizer, QuantizedWeights, quantize_weights, round_weights
from mpqc.train.fake_quant import (
    DoReFaScheme,
    DoReFaWeights,
    LsqInput,
    LsqWeights,
    PactInput,
    WeightQuantizer,
    fit_steps,
    lsq,
    sat_factor,
)

WIDTHS = range(1, 9)


def weights(seed: int = 0, shape: tuple[int, ...] = (5, 3, 3, 3)) -> Array:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * rng.uniform(0.1, 2, (shape[0], 1, 1, 1))).astype(
        np.float32
    )


def check(quantizer: WeightQuantizer, array: Array) -> QuantizedWeights:
    """Floats in training are integers times scales, and the integers are codes of their levels."""
    made = quantizer.integers(torch.from_numpy(array))
    floats = quantizer(torch.from_numpy(array)).detach().numpy()
    scale = made.scale.reshape(-1, *[1] * (array.ndim - 1))
    np.testing.assert_allclose(floats, made.values * scale, rtol=1e-6)
    codes = weight_codes(made.values, made.bits, made.levels)
    np.testing.assert_array_equal(weight_values(codes, made.bits, made.levels), made.values)
    return made


@pytest.mark.parametrize("bits", WIDTHS)
@given(seed=st.integers(0, 10_000))
def test_lsq_gives_the_compilers_integers(bits: int, seed: int) -> None:
    array = weights(seed)
    known = quantize_weights(array, bits, 0)
    quantizer = LsqWeights.fitted(torch.from_numpy(array), bits)
    made = check(quantizer, array)
    assert (made.bits, made.levels) == (known.bits, known.levels)
    np.testing.assert_allclose(made.scale, known.scale, rtol=1e-6)
    if bits == 1:
        np.testing.assert_array_equal(made.values, known.values)
    else:
        rows = round_weights(array.reshape(len(array), -1), made.scale, bits)
        np.testing.assert_array_equal(made.values, rows.reshape(array.shape))


@pytest.mark.parametrize("bits", WIDTHS)
def test_odd_levels_are_symmetric_and_nearest(bits: int) -> None:
    array = weights(bits)
    quantizer = LsqWeights.fitted(torch.from_numpy(array), bits, odd=True)
    made = check(quantizer, array)
    assert made.levels == "odd"
    top = 2**bits - 1
    levels = np.arange(-top, top + 1, 2)
    scale = made.scale.reshape(-1, 1, 1, 1, 1)
    best = np.abs(array[..., None] - levels * scale).min(-1)
    wrong = np.abs(array - made.values * scale[..., 0])
    np.testing.assert_allclose(wrong, best, rtol=1e-4, atol=1e-6)


def test_steps_of_odd_levels_are_better_than_clipping_nothing() -> None:
    array = weights()
    fitted = fit_steps(array, 2, odd=True)
    whole = np.abs(array).reshape(5, -1).max(1) / 3

    def error(step: Array) -> float:
        scale = step.reshape(-1, 1, 1, 1)
        codes = np.clip(2 * np.floor(array / scale / 2) + 1, -3, 3)
        return float(np.square(codes * scale - array).sum())

    assert error(fitted) < 0.9 * error(whole)


def test_channels_of_different_widths() -> None:
    array = weights()
    widths = (0, 1, 2, 4, 8)
    quantizer = LsqWeights.fitted(torch.from_numpy(array), widths)
    made = check(quantizer, array)
    assert (made.bits, made.levels) == (8, "signed")
    assert not made.values[0].any()
    assert set(np.unique(made.values[1])) == {-1, 1}
    known = quantize_weights(array[1:], widths[1:], 0)
    np.testing.assert_allclose(made.scale[1:], known.scale, rtol=1e-6)
    assert made.values[2].min() >= -2
    assert made.values[2].max() <= 1
    binary = check(LsqWeights.fitted(torch.from_numpy(array), (0, 1, 1, 0, 1)), array)
    assert (binary.bits, set(np.unique(binary.values))) == (2, {-1, 0, 1})
    gone = check(LsqWeights.fitted(torch.from_numpy(array), 0), array)
    assert not gone.values.any()
    with pytest.raises(UsageError, match="0 to 8 bits"):
        LsqWeights.fitted(torch.from_numpy(array), 9)
    with pytest.raises(UsageError, match="one width"):
        LsqWeights.fitted(torch.from_numpy(array), widths, odd=True)


def dorefa(array: Array, bits: int, scheme: DoReFaScheme) -> Array:
    """The formulas as ALGORITHMS has them, in numpy: levels in [-1, 1]."""
    squashed = np.tanh(array)
    z = (squashed / np.abs(squashed).max() + 1) / 2
    top = 2**bits - 1
    if scheme == "original":
        return np.asarray(2 * np.rint(top * z) / top - 1)
    code = np.minimum(np.floor(2**bits * z), top)
    if scheme == "centered":
        return np.asarray((2 * code + 1) / 2**bits - 1)
    return np.asarray(2 * code / 2**bits - 1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", ["original", "modified", "centered"])
def test_dorefa_follows_its_formula(scheme: DoReFaScheme, bits: int) -> None:
    array = weights(bits)
    quantizer = DoReFaWeights(bits, torch.from_numpy(array), scheme, "none")
    made = check(quantizer, array)
    if scheme == "original" or bits > 1:
        scale = made.scale.reshape(-1, 1, 1, 1).astype(np.float64)
        # a float32 tanh may round the other way on the border of two levels
        same = np.isclose(made.values * scale, dorefa(array, bits, scheme), atol=1e-6)
        assert same.mean() > 0.99
    else:
        assert set(np.unique(made.values)) == {-1, 1}


def test_codes_of_modified_levels_nest() -> None:
    array = weights()
    codes = {}
    for bits in range(2, 9):
        made = DoReFaWeights(bits, torch.from_numpy(array), "modified", "none").integers(
            torch.from_numpy(array)
        )
        codes[bits] = made.values.astype(np.int64) + 2 ** (bits - 1)
    for bits in range(2, 8):
        np.testing.assert_array_equal(codes[bits], codes[bits + 1] >> 1)


@pytest.mark.parametrize("rescale", ["none", "gain", "sat"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_rescaled_levels_are_still_integers_times_scales(rescale: str, bits: int) -> None:
    array = weights()
    quantizer = DoReFaWeights(bits, torch.from_numpy(array), "original", rescale)  # type: ignore[arg-type]
    made = check(quantizer, array)
    floats = made.values * made.scale.reshape(-1, 1, 1, 1)
    if rescale == "sat":
        assert floats.std() == pytest.approx(1 / np.sqrt(5 * 9), rel=1e-4)
    if rescale == "gain":
        plain = check(DoReFaWeights(bits, torch.from_numpy(array), "original", "none"), array)
        far = np.square(plain.values * plain.scale.reshape(-1, 1, 1, 1) - array).sum()
        assert np.square(floats - array).sum() < far


def test_sat_factor_of_a_matrix() -> None:
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32))
    assert float((matrix * sat_factor(matrix)).std(unbiased=False)) == pytest.approx(0.25)


def test_gradients_of_lsq() -> None:
    x = torch.tensor([-3.0, -0.9, 0.2, 0.6, 2.4], requires_grad=True)
    step = torch.tensor([0.5], requires_grad=True)
    low, high = torch.tensor([-2.0]), torch.tensor([1.0])
    out = lsq(x, step, low, high, None, 0.25)
    assert out.tolist() == [-1.0, -1.0, 0.0, 0.5, 0.5]
    out.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]))
    # steps: -6, -1.8, 0.4, 1.2, 4.8; in range are the second and third
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 10.0, 100.0, 0.0, 0.0]
    wanted = 0.25 * (1 * -2 + 10 * (-2 + 1.8) + 100 * (0 - 0.4) + 1000 * 1 + 10000 * 1)
    assert float(step.grad) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("layout", ["rows", "channels last", "transposed"])
def test_one_step_for_a_tensor_learns_as_many_steps_do(zero: int, layout: str) -> None:
    """The fast form for CPUs: the same codes, the same gradients, values on the bounds inside."""
    rng = np.random.default_rng(zero)
    array = rng.standard_normal((3, 5, 4, 6)).astype(np.float32)
    array[0, 0, 0] = [0, -0.0, 3 * 0.5, -3 * 0.5, 12 * 0.5, 15 * 0.5]
    quantizer = LsqInput(ActivationQuantizer(0.5, zero, 4), 120)
    start = torch.from_numpy(array)
    if layout == "channels last":
        start = start.contiguous(memory_format=torch.channels_last)
    upstream = torch.from_numpy(rng.standard_normal(array.shape).astype(np.float32))
    if layout == "transposed":
        start = start.transpose(1, 3).contiguous().transpose(1, 3)
    found = []
    for fast in (True, False):
        x = start.clone().requires_grad_()
        step = quantizer.step.detach().requires_grad_()
        if fast:
            out = quantizer(x)
            out.backward(upstream)
            slope = quantizer.log_step.grad / step.detach()  # of the step, not of its logarithm
        else:
            out = lsq(x, step, quantizer.low, quantizer.high, None, quantizer._scale)
            out.backward(upstream)
            slope = step.grad
        found.append((out.detach(), x.grad, slope))
    for fast_one, slow_one in zip(*found, strict=True):
        torch.testing.assert_close(fast_one, slow_one, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_the_scale_of_lsqs_gradient_is_that_of_its_paper() -> None:
    array = weights()
    quantizer = LsqWeights.fitted(torch.from_numpy(array), 3)
    x = torch.from_numpy(array)
    quantizer(x).sum().backward()
    step = quantizer.step.detach()
    codes = torch.clamp((x / step).round(), -4, 3)
    inside = (x / step >= -4) & (x / step <= 3)
    slope = torch.where(inside, codes - x / step, codes).sum((1, 2, 3), keepdim=True)
    wanted = slope / np.sqrt(27 * 3) * step  # of the logarithm
    assert torch.allclose(quantizer.log_step.grad, wanted, rtol=1e-4, atol=1e-6)


def test_binary_weights_pass_gradients_near_zero_only() -> None:
    x = torch.tensor([[-5.0, -0.5, 0.0, 0.5, 5.0]], requires_grad=True)
    quantizer = LsqWeights(1, np.ones(1, np.float32), (1, 5))
    out = quantizer(x)
    assert out.tolist() == [[-1, -1, 1, 1, 1]]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 1, 0]]


@pytest.mark.parametrize("calibrated", [False, True])
def test_gradients_of_pact(calibrated: bool) -> None:
    quantizer = PactInput(2, 1.5, calibrated)
    x = torch.tensor([-1.0, 0.3, 0.9, 1.5, 4.0], requires_grad=True)
    out = quantizer(x)
    assert out.tolist() == [0.0, 0.5, 1.0, 1.5, 1.5]
    out.backward(torch.tensor([1.0, 10.0, 100.0, 0.0, 1000.0]))
    inside = 10 * (0.5 - 0.3) / 1.5 + 100 * (1.0 - 0.9) / 1.5
    wanted = 1000 + (inside if calibrated else 0)
    assert float(quantizer.alpha.grad) == pytest.approx(wanted, rel=1e-5)
    assert x.grad is not None
    assert x.grad.tolist()[:3] == [0.0, 10.0, 100.0]
    assert x.grad.tolist()[4] == 0.0


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("signed", [False, True])
def test_inputs_are_what_the_rules_codes_tell(bits: int, signed: bool) -> None:
    rng = np.random.default_rng(bits)
    top = 2**bits - 1
    rule = ActivationQuantizer(0.37 / top, top // 2 if signed else 0, bits)
    quantizer = LsqInput(rule)
    exact = quantizer.rule()
    assert (exact.zero_point, exact.bits) == (rule.zero_point, bits)
    x = rng.standard_normal(4000).astype(np.float32) * 0.3
    x[:top] = (np.arange(top) - exact.zero_point + 0.5) * np.float32(exact.scale)  # ties
    wanted = exact.dequantize(exact.quantize(x))
    np.testing.assert_array_equal(quantizer(torch.from_numpy(x)).detach().numpy(), wanted)


@pytest.mark.parametrize("bits", WIDTHS)
def test_pact_is_the_rule_of_its_clip(bits: int) -> None:
    quantizer = PactInput(bits, 1.7)
    rule = quantizer.rule()
    x = np.random.default_rng(0).standard_normal(4000).astype(np.float32) * 2
    wanted = rule.dequantize(rule.quantize(x))
    np.testing.assert_array_equal(quantizer(torch.from_numpy(x)).detach().numpy(), wanted)
    assert wanted.max() == pytest.approx(1.7)
    with torch.no_grad():
        quantizer.alpha.neg_()
    assert quantizer.rule() == rule
