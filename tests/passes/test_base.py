from dataclasses import dataclass

import pytest

from mpqc.errors import PassError
from mpqc.graph import Graph
from mpqc.passes.base import Pass, fresh, run

GRAPH = Graph.parse("%x = Input() : f32[1]\n%y = Relu(%x) : f32[1]\nreturn %y")


@dataclass(frozen=True)
class Rename(Pass):
    """Make every operator the one that was asked for."""

    name = "rename"

    op: str

    def requires(self, graph: Graph) -> None:
        if not len(graph):
            raise PassError("nothing to rename")

    def rewrite(self, graph: Graph) -> Graph:
        return Graph.parse(str(graph).replace("Relu", self.op).replace("Exp", self.op))


def test_runs_from_left_to_right_and_calls_back() -> None:
    seen: list[tuple[str, str]] = []
    after = run(
        GRAPH,
        Rename("Exp"),
        Rename("Abs"),
        callback=lambda step, graph: seen.append((step.name, graph["y"].op)),
    )
    assert after["y"].op == "Abs"
    assert seen == [("rename", "Exp"), ("rename", "Abs")]


def test_names_the_pass_that_refused() -> None:
    empty = Graph.parse("%x = Input() : f32[1]\nreturn %x")
    with pytest.raises(PassError, match="rename: nothing to rename"):
        run(empty, Rename("Exp"))


def test_names_the_pass_that_broke_the_graph() -> None:
    @dataclass(frozen=True)
    class Break(Pass):
        name = "break"

        def rewrite(self, graph: Graph) -> Graph:
            return graph.with_([])

    with pytest.raises(PassError, match="break: graph output 'y' has no producer"):
        run(GRAPH, Break())


def test_fresh_names_are_unused() -> None:
    assert fresh(GRAPH, "z") == "z"
    assert fresh(GRAPH, "y") == "y_1"
