import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpqc.graph import Array
from mpqc.histogram import BINS, Histogram, Method
from mpqc.quantizers import ActivationQuantizer

VALUES = hnp.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.floats(-(2.0**80), 2.0**80, width=32, allow_subnormal=False),
)
METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse", "entropy")


def histogram(*batches: Array) -> Histogram:
    made = Histogram()
    for batch in batches:
        made.add(batch)
    return made


@given(VALUES, VALUES)
def test_growing_keeps_every_count(first: Array, second: Array) -> None:
    made = histogram(first, second)
    both = np.concatenate([first, second])
    assert made.count == both.size
    assert made.zeros == np.count_nonzero(both == 0)
    assert (made.low, made.high) == (both.min(), both.max())


@given(VALUES, VALUES)
def test_a_stream_counts_as_one_batch(first: Array, second: Array) -> None:
    streamed, whole = histogram(first, second), histogram(np.concatenate([first, second]))
    assert streamed.exponent == whole.exponent
    np.testing.assert_array_equal(streamed.counts, whole.counts)


def test_bins_hold_what_lies_between_their_edges() -> None:
    x = np.random.default_rng(0).uniform(-3, 5, 5000).astype(np.float32)
    made = histogram(x)
    edges = (np.arange(2 * BINS + 1) - BINS) * made.width
    np.testing.assert_array_equal(made.counts, np.histogram(x, edges)[0])
    assert made.mean == pytest.approx(x.mean(), abs=1e-6)


def squared_error(x: Array, rule: ActivationQuantizer) -> float:
    back = rule.dequantize(rule.quantize(x))
    return float(((back - x).astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["relu", "normal", "skewed", "negative"])
def test_mse_is_near_the_optimum_and_no_worse_than_minmax(bits: int, kind: str) -> None:
    x = np.random.default_rng(bits).standard_normal(20_000).astype(np.float32)
    shaped = {
        "relu": np.maximum(x, 0),
        "normal": x,
        "skewed": np.exp(x) - 1,
        "negative": -np.abs(x),
    }
    x = shaped[kind]
    made = histogram(x)
    found = squared_error(x, made.quantizer(bits, "mse"))
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    tried = [
        squared_error(x, ActivationQuantizer.covering(low * a, high * b, bits))
        for a in np.linspace(0.05, 1, 20)
        for b in np.linspace(0.05, 1, 20)
    ]
    assert found <= min(tried) * 1.05
    assert found <= squared_error(x, made.quantizer(bits, "minmax")) * 1.0001


def test_minmax_covers_everything() -> None:
    x = np.array([-1, 0.5, 3], np.float32)
    rule = histogram(x).quantizer(8, "minmax")
    assert np.abs(rule.dequantize(rule.quantize(x)) - x).max() <= rule.scale / 2


def test_percentile_leaves_outliers_out() -> None:
    x = np.random.default_rng(0).uniform(0, 1, 100_000).astype(np.float32)
    x[0] = 1000
    rule = histogram(x).quantizer(8, "percentile")
    assert 0.99 < rule.scale * rule.top < 1.3


def test_entropy_leaves_outliers_out() -> None:
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    x[0] = 40
    rule = histogram(np.maximum(x, 0)).quantizer(8, "entropy")
    assert 2 < rule.scale * rule.top < 12


@pytest.mark.parametrize("method", METHODS)
def test_non_negative_values_have_zero_point_zero(method: Method) -> None:
    x = np.abs(np.random.default_rng(0).standard_normal(1000)).astype(np.float32)
    assert histogram(x).quantizer(4, method).zero_point == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-44, 3e38])
def test_a_constant_has_a_rule(method: Method, value: float) -> None:
    rule = histogram(np.full(10, value, np.float32)).quantizer(3, method)
    assert np.isfinite(rule.scale)
    if abs(value) == 5:
        assert rule.dequantize(rule.quantize(np.array([value], np.float32)))[0] == pytest.approx(
            value
        )


def test_nothing_seen_is_a_rule_too() -> None:
    assert Histogram().quantizer(4) == ActivationQuantizer(1.0, 0, 4)
