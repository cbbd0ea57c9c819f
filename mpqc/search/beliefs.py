"""From losses that a search learned to a plan: the losses are corrected by plans that are measured.

What a relaxed search learns about a tensor is right within a factor; and some of what the compiler
does it has not seen, such as rounding with compensation, which spares weights and not inputs. A few
measured plans tell: their losses are sums over tensors, so unknown factors of the tensors' losses
are found by linear regression.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from mpqc.graph import Array, Precision
from mpqc.search.problem import Problem, Widths, all_pairs
from mpqc.search.repair import filled, repair
from mpqc.search.solve import Losses
from mpqc.search.uniform import widest_uniform

Measure: TypeAlias = Callable[[Widths], float]
"""What a plan loses, in any unit, above zero; infinite where it cannot be told."""

KIND, LEVEL, OWN, CELL = 0.7, 0.3, 0.4, 0.2  # standard deviations of what factors share
NOISE = 0.05  # of a measured loss, relative: rounded on other samples, a plan's differs as much
REACH = 0.7  # of draws, in standard deviations: with whole ones too much is tried at once
LEAST_FACTOR = 0.05
LEAST_LOSS = 0.03  # of the mean loss, falling by four a bit: so that no width is free


@dataclass(frozen=True)
class Part:
    """A tensor at one width; or a layer at one precision, where not all pairs are candidates.

    Attributes:
        kind: weights, inputs, layer.
        names: of the layers that share it.
        level: width or precision.
    """

    kind: str
    names: tuple[str, ...]
    level: int | Precision

    def taken(self, widths: Widths) -> bool:
        """Whether a plan has it."""
        precision = widths[self.names[0]]
        if self.kind == "layer":
            return precision == self.level
        return self.level == (precision.weight if self.kind == "weights" else precision.activation)


class Beliefs:
    """What plans lose: ``base + sum over tensors of factor * loss``, the factors Gaussian.

    Before anything was measured they are 1, give or take what all weights (or inputs) share, what
    all of one width share, and what is the tensor's own. Linear regression with this prior
    (Rasmussen, Williams, "Gaussian Processes for Machine Learning", 2.1).

    Args:
        problem: layers, groups, ties.
        losses: what a search learned, in any unit.
        base: loss of the widest plan.
        unit: of the losses, in that of measured ones.
        trust: in what was learned; the rest is what such widths lose on the average.
    """

    def __init__(
        self,
        problem: Problem,
        losses: Losses,
        base: float,
        unit: float = 1.0,
        trust: float = 1.0,
    ) -> None:
        self._known, self._base = losses, base
        self._apart = all(all_pairs(row) for row in losses.values())
        self.parts = _parts(problem, losses, self._apart)
        known = [self._learned(part) for part in self.parts]
        self.prior = unit * _blended(self.parts, known, trust)
        self._labels = [
            (share, _numbered([key(part) for part in self.parts]))
            for share, key in (
                (KIND, lambda part: part.kind),
                (LEVEL, lambda part: (part.kind, part.level)),
                (OWN, lambda part: (part.kind, part.names)),
                (CELL, lambda part: part),
            )
        ]
        self._told: list[Array] = []
        self._measured: list[float] = []

    def tell(self, widths: Widths, loss: float) -> None:
        """A plan was measured."""
        self._told.append(self._losses_in(widths))
        self._measured.append(loss)

    def expected(self) -> Array:
        """What the plans that were told lose without the luck of a single measurement, float64."""
        found: Array = self._base + np.array(self._told) @ self.factors()
        return found

    def factors(self, rng: np.random.Generator | None = None) -> Array:
        """Of all parts, float64 [parts]: the most likely ones, or drawn near them."""
        plain = np.ones(len(self.parts))
        if not self._told:
            return plain if rng is None else plain + REACH * self._drawn(rng)
        told = np.array(self._told)
        error = NOISE * float(np.mean(np.abs(self._measured)))
        spread = self._covariance(told.T)
        inverse = np.linalg.pinv(told @ spread + error**2 * np.eye(len(told)))
        gain = spread @ inverse
        likely: Array = plain + gain @ (np.array(self._measured) - self._base - told @ plain)
        if rng is None:
            return likely
        # A draw of the prior, corrected by what it would have made of the measurements
        # (Matheron's rule), is one of the posterior.
        off = self._drawn(rng)
        off = off - gain @ (told @ off + error * rng.standard_normal(len(told)))
        found: Array = likely + REACH * off
        return found

    def losses(self, factors: Array) -> Losses:
        """Of all precisions, never falling as widths do."""
        values = (np.maximum(factors, LEAST_FACTOR) * self.prior).tolist()
        whole: dict[str, dict[Precision, float]] = {name: {} for name in self._known}
        tensors: dict[str, dict[str, dict[int, float]]] = {"weights": {}, "inputs": {}}
        for part, value in zip(self.parts, values, strict=True):
            for name in part.names:
                if isinstance(part.level, Precision):
                    whole[name][part.level] = value
                else:
                    row = tensors[part.kind].setdefault(name, {})
                    row[part.level] = value / len(part.names)
        if not self._apart:
            return whole
        weights, inputs = (
            {name: _rising(row) for name, row in kind.items()} for kind in tensors.values()
        )
        return {
            name: {p: weights[name][p.weight] + inputs[name][p.activation] for p in row}
            for name, row in self._known.items()
        }

    def _losses_in(self, widths: Widths) -> Array:
        found: Array = self.prior * np.array([part.taken(widths) for part in self.parts])
        return found

    def _learned(self, part: Part) -> float:
        """Over the widest; of a tensor the mean over the widths of the other one."""
        total = 0.0
        for name in part.names:
            row = self._known[name]
            if isinstance(part.level, Precision):
                total += row[part.level] - row[_widest(row)]
                continue
            found: dict[int, list[float]] = {}
            for p, loss in row.items():
                bits = p.weight if part.kind == "weights" else p.activation
                found.setdefault(bits, []).append(loss)
            total += float(np.mean(found[part.level]) - np.mean(found[max(found)]))
        return total

    def _covariance(self, vectors: Array) -> Array:
        """The prior's covariance times vectors [parts, n]."""
        total = np.zeros_like(vectors)
        for share, labels in self._labels:
            sums = np.zeros((int(labels.max(initial=0)) + 1, vectors.shape[1]))
            np.add.at(sums, labels, vectors)
            total += share**2 * sums[labels]
        return total

    def _drawn(self, rng: np.random.Generator) -> Array:
        """A draw of the prior, less its mean, [parts]."""
        total = np.zeros(len(self.parts))
        for share, labels in self._labels:
            total += share * rng.standard_normal(int(labels.max(initial=0)) + 1)[labels]
        return total


