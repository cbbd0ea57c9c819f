import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqc import numerics, rounding
from mpqc.errors import UsageError
from mpqc.graph import Array
from mpqc.quantizers import quantize_weights
from mpqc.rounding import Accuracy, Objective, compensate


def layer(
    seed: int, groups: int, rows: int, columns: int, samples: int
) -> tuple[Array, Array, Array]:
    """Weights [G, O, K], mixed and partly dead inputs [G, n, K], outputs [G, n, O]."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((groups, rows, columns)).astype(np.float32)
    x = rng.standard_normal((groups, samples, columns)) @ rng.standard_normal(
        (groups, columns, columns)
    )
    x[..., rng.random(columns) < 0.2] = 0
    return weights, x, x @ weights.swapaxes(1, 2)


def nearest(weights: Array, bits: int) -> Array:
    flat = weights.reshape(-1, weights.shape[2])
    found = quantize_weights(flat, bits, 0)
    return (found.values * found.scale[:, None]).reshape(weights.shape)


def objective(weights: Array, x: Array, y: Array, damping: float = 0.01) -> Objective:
    samples = x.shape[1]
    gram = x.swapaxes(1, 2) @ x / samples
    return Objective.fitted(weights, gram, y.swapaxes(1, 2) @ x / samples, damping)


@given(
    seed=st.integers(0, 99),
    bits=st.integers(1, 8),
    groups=st.integers(1, 3),
    rows=st.integers(1, 5),
    columns=st.integers(1, 90),
    samples=st.integers(1, 100),
    order=st.booleans(),
)
def test_never_worse_than_rounding_to_nearest(
    seed: int, bits: int, groups: int, rows: int, columns: int, samples: int, order: bool
) -> None:
    weights, x, y = layer(seed, groups, rows, columns, samples)
    goal = objective(weights, x, y)
    codes, scale = compensate(weights, bits, goal, order)
    levels = "odd" if bits == 1 else "signed"
    numerics.weight_codes(codes, bits, levels)  # raises for integers that the width lacks
    assert codes.dtype == np.int16
    assert (scale > 0).all()
    before, after = goal.error(nearest(weights, bits)), goal.error(codes * scale[..., None])
    assert (after <= before * (1 + 1e-9) + 1e-9).all()


@pytest.mark.parametrize(("bits", "share"), [(2, 0.6), (3, 0.5), (4, 0.5)])
def test_correlated_inputs_let_it_lose_far_less(bits: int, share: float) -> None:
    weights, x, y = layer(3, 1, 16, 64, 500)
    codes, scale = compensate(weights, bits, objective(weights, x, y))
    error = np.square(x @ (codes * scale[..., None]).swapaxes(1, 2) - y).sum()
    assert error < share * np.square(x @ nearest(weights, bits).swapaxes(1, 2) - y).sum()


def test_finds_the_best_of_all_integers_where_all_can_be_tried() -> None:
    weights, x, y = layer(1, 1, 6, 3, 40)
    goal = objective(weights, x, y)
    codes, scale = compensate(weights, 2, goal)
    levels = np.stack(np.meshgrid(*[np.arange(-2, 2)] * 3), -1).reshape(1, -1, 3)
    for row in range(6):
        one = Objective(goal.gram, np.repeat(goal.target[:, row : row + 1], 64, 1))
        best = one.error(levels * scale[0, row]).min()
        got = goal.error(codes * scale[..., None])[0, row]
        assert got == pytest.approx(best, rel=0.3)


def test_independent_inputs_are_rounded_to_nearest() -> None:
    weights = np.random.default_rng(0).standard_normal((1, 4, 50)).astype(np.float32)
    goal = Objective(np.eye(50)[None], weights.astype(np.float64))
    codes, scale = compensate(weights, 4, goal)
    expected = np.clip(np.rint(weights / scale[..., None]), -8, 7)
    np.testing.assert_array_equal(codes, expected)


def test_rows_of_different_widths_keep_to_their_own() -> None:
    weights, x, y = layer(2, 1, 4, 20, 60)
    codes, _ = compensate(weights, (1, 2, 4, 8), objective(weights, x, y))
    assert set(np.unique(codes[0, 0])) == {-1, 1}
    for row, bits in enumerate((2, 4, 8), start=1):
        numerics.weight_codes(codes[0, row], bits, "signed")


def test_inputs_that_are_always_zero_leave_the_weights_as_they_are() -> None:
    weights, x, y = layer(0, 2, 3, 10, 30)
    x[0] = 0
    y[0] = 0
    codes, scale = compensate(weights, 4, objective(weights, x, y))
    np.testing.assert_allclose((codes * scale[..., None])[0], weights[0], atol=0.3)
    zeros, ones = compensate(np.zeros_like(weights), 4, objective(weights * 0, x, y * 0))
    assert not zeros.any()
    assert np.isfinite(ones).all()


def test_fits_outputs_that_the_float_weights_would_miss() -> None:
    weights, x, y = layer(5, 1, 4, 12, 400)
    seen = x + np.random.default_rng(0).standard_normal(x.shape) * 3
    gram, cross = seen.swapaxes(1, 2) @ seen / 400, y.swapaxes(1, 2) @ seen / 400

    def error(goal: Objective) -> float:
        codes, scale = compensate(weights, 6, goal)
        return float(np.square(seen @ (codes * scale[..., None]).swapaxes(1, 2) - y).sum())

    fitted, kept = (
        Objective.fitted(weights, gram, cross, 0.01),
        Objective.exact(weights, gram, 0.01),
    )
    assert error(fitted) < 0.9 * error(kept)


def test_a_layer_wider_than_a_block_is_the_same_without_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, x, y = layer(4, 2, 3, 150, 300)
    goal = objective(weights, x, y)
    blocked = compensate(weights, 3, goal)
    monkeypatch.setattr(rounding, "BLOCK", 1000)
    whole = compensate(weights, 3, goal)
    np.testing.assert_array_equal(blocked[0], whole[0])
    np.testing.assert_array_equal(compensate(weights, 3, goal)[1], whole[1])


@pytest.mark.parametrize(
    "wrong", [{"rounding": "up"}, {"clipping": "no"}, {"equalize": "yes"}, {"samples": 0}]
)
def test_unknown_choices_are_named(wrong: dict[str, str | int]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Accuracy(**wrong)  # type: ignore[arg-type]
