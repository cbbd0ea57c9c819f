"""The contract of a search plugin, and how plugins are found."""

import dataclasses
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, Literal, TypeAlias

from mpqc.errors import EnvironmentLacks, UsageError
from mpqc.plan import Plan
from mpqc.search.problem import Problem
from mpqc.search.scores import Scores

GROUP = "mpqc.search"
Need: TypeAlias = Literal["data", "labels", "trainer"]

# A checkout that is not installed has no entry points, so our own plugins are listed here.
BUILT_IN: Mapping[str, str] = {
    "uniform": "mpqc.search.uniform:Uniform",
    "eagl": "mpqc.search.eagl:Eagl",
    "progressive": "mpqc.search.progressive:Progressive",
    "hawq": "mpqc.search.hawq:Hawq",
    "sensitivity": "mpqc.search.sensitivity:Sensitivity",
    "exchange": "mpqc.search.exchange:Exchange",
    "ebs": "mpqc.search.ebs:Ebs",
    "dnas": "mpqc.search.dnas:Dnas",
    "fracbits": "mpqc.search.fracbits:FracBits",
    "alps": "mpqc.search.alps:Alps",
    "reverse": "mpqc.search.baselines:Reverse",
    "random": "mpqc.search.baselines:Random",
}


class Search(ABC):
    """A search method: made with its options, called once a problem.

    A plugin is such a class, registered by its package under the entry-point group
    ``mpqc.search``. Options are the fields of a (frozen) dataclass, with defaults; the
    constructor checks them and raises UsageError. The first line of the docstring is what
    ``mpqc methods`` prints.

    Attributes:
        needs: what the problem has to bring.
        widths: candidates that the method takes when the user names none.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    widths: ClassVar[tuple[int | str, ...]] = (2, 3, 4, 5, 6, 8)

    @abstractmethod
    def __call__(self, problem: Problem) -> Plan:
        """Return a plan that keeps the budgets; ``Problem.plan`` makes and checks it.

        Equal problems with equal seeds give equal plans. With one budget, a narrower one never
        gives a plan that costs more.

        Raises:
            BudgetError: no assignment that the method could return keeps the budgets; names
                the cheapest one.
            UsageError: something that the method needs is missing.
        """


class ScoreSearch(Search):
    """A method that scores every layer at every width, then solves for the budget."""

    @abstractmethod
    def scores(self, problem: Problem) -> Scores:
        """Losses, independent of budgets and costs; cached where they take time."""

    def name(self) -> str:
        """As it stands in plans."""
        return type(self).__name__.lower()

    def plan(self, problem: Problem, scores: Scores) -> Plan:
        """The plan of least loss; without a look at the model or the data."""
        from mpqc.search.solve import solve

        return problem.plan(solve(problem, scores.losses), self.name())

    def __call__(self, problem: Problem) -> Plan:
        return self.plan(problem, self.scores(problem))


@dataclass(frozen=True)
class Method:
    """A plugin that is installed.

    Attributes:
        name: of the entry point; what ``--method`` takes.
        origin: distribution and version that brought it.
        module: where the class is.
        summary: first line of its docstring; empty when it cannot be loaded.
        needs: see ``Search``.
        widths: see ``Search``.
        problem: why it cannot be loaded, or "".
    """

    name: str
    origin: str
    module: str
    summary: str = ""
    needs: frozenset[str] = frozenset()
    widths: tuple[int | str, ...] = ()
    problem: str = ""


def methods() -> dict[str, Method]:
    """Every installed plugin by name; one that does not load says why and harms no other.

    Raises:
        UsageError: two plugins of one name.
    """
    return {name: _describe(point, origin) for name, (point, origin) in sorted(_points().items())}


def load(name: str, options: Mapping[str, str] | None = None) -> Search:
    """Make the plugin of that name.

    Args:
        name: of its entry point.
        options: texts for its fields, as in ``--option probes=8``.

    Raises:
        UsageError: no such plugin or option, or a value that the option does not take.
        EnvironmentLacks: the plugin is installed but cannot be imported.
    """
    points = _points()
    if name not in points:
        raise UsageError(f"no search method {name!r}; installed: {', '.join(sorted(points))}")
    point, origin = points[name]
    made = _load(point, origin)
    values = {key: _option(made, name, key, text) for key, text in (options or {}).items()}
    search: Search = made(**values)
    return search


def _points() -> dict[str, tuple[EntryPoint, str]]:
    found = {name: (EntryPoint(name, target, GROUP), "mpqc") for name, target in BUILT_IN.items()}
    for distribution in metadata.distributions():
        for point in distribution.entry_points.select(group=GROUP):
            origin = f"{distribution.name} {distribution.version}"
            known = found.get(point.name)
            if known and (known[0].value == point.value):
                continue  # ours, or one distribution that two folders of the path hold
            if known:
                raise UsageError(
                    f"two search methods are named {point.name!r}: from {known[1]} and from "
                    f"{origin}; remove one of the packages"
                )
            found[point.name] = (point, origin)
    return found


def _load(point: EntryPoint, origin: str) -> Any:
    try:
        made = point.load()
    except Exception as error:  # foreign code may raise anything while it is imported
        raise EnvironmentLacks(
            f"search method {point.name!r} of {origin} cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not (isinstance(made, type) and any("__call__" in vars(base) for base in made.__mro__)):
        raise EnvironmentLacks(
            f"search method {point.name!r} of {origin}: {point.value} is not a callable class"
        )
    return made


def _describe(point: EntryPoint, origin: str) -> Method:
    try:
        made = _load(point, origin)
    except EnvironmentLacks as error:
        return Method(point.name, origin, point.value, problem=str(error))
    return Method(
        point.name,
        origin,
        point.value,
        summary=(made.__doc__ or "").strip().partition("\n")[0],
        needs=frozenset(getattr(made, "needs", ())),
        widths=tuple(getattr(made, "widths", Search.widths)),
    )


def _option(made: Any, method: str, key: str, text: str) -> Any:
    fields = {f.name for f in dataclasses.fields(made)} if dataclasses.is_dataclass(made) else set()
    if key not in fields:
        known = ", ".join(sorted(fields)) or "none"
        raise UsageError(f"method {method!r} has no option {key!r}; options: {known}")
    kind = typing.get_type_hints(made)[key]
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
    if choices is not None and text not in choices:
        raise UsageError(f"option {key} of {method!r} is one of {', '.join(choices)}, got {text!r}")
    if kind is bool and text.lower() not in ("true", "false"):
        raise UsageError(f"option {key} of {method!r} is true or false, got {text!r}")
    try:
        return text.lower() == "true" if kind is bool else text if choices else kind(text)
    except (TypeError, ValueError) as error:
        name = getattr(kind, "__name__", str(kind))
        raise UsageError(f"option {key} of {method!r} wants {name}, got {text!r}") from error
