"""``--require``: conditions on the builds of a comparison, as ``mixed.accuracy>=w4a4.accuracy``."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mpqc.budget import UNITS, show
from mpqc.errors import UsageError
from mpqc.verdict import Build

METRICS = ("accuracy", "agreement", "sqnr_db", "size", "bitops", "latency")
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_TERM = re.compile(
    rf"(?:(?P<factor>{_NUMBER})\s*\*\s*)?(?:(?P<build>.+)\.)?(?P<metric>{'|'.join(METRICS)})"
    rf"(?:\s*(?P<sign>[+-])\s*(?P<offset>{_NUMBER})\s*(?P<unit>%|[a-zA-Zµ]*))?"
)
_VALUE = re.compile(rf"(?P<number>-?{_NUMBER})\s*(?P<unit>%|[a-zA-Zµ]*)")
_EXAMPLES = "accuracy>=0.9, mixed.latency<=5ms, mixed.accuracy>=w4a4.accuracy-0.5%"


@dataclass(frozen=True)
class _Side:
    """``factor * build.metric + offset``, or only the offset when there is no metric."""

    metric: str | None
    build: str | None
    factor: float
    offset: float

    def value(self, builds: Mapping[str, Build], build: str) -> float | None:
        if self.metric is None:
            return self.offset
        found = builds[self.build or build].metric(self.metric)
        return None if found is None else self.factor * found + self.offset


@dataclass(frozen=True)
class Requirement:
    """A condition that has been read.

    Attributes:
        text: as it was given.
    """

    text: str
    left: _Side
    right: _Side
    relation: str

    @classmethod
    def parse(cls, text: str) -> "Requirement":
        """Read one condition.

        A metric without a build stands for that of every build that mpqc made.

        Raises:
            UsageError: shows one that is right.
        """
        parts = re.split(r"(>=|<=|>|<)", text)
        if len(parts) != 3:
            raise UsageError(f"not a condition: {text!r}; write {_EXAMPLES}")
        left = _side(parts[0].strip(), None, text)
        right = _side(parts[2].strip(), left.metric, text)
        if left.metric is None:
            raise UsageError(f"condition {text!r} begins with no metric; write {_EXAMPLES}")
        return cls(text, left, right, parts[1])

    def failures(self, builds: Sequence[Build]) -> list[str]:
        """One sentence for each build that does not meet it; empty when it holds.

        Raises:
            UsageError: names a build that does not exist, or a metric that was not measured.
        """
        named = {build.name: build for build in builds}
        for name in filter(None, (self.left.build, self.right.build)):
            if name not in named:
                raise UsageError(
                    f"condition {self.text!r}: no build {name!r}; there are {', '.join(named)}"
                )
        own = [build.name for build in builds if build.role != "opponent"]
        found = []
        for name in [self.left.build] if self.left.build else own:
            left, right = self.left.value(named, name), self.right.value(named, name)
            if left is None or right is None:
                raise UsageError(
                    f"condition {self.text!r}: {self.left.metric} of {name} was not measured; "
                    "accuracy needs labels in the data"
                )
            if not _OPERATORS[self.relation](left, right):
                metric = str(self.left.metric)
                found.append(
                    f"{name}: {metric} is {_show(metric, left)}, required {self.relation} "
                    f"{_show(metric, right)}"
                )
        return found


def _side(text: str, beside: str | None, whole: str) -> _Side:
    if match := _TERM.fullmatch(text):
        metric = match["metric"]
        offset = 0.0
        if match["sign"]:
            offset = float(match["offset"]) * _unit(metric, match["unit"] or "", whole)
            offset = -offset if match["sign"] == "-" else offset
        return _Side(metric, match["build"], float(match["factor"] or 1), offset)
    if match := _VALUE.fullmatch(text):
        unit = _unit(beside, match["unit"], whole)
        return _Side(None, None, 1.0, float(match["number"]) * unit)
    raise UsageError(f"condition {whole!r}: {text!r} is neither a metric nor a value; metrics are "
                     f"{', '.join(METRICS)}; write {_EXAMPLES}")  # fmt: skip


def _unit(metric: str | None, unit: str, whole: str) -> float:
    unit = unit.replace("\u03bc", "µ").lower()
    if not unit:
        return 1.0
    if unit == "%" and metric in ("accuracy", "agreement"):
        return 0.01
    if metric == "sqnr_db" and unit == "db":
        return 1.0
    units = UNITS.get(metric or "", {})
    if unit not in units:
        raise UsageError(f"condition {whole!r}: {metric} has no unit {unit!r}; write {_EXAMPLES}")
    return units[unit]


def _show(metric: str, value: float) -> str:
    if metric in ("accuracy", "agreement"):
        return f"{value:.2%}"
    return f"{value:.2f} dB" if metric == "sqnr_db" else show(metric, value)
