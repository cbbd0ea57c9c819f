from collections.abc import Iterator

import numpy as np
import pytest

from mpqc import reference
from mpqc.data import Data, open_data
from mpqc.graph import Array, Graph
from mpqc.replay import Replay

GRAPH = Graph.parse(
    """
    %x = Input() : f32[2,3]
    %a = Relu(%x) : f32[2,3]
    %b = Exp(%x) : f32[2,3]
    %c = Add(%a, %b) : f32[2,3]
    %d = Neg(%c) : f32[2,3]
    %e = Mul(%d, %a) : f32[2,3]
    return %e
    """
)
ROWS = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
EXPECTED = [
    reference.run(GRAPH, {"x": ROWS[i : i + 2]}, ["a", "c", "d", "e"]) for i in range(0, 6, 2)
]


class Counted(Data):
    """Data that count how often they are read."""

    def __init__(self, data: Data) -> None:
        self._data, self.reads = data, 0
        self.batch, self.samples, self.labels = data.batch, data.samples, data.labels

    def feeds(self) -> Iterator[dict[str, Array]]:
        self.reads += 1
        return self._data.feeds()

    def sample(self, max_samples: int | None, seed: int = 0) -> Data:
        raise AssertionError


@pytest.mark.parametrize(("budget", "reads"), [(10**6, 1), (0, 4)])
def test_stages_give_what_one_run_gives(budget: int, reads: int) -> None:
    data = Counted(open_data({"x": ROWS}, GRAPH))
    replay = Replay(data, budget, threads=1)
    for wanted in (["a"], ["a", "c"], ["d"], ["e"]):
        for batch, expected in zip(replay.stage(GRAPH, wanted), EXPECTED, strict=True):
            assert list(batch) == wanted
            for value in wanted:
                np.testing.assert_allclose(batch[value], expected[value], rtol=1e-6)
    assert data.reads == reads


def test_an_input_may_be_wanted() -> None:
    replay = Replay(open_data({"x": ROWS}, GRAPH), 10**6, threads=1)
    got = [batch["x"] for batch in replay.stage(GRAPH, ["x"])]
    np.testing.assert_array_equal(np.concatenate(got), ROWS)


def test_nodes_ahead_may_change_between_stages() -> None:
    replay = Replay(open_data({"x": ROWS}, GRAPH), 10**6, threads=1)
    list(replay.stage(GRAPH, ["c"]))
    changed = Graph.parse(str(GRAPH).replace("%d = Neg(%c)", "%d = Abs(%c)"))
    got = [batch["d"] for batch in replay.stage(changed, ["d"])]
    expected = np.concatenate([np.abs(batch["c"]) for batch in EXPECTED])
    np.testing.assert_allclose(np.concatenate(got), expected, rtol=1e-6)
