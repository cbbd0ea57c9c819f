"""Losses and metrics for classes and for other outputs."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.errors import UsageError
from mpqc.graph import Graph
from mpqc.train.objective import Objective, Score
from tests.train.conftest import NETWORK

SOFTMAX = NETWORK.replace("return %y", "%p2 = Softmax(%y) {axis=1} : f32[4,5]\nreturn %p2")
PICTURES = """
%x = Input() : f32[1,3,4,4]
%w = Constant() : f32[3,3,1,1]
%y = Conv(%x, %w) : f32[1,3,4,4]
return %y
"""


def test_what_a_network_is_for() -> None:
    classes = Objective.of(Graph.parse(NETWORK), False)
    assert (dict(classes.classes), classes.distance, classes.metric) == ({"y": 5}, "kl", "accuracy")
    likely = Objective.of(Graph.parse(SOFTMAX), False)
    assert likely.probabilities == {"p2"}
    other = Objective.of(Graph.parse(PICTURES), False)
    assert (other.head, other.distance, other.metric) == (None, "mse", "signal share")
    with pytest.raises(UsageError, match="have none"):
        Objective.of(Graph.parse(NETWORK), False, label_weight=0.5)
    with pytest.raises(UsageError, match="one output of classes"):
        Objective.of(Graph.parse(PICTURES), True, label_weight=0.5)
    with pytest.raises(UsageError, match="no output of classes"):
        Objective.of(Graph.parse(PICTURES), False, "kl")


def test_kl_is_the_divergence_at_its_temperature() -> None:
    objective = Objective.of(Graph.parse(NETWORK), False, temperature=3.0)
    rng = np.random.default_rng(0)
    got, wanted = (torch.from_numpy(rng.standard_normal((4, 5))) for _ in range(2))
    p = torch.softmax(wanted / 3, 1)
    q = torch.softmax(got / 3, 1)
    exact = (p * (p.log() - q.log())).sum(1).mean() * 9
    assert float(objective.loss({"y": got}, {"y": wanted}, None)) == pytest.approx(float(exact))
    assert float(objective.loss({"y": wanted}, {"y": wanted}, None)) == pytest.approx(0, abs=1e-9)


def test_probabilities_and_logits_give_one_loss() -> None:
    logits = Objective.of(Graph.parse(NETWORK), False)
    likely = Objective.of(Graph.parse(SOFTMAX), False)
    rng = np.random.default_rng(0)
    got, wanted = (torch.from_numpy(rng.standard_normal((4, 5))) for _ in range(2))
    a = logits.loss({"y": got}, {"y": wanted}, None)
    b = likely.loss({"p2": got.softmax(1)}, {"p2": wanted.softmax(1)}, None)
    assert float(a) == pytest.approx(float(b))


def test_labels_share_the_loss() -> None:
    graph = Graph.parse(NETWORK)
    labels = torch.tensor([0, 1, 2, 3])
    got = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    alone = Objective.of(graph, True, label_weight=1.0)
    cross = torch.nn.functional.cross_entropy(got, labels)
    assert float(alone.loss({"y": got}, None, labels)) == pytest.approx(float(cross))
    half = Objective.of(graph, True, label_weight=0.5)
    both = half.loss({"y": got}, {"y": got}, labels)
    assert float(both) == pytest.approx(float(cross) / 2, abs=1e-6)
    with pytest.raises(UsageError, match="have none"):
        half.loss({"y": got}, {"y": got}, None)


def test_distance_of_pictures_is_relative() -> None:
    objective = Objective.of(Graph.parse(PICTURES), False)
    wanted = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1000.0):
        loss = objective.loss({"y": wanted * scale * 1.1}, {"y": wanted * scale}, None)
        assert float(loss) == pytest.approx(0.01, rel=0.2)


def test_scores() -> None:
    outputs = {"y": torch.eye(5)[torch.tensor([0, 1, 2, 3])]}
    score = Score(Objective.of(Graph.parse(NETWORK), True))
    score.add(outputs, None, torch.tensor([0, 1, 2, 0]))
    score.add(outputs, None, torch.tensor([0, 1, 2, 3]))
    assert score.value == 7 / 8
    agreement = Score(Objective.of(Graph.parse(NETWORK), False))
    agreement.add(outputs, {"y": torch.eye(5)[torch.tensor([0, 0, 2, 3])]}, None)
    assert agreement.value == 3 / 4
    pictures = Score(Objective.of(Graph.parse(PICTURES), False))
    wanted = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pictures.add({"y": wanted + 0.1 * (wanted - wanted.mean())}, {"y": wanted}, None)
    assert pictures.value == pytest.approx(0.99)
