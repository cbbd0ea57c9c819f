import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpqc.graph import Graph
from mpqc.passes.measure_entropy import entropy, lsq_codes, measure_entropy
from mpqc.search.testing import toy_graph


def test_equal_shares_of_all_codes_hold_all_bits() -> None:
    assert entropy(np.repeat(np.arange(-8, 8), 5)) == 4.0


def test_a_constant_holds_nothing() -> None:
    assert entropy(np.full(100, 3)) == 0.0


def test_by_hand() -> None:
    assert entropy(np.array([0, 0, 1, 2])) == pytest.approx(1.5)


@given(st.lists(st.integers(-8, 7), min_size=1))
def test_bounds(codes: list[int]) -> None:
    assert 0 <= entropy(np.array(codes)) <= 4


def test_codes_of_a_layer_have_one_step() -> None:
    weights = np.array([[1.0, -1.0, 0.1], [0.0, -9.0, 50.0]], np.float32)  # mean magnitude 10.18
    assert lsq_codes(weights, 4).tolist() == [[0, 0, 0], [0, -1, 6]]
    assert lsq_codes(weights * [[1], [-4]], 4).tolist() == [[0, 0, 0], [0, 1, -7]]
    assert entropy(lsq_codes(np.zeros((3, 3), np.float32), 4)) == 0


@pytest.mark.parametrize("step", ["layer", "lsq", "channel"])
def test_layers(step: str) -> None:
    graph = toy_graph()
    found = measure_entropy(graph, ["main", "classifier"], 4, step)  # type: ignore[arg-type]
    assert list(found) == ["main", "classifier"]
    assert all(2 < bits < 4 for bits in found.values())  # normal weights


def test_one_step_tells_wide_channels_from_narrow_ones() -> None:
    """Channels of many sizes waste codes of a common step; steps of their own hide that."""
    graph = toy_graph()
    uneven = np.array(graph.constants["w2"]) * 4.0 ** -np.arange(16)[:, None, None, None]
    spread: Graph = graph.with_(constants={"w2": uneven.astype(np.float32)})
    alike = measure_entropy(graph, ["main"])["main"]
    assert measure_entropy(spread, ["main"])["main"] < alike - 1
    own = measure_entropy(spread, ["main"], step="channel")["main"]
    assert own == pytest.approx(measure_entropy(graph, ["main"], step="channel")["main"])


def test_sparse_weights_hold_less() -> None:
    graph = toy_graph()
    weights = np.array(graph.constants["w2"])
    weights[np.random.default_rng(0).random(weights.shape) < 0.9] = 0
    sparse: Graph = graph.with_(constants={"w2": weights})
    assert measure_entropy(sparse, ["main"])["main"] < measure_entropy(graph, ["main"])["main"] / 2
