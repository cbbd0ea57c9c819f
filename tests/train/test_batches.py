"""Samples, their order, and what is refused."""

import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.data import open_data
from mpqc.errors import DataError
from mpqc.graph import Array, Graph
from mpqc.train.batches import Augment, SetData, TrainingSet
from tests.train.conftest import NETWORK, pictures


def samples(count: int = 22, memory: int = 2**30) -> tuple[TrainingSet, dict[str, Array]]:
    graph, arrays = Graph.parse(NETWORK), pictures(count)
    return TrainingSet.read(open_data(arrays, graph), graph, memory), arrays


@pytest.mark.parametrize("memory", [2**30, 100])
def test_reads_every_sample_once(memory: int) -> None:
    read, arrays = samples(22, memory)
    assert len(read) == 22
    np.testing.assert_array_equal(read.arrays["x"], arrays["x"])
    assert read.labels is not None
    np.testing.assert_array_equal(read.labels, arrays["labels"])
    assert isinstance(read.arrays["x"], np.memmap) == (memory == 100)


def test_an_epoch_deals_full_batches_without_repetition() -> None:
    read, arrays = samples()
    batches = list(read.epoch(5, 0, 7))
    numbers = np.concatenate([batch.numbers for batch in batches])
    assert [len(batch.numbers) for batch in batches] == [5] * 4
    assert len(set(numbers.tolist())) == 20
    for batch in batches:
        np.testing.assert_array_equal(batch.feeds["x"].numpy(), arrays["x"][batch.numbers])
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.labels.numpy(), arrays["labels"][batch.numbers])


def test_orders_follow_seed_and_epoch_and_can_start_anywhere() -> None:
    read, _ = samples()

    def order(seed: int, epoch: int, start: int = 0) -> list[list[float]]:
        augment = Augment(True, 1)
        return [
            [*batch.numbers.tolist(), float(batch.feeds["x"].sum())]
            for batch in read.epoch(5, epoch, seed, augment, start)
        ]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert order(1, 3, 2) == order(1, 3)[2:]


def test_splits_are_disjoint_and_whole() -> None:
    read, _ = samples()
    train, held = read.split(0.5, 4, 0)
    assert (len(train), len(held)) == (18, 4)
    a, b = train.halves(0.5, 0)
    assert sorted([*a.chosen, *b.chosen, *held.chosen]) == list(range(22))
    seen = np.concatenate([batch.numbers for batch in held.batches(3)])
    np.testing.assert_array_equal(seen, held.chosen)


def test_what_does_not_fit_is_refused() -> None:
    read, _ = samples()
    with pytest.raises(DataError, match="22 training samples do not fill a batch of 23"):
        read.check_batch(23)
    assert read.labels is not None
    labels = np.array(read.labels)
    labels[3] = 5
    wrong = TrainingSet(read.arrays, labels, read.chosen)
    with pytest.raises(DataError, match=r"label 5 of sample 3 is out of range: .* 5 classes"):
        wrong.check_labels(5)
    labels[3] = -1
    with pytest.raises(DataError, match="label -1 of sample 3"):
        wrong.check_labels(5)
    two = TrainingSet(read.arrays, labels.reshape(11, 2), read.chosen)
    with pytest.raises(DataError, match="one a sample"):
        two.check_labels(5)


def test_streams_of_unknown_length(tmp_path: "pytest.TempPathFactory") -> None:
    file = tmp_path / "feeds.py"  # type: ignore[operator]
    file.write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    for i in range(3):\n"
        "        yield {'x': np.full((4, 3, 6, 6), i, np.float32)}\n"
    )
    graph = Graph.parse(NETWORK)
    read = TrainingSet.read(open_data(f"{file}:feeds", graph), graph)
    assert len(read) == 12
    assert read.labels is None
    assert read.arrays["x"][:, 0, 0, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_augmentation_moves_and_mirrors() -> None:
    x = np.arange(2 * 3 * 6 * 6, dtype=np.float32).reshape(2, 3, 6, 6)
    rng = np.random.default_rng(0)
    flips = [Augment(flip=True)(x, rng) for _ in range(8)]
    assert all(
        (y[i] == x[i]).all() or (y[i] == x[i, ..., ::-1]).all() for y in flips for i in range(2)
    )
    assert len({y.tobytes() for y in flips}) > 1
    moved = Augment(crop=2)(x, rng)
    assert moved.shape == x.shape
    assert (moved != x).any()
    assert not Augment()
    assert Augment()(x, rng) is x


def test_calibration_data_of_a_set() -> None:
    read, arrays = samples()
    train, _ = read.split(0.5, 3, 0)
    data = pickle.loads(pickle.dumps(SetData(train, 4)))
    feeds = list(data.feeds())
    assert (len(data), len(feeds)) == (19, 5)
    got = np.concatenate([feed["x"] for feed in feeds])[:19]
    np.testing.assert_array_equal(got, arrays["x"][train.chosen])
    few = data.sample(6, 1)
    assert len(few) == 6
    assert few.labels is not None
    assert len(list(few.feeds())) == 2
    with pytest.raises(DataError, match="at least one sample"):
        data.sample(0)
