"""exchange: bits change places between layers as long as the whole network gains."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from mpqc.errors import BudgetError, UsageError
from mpqc.graph import Precision
from mpqc.passes.measure_exchange import Exchanges, measure_exchange
from mpqc.passes.measure_perturbation import Metric
from mpqc.plan import Plan
from mpqc.search.base import Search
from mpqc.search.cache import ledger
from mpqc.search.confirm import ACCURACY, SAMPLES, Judge, digest, judge
from mpqc.search.problem import Problem
from mpqc.search.sensitivity import Sensitivity, check_samples
from mpqc.search.solve import solve
from mpqc.search.uniform import Uniform

METRIC: Metric = "sqnr"
REACH = 2  # candidates to each side of a width that a round may go
PRICES = (0.0, 0.01, 0.03)  # of a change, relative to the loss of the plan
SPREAD = 0.3  # of the logarithms of what scores are multiplied by, to find neighbours


@dataclass(frozen=True)
class Exchange(Search):
    """Local search from the best known plan, judged by whole quantized networks.

    Attributes:
        samples: of the data, to compare outputs on, at most.
        rounds: times that scores are measured around the best plan.
        builds: networks that are quantized and compared in a round.
    """

    needs = frozenset({"data"})

    samples: int = SAMPLES
    rounds: int = 2
    builds: int = 12

    def __post_init__(self) -> None:
        check_samples("exchange", self.samples)
        for name in ("rounds", "builds"):
            if getattr(self, name) < 1:
                raise UsageError(f"exchange: {name} is at least 1, got {getattr(self, name)}")

    def __call__(self, problem: Problem) -> Plan:
        noise = judge(problem, self.samples)
        found = _Found(problem, noise, 2 + self.rounds * self.builds)
        found.take(Sensitivity().plan(problem, Sensitivity().scores(problem)))
        with suppress(BudgetError):  # mixed plans reach narrower budgets
            found.take(Uniform()(problem))
        for number in range(self.rounds):
            center = found.best
            around = self._measured(problem, noise, center)
            for widths in _neighbours(problem, center, around, number, self.builds):
                found.take(problem.plan(widths, "exchange"))
            if found.best is center:
                break
        widths = {n: Precision(p.widest, p.activation_bits) for n, p in found.best.layers.items()}
        return problem.plan(widths, "exchange")

    def _measured(self, problem: Problem, noise: Judge, center: Plan) -> Exchanges:
        layers = {layer.name: layer for layer in problem.layers}
        weights = {name: _near(problem, center, name, "weight") for name in layers}
        activations = {
            layers[name].input: sorted(
                set.intersection(*(set(_near(problem, center, n, "activation")) for n in group))
            )
            for group in problem.groups
            for name in group
        }
        return measure_exchange(
            noise.graph,
            center,
            noise.rounded_on,
            noise.scored,
            noise.calibration,
            weights,
            activations,
            accuracy=ACCURACY,
            metric=METRIC,
            seed=problem.seed,
            known=ledger(
                problem, problem.data, "exchange", digest(center), problem.seed, self.samples,
                ACCURACY,
            ),
            progress=problem.progress,
        )  # fmt: skip


class _Found:
    """The plan of least noise so far; of equal ones the first."""

    def __init__(self, problem: Problem, noise: Judge, most: int) -> None:
        self._problem, self._judge, self._most = problem, noise, most
        self._done = 0
        self._least = np.inf

    def take(self, plan: Plan) -> None:
        noise = self._judge(plan)
        if noise < self._least:
            self.best, self._least = plan, noise
        self._done += 1
        self._problem.progress("quantize and compare", self._done, self._most)


def _near(problem: Problem, center: Plan, name: str, key: str) -> list[int]:
    """Candidates near the layer's width of weights or activations, that one left out."""
    own = getattr(center.layers[name], f"{key}_bits")
    widths = sorted({getattr(choice, key) for choice in problem.choices[name]})
    place = widths.index(own)
    return [w for w in widths[max(0, place - REACH) : place + REACH + 1] if w != own]


def _neighbours(
    problem: Problem, center: Plan, around: Exchanges, number: int, most: int
) -> Iterator[dict[str, Precision]]:
    """Different plans that should lose less than the center, the most promising first."""
    random = np.random.default_rng([problem.seed, number])
    seen = {digest(center)}
    made = 0
    for attempt in range(4 * most):
        if attempt < len(PRICES):
            price, spread = PRICES[attempt], 0.0
        else:
            price, spread = PRICES[attempt % len(PRICES)], SPREAD
        widths = solve(problem, _losses(problem, center, around, price, spread, random))
        name = digest(problem.plan(widths, "exchange"))
        if name in seen:
            continue
        seen.add(name)
        yield widths
        made += 1
        if made == most:
            return


def _losses(
    problem: Problem,
    center: Plan,
    around: Exchanges,
    price: float,
    spread: float,
    random: np.random.Generator,
) -> dict[str, dict[Precision, float]]:
    """What each layer adds to the loss of the center, about."""

    def change(own: int, row: Mapping[int, float]) -> dict[int, float]:
        factors = np.exp(random.normal(0.0, spread, len(row))) if spread else np.ones(len(row))
        return {own: 0.0} | {
            bits: (loss - around.plan) * float(factor) + price * around.plan
            for (bits, loss), factor in zip(sorted(row.items()), factors, strict=True)
        }

    of_inputs: dict[str, dict[int, float]] = {}
    readers: dict[str, int] = {}
    for layer in problem.layers:
        readers[layer.input] = readers.get(layer.input, 0) + 1
        if layer.input not in of_inputs:
            own = center.layers[layer.name].activation_bits
            of_inputs[layer.input] = change(own, around.activations[layer.input])
    losses = {}
    for layer in problem.layers:
        of_weights = change(center.layers[layer.name].widest, around.weights[layer.name])
        of_input = of_inputs[layer.input]
        losses[layer.name] = {
            choice: of_weights[choice.weight] + of_input[choice.activation] / readers[layer.input]
            for choice in problem.choices[layer.name]
            if choice.weight in of_weights and choice.activation in of_input
        }
    return losses
