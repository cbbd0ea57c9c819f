import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpqc.graph import Array
from mpqc.quantizers import (
    MAX_SCALE,
    MIN_SCALE,
    ActivationQuantizer,
    minmax_scales,
    quantize_weights,
    weight_error,
    weight_scales,
)

FINITE = st.floats(-(2.0**99), 2.0**99, width=32)
ROWS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=FINITE
)


def test_activations_round_half_to_even() -> None:
    rule = ActivationQuantizer(scale=2.0, zero_point=1, bits=3)
    x = np.array([-9, -3, -1, 0, 1, 3, 5, 99], np.float32)
    np.testing.assert_array_equal(rule.quantize(x), [0, 0, 1, 1, 1, 3, 3, 7])


@given(FINITE, FINITE, st.integers(1, 8), st.floats(0, 1))
def test_values_in_range_come_back_within_half_a_step(
    low: float, high: float, bits: int, share: float
) -> None:
    rule = ActivationQuantizer.covering(low, high, bits)
    ends = rule.dequantize(np.array([0, rule.top], np.uint8)).astype(np.float64)
    x = np.float32(ends[0] + share * (ends[1] - ends[0]))

    codes = rule.quantize(np.array([x]))

    assert codes.dtype == np.uint8
    assert codes[0] <= rule.top
    assert abs(float(rule.dequantize(codes)[0]) - float(x)) <= rule.scale * 0.5001


@given(FINITE, FINITE, st.integers(1, 8))
def test_zero_is_a_code(low: float, high: float, bits: int) -> None:
    rule = ActivationQuantizer.covering(low, high, bits)
    assert rule.quantize(np.zeros(1, np.float32))[0] == rule.zero_point
    assert rule.dequantize(np.array([rule.zero_point], np.uint8))[0] == 0
    assert rule.zero_point == 0 or low < 0


@given(ROWS, st.integers(2, 8))
def test_least_squares_scales_are_no_worse_than_minmax(rows: Array, bits: int) -> None:
    chosen, plain = weight_scales(rows, bits), minmax_scales(rows, bits)
    assert (weight_error(rows, chosen, bits) <= weight_error(rows, plain, bits)).all()


@given(ROWS, st.integers(1, 8))
def test_weight_codes_fit_their_width_and_scales_are_sane(rows: Array, bits: int) -> None:
    made = quantize_weights(rows, bits, axis=0)
    assert made.values.dtype == np.int16
    assert made.scale.dtype == np.float32
    assert ((made.scale >= MIN_SCALE) & (made.scale <= MAX_SCALE)).all()
    if bits == 1:
        assert set(np.unique(made.values)) <= {-1, 1}
        assert made.levels == "odd"
    else:
        assert made.values.min() >= -(2 ** (bits - 1))
        assert made.values.max() < 2 ** (bits - 1)


def test_minmax_scales_clip_nothing() -> None:
    rows = np.random.default_rng(0).standard_normal((20, 50)).astype(np.float32)
    for bits in range(2, 9):
        scale = minmax_scales(rows, bits)
        back = np.rint(rows / scale[:, None])
        assert back.min() >= -(2 ** (bits - 1))
        assert back.max() < 2 ** (bits - 1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_find_the_optimum_of_a_fine_search(bits: int) -> None:
    rows = np.random.default_rng(1).standard_normal((8, 600)).astype(np.float32)
    found = weight_error(rows, weight_scales(rows, bits), bits)
    fine = [
        weight_error(rows, (minmax_scales(rows, bits) * share).astype(np.float32), bits)
        for share in np.linspace(0.05, 1, 1000)
    ]
    assert (found <= np.min(fine, axis=0) * 1.01).all()


def test_weights_on_the_grid_come_back_exactly() -> None:
    codes = np.array([[-8, 7, 0, 3, -1], [7, 7, -7, 1, 2]], np.float32)
    scale = np.array([0.25, 0.125], np.float32)
    made = quantize_weights(codes * scale[:, None], 4, axis=0)
    np.testing.assert_array_equal(made.values * made.scale[:, None], codes * scale[:, None])


def test_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    made = quantize_weights(np.array([[1, -3, 0, 4]], np.float32), 1, axis=0)
    np.testing.assert_array_equal(made.values, [[1, -1, 1, 1]])
    np.testing.assert_array_equal(made.scale, [2])


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_a_channel_of_zeros_stays_zero(bits: int) -> None:
    made = quantize_weights(np.zeros((1, 9), np.float32), bits, axis=0)
    np.testing.assert_allclose(made.values * made.scale[:, None], 0, atol=1e-15)


def test_channels_lie_along_the_axis() -> None:
    weights = np.random.default_rng(2).standard_normal((6, 3)).astype(np.float32)
    rows, columns = quantize_weights(weights.T, 4, axis=0), quantize_weights(weights, 4, axis=1)
    np.testing.assert_array_equal(rows.values.T, columns.values)
    np.testing.assert_array_equal(rows.scale, columns.scale)


def test_each_channel_may_have_its_own_width() -> None:
    weights = np.random.default_rng(3).standard_normal((3, 40)).astype(np.float32)
    mixed = quantize_weights(weights, (1, 2, 5), axis=0)
    assert (mixed.bits, mixed.levels) == (5, "signed")
    for channel, bits in enumerate((1, 2, 5)):
        alone = quantize_weights(weights[channel : channel + 1], bits, axis=0)
        np.testing.assert_array_equal(mixed.values[channel], alone.values[0])
        assert mixed.scale[channel] == alone.scale[0]


@pytest.mark.parametrize("changes", [{"scale": 0.0}, {"scale": np.inf}, {"zero_point": 16}])
def test_a_rule_out_of_range_cannot_be_built(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"scale|zero point"):
        ActivationQuantizer(**({"scale": 1.0, "zero_point": 0, "bits": 4} | changes))  # type: ignore[arg-type]
