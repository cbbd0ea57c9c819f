"""What a pass is, and how passes run in a row."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from mpqc.errors import GraphError, PassError
from mpqc.graph import Graph

Callback = Callable[["Pass", Graph], None]


class Pass(ABC):
    """A named function from graph to graph; its options are the fields of a frozen dataclass."""

    name: ClassVar[str]

    def requires(self, graph: Graph) -> None:  # noqa: B027 - most passes accept any graph
        """Raise PassError when the graph is not one that this pass can rewrite."""

    @abstractmethod
    def rewrite(self, graph: Graph) -> Graph:
        """Return the new graph; the old one stays as it was."""

    def __call__(self, graph: Graph) -> Graph:
        """Check the precondition, then rewrite."""
        try:
            self.requires(graph)
            return self.rewrite(graph)
        except (PassError, GraphError) as error:
            raise PassError(f"{self.name}: {error}") from error


def run(graph: Graph, *passes: Pass, callback: Callback | None = None) -> Graph:
    """Apply the passes from left to right.

    Args:
        graph: what the first pass gets.
        passes: in order.
        callback: called with each pass and what it returned: printing, timing, dumping.
    """
    for step in passes:
        graph = step(graph)
        if callback is not None:
            callback(step, graph)
    return graph


def fresh(graph: Graph, base: str) -> str:
    """A value name that the graph does not use yet."""
    name, serial = base, 1
    while name in graph.types or name in graph:
        name, serial = f"{base}_{serial}", serial + 1
    return name