def measured_plan(
    problem: Problem, losses: Losses, count: int, measure: Measure, trust: float = 1.0
) -> dict[str, Precision]:
    """The plan that loses least, as far as measured plans tell.

    Measured are the plan of least learned loss, the widest uniform one that fits, the widest one
    of all (whether it fits or not, for the scale), and ``count`` more: in turns the one that is
    best by what is known, and one that is drawn near it, so that more gets known. The one that is
    then expected to lose least is taken: the least measurement alone would be in part luck.

    Args:
        problem: its seed draws.
        losses: layer -> precision -> learned loss.
        count: of plans measured beside those three, at most; 0: the plan of least learned loss,
            nothing is measured.
        measure: of a plan, maybe expensive.
        trust: in the learned losses, from 0 to 1; less for methods whose losses are noisy, so
            that a tensor that seems to lose nothing can be found to lose.
    """
    from mpqc.search import precisions

    learned = repair(problem, losses)
    if not count:
        return learned
    base = measure(problem.snap({name: _widest(row) for name, row in losses.items()}))
    tried = [learned]
    if even := widest_uniform(problem):
        tried.append(filled(problem, losses, precisions(even)))
    first = [measure(widths) for widths in tried]
    if not np.isfinite([base, *first]).all():
        return tried[int(np.argmin(first))]
    beliefs = Beliefs(problem, losses, base, trust=trust)
    whole = float(beliefs.prior @ [part.taken(learned) for part in beliefs.parts])
    unit = max(first[0] - base, NOISE * first[0]) / whole if whole > 0 and first[0] > 0 else 1.0
    beliefs = Beliefs(problem, losses, base, unit, trust)
    for widths, loss in zip(tried, first, strict=True):
        beliefs.tell(widths, loss)
    rng = np.random.default_rng([problem.seed, 6])
    for number in range(count):
        new = _next(problem, beliefs, tried, rng, number % 2 == 1)
        if new is None:
            break
        loss = measure(new)
        if np.isfinite(loss):
            tried.append(new)
            beliefs.tell(new, loss)
    return tried[int(np.argmin(beliefs.expected()))]


def _next(
    problem: Problem,
    beliefs: Beliefs,
    tried: list[dict[str, Precision]],
    rng: np.random.Generator,
    drawn: bool,
    attempts: int = 20,
) -> dict[str, Precision] | None:
    """A plan that was not tried; None: there seems to be none."""
    for attempt in range(attempts):
        factors = beliefs.factors(rng if drawn or attempt else None)
        widths = repair(problem, beliefs.losses(factors))
        if widths not in tried:
            return widths
    return None


def _parts(problem: Problem, losses: Losses, apart: bool) -> list[Part]:
    if not apart:
        return [Part("layer", (name,), p) for name, row in losses.items() for p in row]
    weights = [
        Part("weights", names, bits)
        for names in problem.weight_groups
        for bits in sorted({p.weight for p in losses[names[0]]})
    ]
    return weights + [
        Part("inputs", names, bits)
        for names in problem.groups
        for bits in sorted({p.activation for p in losses[names[0]]})
    ]


def _blended(parts: list[Part], losses: list[float], trust: float) -> Array:
    """Losses, mixed with what such widths lose on the average, of which each has a share."""
    level = {part: _power(part) for part in parts}
    wide: dict[tuple[str, tuple[str, ...]], float] = {}
    for part in parts:
        key = part.kind, part.names
        wide[key] = min(wide.get(key, np.inf), level[part])
    shape = np.array([level[part] - wide[part.kind, part.names] for part in parts])
    known = np.maximum(losses, 0.0)
    mean = known.sum() / shape.sum() if shape.sum() > 0 else 0.0
    if not mean > 0:
        return shape
    found: Array = np.maximum(trust * known, LEAST_LOSS * mean * shape)
    return found + (1 - trust) * mean * shape


def _power(part: Part) -> float:
    """Of quantization noise, about."""
    if isinstance(part.level, Precision):
        return float(4.0**-part.level.weight + 4.0**-part.level.activation)
    return float(4.0**-part.level)


def _rising(row: Mapping[int, float]) -> dict[int, float]:
    """Losses of the widths of a tensor: no narrower one loses less than a wider one."""
    found, most = {}, -np.inf
    for level in sorted(row, reverse=True):
        most = max(most, row[level])
        found[level] = most
    return found


def _widest(row: Mapping[Precision, float]) -> Precision:
    return max(row, key=lambda p: (p.weight + p.activation, p.weight))


def _numbered(labels: list[object]) -> Array:
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([number[label] for label in labels], dtype=np.int64)
