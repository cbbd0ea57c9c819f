"""Budgets as users write them: ``size=1.5MB``, ``bitops=0.8*w4a4``, ``latency=5ms``."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mpqc.errors import UsageError
from mpqc.graph import Precision

# Units by objective: what one of them is in bytes, BitOPs and seconds. Prefixes are decimal, as
# the papers count; KiB and MiB are there for who means 1024.
_DECIMAL = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
UNITS: Mapping[str, Mapping[str, float]] = {
    "size": {f"{prefix}b": factor for prefix, factor in _DECIMAL.items()}
    | {"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30},
    "bitops": {f"{prefix}{unit}": factor for prefix, factor in _DECIMAL.items()
               for unit in ("", "bitops")},
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9},
}  # fmt: skip
_EXAMPLES = {"size": "size=1.5MB", "bitops": "bitops=22.8G", "latency": "latency=5ms"}
_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?"
_SUFFIXES = {"size": "B", "bitops": "", "latency": "s"}


@dataclass(frozen=True)
class Budget:
    """An upper limit of one objective.

    Attributes:
        objective: ``size``, ``bitops`` or ``latency``.
        amount: bytes, BitOPs or seconds; or the factor of ``uniform``'s cost.
        uniform: precision of the uniform build that the budget refers to, or None.
    """

    objective: str
    amount: float
    uniform: Precision | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read one budget.

        Raises:
            UsageError: says what is wrong and shows one that is right.
        """
        objective, equals, value = (part.strip() for part in text.partition("="))
        if not equals or objective not in UNITS:
            raise UsageError(
                f"not a budget: {text!r}; write one of {', '.join(_EXAMPLES.values())}, "
                "or the cost of a uniform build: bitops=w4a4, size=0.8*w4a4"
            )
        if not value:
            raise UsageError(f"budget {text!r} has no value; write {_EXAMPLES[objective]}")
        if relative := re.fullmatch(rf"(?:({_NUMBER})\s*\*\s*)?(w\d+a\d+)", value, re.IGNORECASE):
            factor = float(relative[1] or 1)
            return cls(objective, _positive(factor, text), Precision.parse(relative[2]))
        return cls(objective, _positive(_absolute(objective, value, text), text))

    def resolve(self, uniform_cost: Callable[[str, Precision], float]) -> float:
        """The limit in bytes, BitOPs or seconds.

        Args:
            uniform_cost: cost of an objective for the model's uniform build of a precision.
        """
        if self.uniform is None:
            return self.amount
        return self.amount * uniform_cost(self.objective, self.uniform)

    def __str__(self) -> str:
        if self.uniform is None:
            return f"{self.objective}={show(self.objective, self.amount)}"
        factor = "" if self.amount == 1 else f"{self.amount:g}*"
        return f"{self.objective}={factor}{self.uniform}"


def parse_budgets(texts: str | Iterable[str]) -> tuple[Budget, ...]:
    """Read budgets that hold together; commas separate several in one text.

    Raises:
        UsageError: none, a malformed one, or two of one objective.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    parts = [part for text in texts for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError(f"a search needs a budget, for example {_EXAMPLES['bitops']}")
    budgets = tuple(map(Budget.parse, parts))
    objectives = [budget.objective for budget in budgets]
    if twice := sorted({name for name in objectives if objectives.count(name) > 1}):
        raise UsageError(f"two budgets for {twice[0]}; give the narrower one")
    return budgets


def show(objective: str, amount: float) -> str:
    """An amount with its unit, three digits: ``show("size", 1.5e6) == "1.5 MB"``."""
    suffix = _SUFFIXES.get(objective, "")
    if not math.isfinite(amount) or amount == 0:
        return f"{amount:g} {suffix}".rstrip()
    scales = [(1e-9, "n"), (1e-6, "µ"), (1e-3, "m")] if objective == "latency" else []
    scales += [(1.0, "")]
    scales += [] if objective == "latency" else [(1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T")]
    factor, prefix = next((pair for pair in scales[::-1] if abs(amount) >= pair[0]), scales[0])
    return f"{amount / factor:.4g} {prefix}{suffix}".rstrip()


def _absolute(objective: str, value: str, text: str) -> float:
    match = re.fullmatch(rf"({_NUMBER})\s*([a-zµ]*)", value, re.IGNORECASE)
    if not match:
        raise UsageError(
            f"budget {text!r}: {value!r} is not a number; write {_EXAMPLES[objective]}"
        )
    unit = match[2].replace("\u03bc", "µ").lower()  # two characters look like micro
    if objective == "size" and re.fullmatch(r"[KMGT]?b", match[2]):
        raise UsageError(f"budget {text!r}: a small b means bits; write bytes with B, as in 1.5MB")
    if unit not in UNITS[objective] or (objective == "size" and not unit):
        known = "B, kB, MB, GB, KiB, MiB" if objective == "size" else "k, M, G, T"
        known = "s, ms, us, ns" if objective == "latency" else known
        what = f"has the unit {match[2]!r}" if match[2] else "has no unit"
        raise UsageError(f"budget {text!r} {what}; units of {objective} are {known}")
    return float(match[1]) * UNITS[objective][unit]


def _positive(amount: float, text: str) -> float:
    if not (math.isfinite(amount) and amount > 0):
        raise UsageError(f"budget {text!r}: the limit must be a positive finite number")
    return amount
