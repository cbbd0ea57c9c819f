import copy
import pickle

import numpy as np
import pytest

from mpqc.errors import GraphError
from mpqc.graph import Graph, Node, Precision, TensorType

F4 = TensorType("float32", (4,))

TEXT = """
%x = Input() : f32[1,3,8,8]
%w = Constant() : f32[4,3,3,3]
%b = Constant() {value=[0.5, -1.0, 2.0, 0.0]} : f32[4]
%y = Conv(%x, %w, %b) {group=1, pads=[1, 1, 1, 1]} : f32[1,4,8,8] @first
%z = Clip(%y, _, %y) : f32[1,4,8,8]
%a, %c = Split(%z) {axis=1, mode="even"} : f32[1,2,8,8], f32[1,2,8,8]
return %a, %c
""".strip()


def relu(name: str, source: str, target: str) -> Node:
    return Node(name, "Relu", (source,), (target,))


def test_text_round_trip() -> None:
    assert str(Graph.parse(TEXT)) == TEXT


def test_nodes_come_after_their_producers() -> None:
    graph = Graph(
        {"x": F4}, ["z"], [relu("b", "y", "z"), relu("a", "x", "y")], {}, {"y": F4, "z": F4}
    )
    assert [node.name for node in graph] == ["a", "b"]


def test_knows_producers_and_consumers() -> None:
    graph = Graph.parse(TEXT)
    assert graph.producer("y") is graph["first"]
    assert graph.producer("x") is None
    assert [node.name for node in graph.consumers("y")] == ["z"]


def test_drops_constants_that_nobody_reads() -> None:
    graph = Graph({"x": F4}, ["x"], [], {"w": np.zeros(3)}, {})
    assert not graph.constants


def test_constants_cannot_be_written() -> None:
    graph = Graph.parse(TEXT)
    with pytest.raises(ValueError, match="read-only"):
        graph.constants["b"][0] = 1


def test_a_pass_leaves_the_old_graph_alone() -> None:
    graph = Graph.parse(TEXT)
    before = str(graph)
    smaller = graph.with_([graph["first"]], outputs=["y"])
    assert str(graph) == before
    assert len(smaller) == 1


@pytest.mark.parametrize(
    ("nodes", "outputs", "message"),
    [
        ([relu("a", "x", "y"), relu("a", "x", "z")], ["y"], "two nodes named 'a'"),
        ([relu("a", "x", "y"), relu("b", "x", "y")], ["y"], "'y' is defined twice"),
        ([relu("a", "x", "x")], ["x"], "'x' is defined twice"),
        ([relu("a", "q", "y")], ["y"], "'q' of node 'a' has no producer"),
        ([relu("a", "x", "untyped")], ["x"], "'untyped' of node 'a' has no type"),
        ([relu("a", "z", "y"), relu("b", "y", "z")], ["y"], "cycle through"),
        ([relu("a", "x", "y")], ["q"], "output 'q' has no producer"),
    ],
)
def test_refuses_broken_graphs(nodes: list[Node], outputs: list[str], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        Graph({"x": F4}, outputs, nodes, {}, {"y": F4, "z": F4})


def test_nodes_pickle() -> None:
    node = pickle.loads(pickle.dumps(Graph.parse(TEXT)["first"]))
    assert (node.name, node.ints_attr("pads")) == ("first", (1, 1, 1, 1))


def test_a_missing_attribute_is_an_error() -> None:
    with pytest.raises(KeyError):
        relu("a", "x", "y").int_attr("axis")


def test_precision_is_written_as_users_write_it() -> None:
    assert str(Precision.parse("W2a4")) == "w2a4"


@pytest.mark.parametrize("text", ["w9a2", "w0a1", "2a4", "w2"])
def test_refuses_other_widths(text: str) -> None:
    with pytest.raises(GraphError, match="bitwidth"):
        Precision.parse(text)


@pytest.mark.parametrize("text", ["f32", "f99[1]", "f32[-1]", "f32[N]"])
def test_refuses_types_that_are_not_static(text: str) -> None:
    with pytest.raises(GraphError, match="not a tensor type"):
        TensorType.parse(text)


def test_types_know_their_size() -> None:
    kind = TensorType.parse("i16[2,3]")
    assert (str(kind), kind.elements, kind.nbytes) == ("i16[2,3]", 6, 12)


def test_a_graph_travels_to_another_process_as_it_is() -> None:
    graph = Graph.parse(
        """
        %x = Input() : f32[1,4]
        %w = Constant() : f32[4,2]
        %y = MatMul(%x, %w) : f32[1,2]
        return %y
        """
    )
    twin = pickle.loads(pickle.dumps(graph))
    assert str(twin) == str(graph)
    np.testing.assert_array_equal(twin.constants["w"], graph.constants["w"])
    assert copy.deepcopy(graph) is graph
