"""Run a graph over data in stages, each from what the stages before it left behind."""

from collections.abc import Iterator, Sequence

from mpqc.data import Data
from mpqc.graph import Array, Graph, Node

Batch = dict[str, Array]


class Replay:
    """Values of a graph on all batches, asked for from the inputs to the outputs.

    What later stages need is kept in memory as long as it fits, else the last values that did
    fit are where the next stage starts from; at worst that are the data themselves. Nodes that no
    stage has run may be replaced in between.

    Args:
        data: streamed as often as needed.
        budget: bytes for values kept.
        threads: of ONNX Runtime.
    """

    def __init__(self, data: Data, budget: int, threads: int) -> None:
        self._data, self._budget, self._threads = data, budget, threads
        self._kept: list[Batch] | None = None
        self._have: set[str] = set()
        self._done: set[str] = set()

    def stage(self, graph: Graph, wanted: Sequence[str]) -> Iterator[Batch]:
        """Batches of the wanted values; run it to its end.

        Args:
            graph: as before in all nodes that earlier stages ran.
            wanted: values that no earlier stage went beyond.
        """
        from mpqc import onnx_export, ort

        have = self._have or set(graph.inputs)
        nodes = _between(graph, have, wanted)
        done = self._done | {node.name for node in nodes}
        live = _live(graph, done)
        computed = {value for node in nodes for value in node.outputs if value}
        outputs = [value for value in dict.fromkeys([*wanted, *sorted(live)]) if value in computed]
        session = None
        if outputs:
            part = Graph(
                {value: graph.type(value) for value in sorted(have)},
                outputs,
                nodes,
                graph.constants,
                graph.types,
                graph.opset,
            )
            model = onnx_export.to_onnx(part)
            session = ort.Session(model, threads=self._threads, optimise=True)
        kept: list[Batch] | None = []
        size = 0
        for batch in self._data.feeds() if self._kept is None else self._kept:
            values = batch | ({} if session is None else session.run(batch, outputs))
            if kept is not None:
                kept.append({value: values[value] for value in live})
                size += sum(array.nbytes for array in kept[-1].values())
                if size > self._budget:
                    kept = None
            yield {value: values[value] for value in wanted}
        if kept is not None:
            self._kept, self._have, self._done = kept, live, done


def _between(graph: Graph, have: set[str], wanted: Sequence[str]) -> list[Node]:
    """Nodes that lead from the values there are to the wanted ones."""
    needed = set(wanted) - have
    nodes = []
    for node in reversed(tuple(graph)):
        if needed.isdisjoint(node.outputs):
            continue
        nodes.append(node)
        needed.update(value for value in node.inputs if value and value not in have)
    return nodes[::-1]


def _live(graph: Graph, done: set[str]) -> set[str]:
    """Values that nodes not yet run read."""
    made = set(graph.inputs)
    for node in graph:
        if node.name in done:
            made.update(node.outputs)
    return {
        value
        for node in graph
        if node.name not in done
        for value in node.inputs
        if value in made and value
    }
