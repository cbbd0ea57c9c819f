"""FracBits: each width is a real number; between two candidates their quantizers are mixed."""

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpqc.graph import Precision
from mpqc.passes.find_layers import last_layers
from mpqc.search.fracbits import FracBits, FracScores
from mpqc.search.problem import Problem
from mpqc.search.scores import Scores
from mpqc.search.solve import Losses
from mpqc.train.fake_quant import InputQuantizer, WeightQuantizer
from mpqc.train.module import LayerHook, Product
from mpqc.train.quantized_layer import Quantizers
from mpqc.train.search.base import Ground, learn, open_trainer, place
from mpqc.train.search.costs import LEAST_PRICE, joint, rounded
from mpqc.train.search.loop import Relaxation, Schedule
from mpqc.train.search.mixed_layer import input_quantizers

LEAST_REST = 0.25  # on the way to the next candidate, where losses follow from it


def learned(problem: Problem, method: FracBits) -> Scores:
    """Scores of a search; see ``learn``. What channels learned is kept beside the losses."""
    made: list[FracRelaxation] = []

    def make(ground: Ground) -> FracRelaxation:
        made.append(FracRelaxation(ground, method))
        return made[0]

    path, _ = place(problem, open_trainer(problem, method.name()), method)
    beside = None if path is None else path.with_suffix(".json")
    if path is not None and beside is not None and not beside.exists():
        with contextlib.suppress(OSError):  # a process may die between the two files
            path.with_suffix(".jsonl").unlink()
    schedule = Schedule("both", warmup=method.warmup, lr=method.width_lr or None)
    scores = learn(problem, method, make, schedule, "loss, in shares of budgets")
    if made:
        state: dict[str, Any] = made[0].widths()
        if beside is not None:
            with contextlib.suppress(OSError):
                beside.write_text(json.dumps(state), "utf-8")
    else:
        assert beside is not None
        state = json.loads(beside.read_text("utf-8"))
    return FracScores(
        scores.losses, scores.unit,
        {name: tuple(row) for name, row in state["weights"].items()},
        state["prices"], frozenset(state["pruned"]),
    )  # fmt: skip


def neighbours(width: Tensor, ladder: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Index of the candidate below each width, and how far it is on the way to the next.

    At a candidate the pair is it and the next wider, not twice itself: so the width keeps its
    gradient there. At the widest it is the one before, and the way is 1.

    Args:
        width: float32 [n], within the ladder.
        ladder: candidates, rising.
    """
    steps = torch.tensor(ladder, dtype=width.dtype, device=width.device)
    if len(ladder) == 1:
        return torch.zeros_like(width, dtype=torch.long), torch.zeros_like(width)
    below = torch.searchsorted(steps, width.detach(), right=True) - 1
    below = below.clamp(0, len(ladder) - 2)
    return below, (width - steps[below]) / (steps[below + 1] - steps[below])


def shares_of(width: Tensor, ladder: Sequence[int]) -> Tensor:
    """Shares of all candidates, float32 [n, candidates]: of the two neighbours, else 0."""
    below, way = neighbours(width, ladder)
    shares = torch.zeros(len(width), len(ladder), dtype=width.dtype, device=width.device)
    rows = torch.arange(len(width), device=width.device)
    if len(ladder) == 1:
        return shares + 1
    return shares.index_put((rows, below), 1 - way).index_put((rows, below + 1), way)


class Fraction:
    """A learned width, or one for each output channel.

    Args:
        ladder: candidates, rising.
        count: widths.
        device: of the parameter.

    Attributes:
        value: parameter [count].
        shares: of the candidates, [count, candidates], as drawn last.
    """

    def __init__(self, ladder: Sequence[int], count: int, device: torch.device) -> None:
        self.ladder = tuple(ladder)
        self.value = nn.Parameter(torch.full((count,), float(self.ladder[0]), device=device))
        self.shares = torch.zeros(0)
        self.used: tuple[int, ...] = ()
        self.draw()

    def set(self, width: float) -> None:
        """All of them, as near as the candidates reach."""
        with torch.no_grad():
            self.value.fill_(width)
        self.draw()

    def draw(self) -> None:
        """Back into the range of the candidates, then new shares."""
        with torch.no_grad():
            self.value.clamp_(self.ladder[0], self.ladder[-1])
        self.shares = shares_of(self.value, self.ladder)
        below = neighbours(self.value, self.ladder)[0].detach()
        near = torch.cat([below, (below + 1).clamp(max=len(self.ladder) - 1)])
        self.used = tuple(sorted(set(near.tolist())))


def lost(fraction: Fraction, price: float) -> dict[int, float]:
    """Loss of each candidate, in shares of the budgets, where widths have come to rest.

    Between candidates b and b' the coarser quantizer's error counts (1 - f)-fold, and errors of
    the finer one are hardly correlated with the rest of it: so the loss falls by
    D (1 - f) / (b' - b) a bit, D the difference of the errors' powers. At rest that is the price
    of a bit. One width instead of the other gains half of D, and the powers fall as 4^-b over all
    candidates.

    Args:
        fraction: learned width, or one a channel, whose mean loss counts.
        price: of a bit, in shares of the budgets.
    """
    ladder = fraction.ladder
    if len(ladder) == 1:
        return {ladder[0]: 0.0}
    below, way = neighbours(fraction.value.detach().double(), ladder)
    steps = torch.tensor(ladder, dtype=way.dtype, device=way.device)
    noise = 4.0**-steps
    power = price * (steps[below + 1] - steps[below]) / (1 - way).clamp_min(LEAST_REST)
    each = float((power / (noise[below] - noise[below + 1])).mean())
    return {b: each * (4.0**-b - 4.0 ** -ladder[-1]) / 2 for b in ladder}


class FracInput(nn.Module):
    """``f Q_above(x) + (1 - f) Q_below(x)``.

    Args:
        quantizers: one a candidate.
        width: of the input.
    """

    def __init__(self, quantizers: Sequence[InputQuantizer], width: Fraction) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        shares = self.width.shares[0]
        parts = [self.quantizers[i](x) * shares[i] for i in self.width.used]
        return sum(parts[1:], parts[0])


class FracLayer(LayerHook):
    """A layer of fractional widths: one product, of interpolated weights and inputs.

    Args:
        weights: quantizers, one a candidate above 0.
        width: of the weights, or of each output channel; candidate 0 is all zeros.
        data: of the input; layers that read one value share it.
    """

    def __init__(self, weights: Sequence[WeightQuantizer], width: Fraction, data: FracInput):
        super().__init__()
        self.weights = nn.ModuleList(weights)
        self.width = width
        self.data = data

    def forward(self, product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(self.data(x), self.interpolated(weight), bias)

    def interpolated(self, weight: Tensor) -> Tensor:
        """Weights between their neighbours, output channels first."""
        width, zero = self.width, int(self.width.ladder[0] == 0)
        shape = (-1, *[1] * (weight.dim() - 1))
        total = torch.zeros_like(weight)
        for index in width.used:
            if index >= zero:
                share = width.shares[:, index].reshape(shape)
                total = total + self.weights[index - zero](weight) * share
        return total


class FracRelaxation(Relaxation):
    """The network with fractional widths.

    Args:
        ground: problem, trainer, network.
        method: options.

    Attributes:
        weights: widths of weights by layer (or the first of a tie).
        inputs: widths of activations by the first layer of a group.
    """

    name = "fracbits"

    def __init__(self, ground: Ground, method: FracBits) -> None:
        self._ground, self._method = ground, method
        self.module = ground.module
        space, names = ground.space, list(ground.problem.choices)
        device = next(self.module.parameters()).device
        self._pruned = self._prunable() if method.prune else frozenset[str]()
        self.weights: dict[str, Fraction] = {}
        self.inputs: dict[str, Fraction] = {}
        for name in names:
            key = space.weight_key[name]
            if key not in self.weights:
                zero = [0] if name in self._pruned else []
                count = self._count(key)
                self.weights[key] = Fraction([*zero, *space.weights[name]], count, device)
            key = space.input_key[name]
            if key not in self.inputs:
                self.inputs[key] = Fraction(space.inputs[name], 1, device)
        kinds = Quantizers("dorefa", "pact") if method.quantizer == "dorefa" else Quantizers()
        data: dict[str, FracInput] = {}
        for name in names:
            value = self.module.layers[name].input
            if value not in data:
                made = input_quantizers(ground, value, space.inputs[name], kinds, shared=True)
                data[value] = FracInput(made, self.inputs[space.input_key[name]])
            weight = self.module.weight(name).detach()
            hook = FracLayer(
                [kinds.weight(weight, bits) for bits in space.weights[name]],
                self.weights[space.weight_key[name]],
                data[value],
            )
            self.module.hooks.put(name, hook.to(device))
        self._start(method.start)

    def strengths(self) -> list[nn.Parameter]:
        return [fraction.value for fraction in (*self.weights.values(), *self.inputs.values())]

    def draw(self, epoch: float) -> None:
        for fraction in (*self.weights.values(), *self.inputs.values()):
            fraction.draw()

    def shares(self) -> dict[str, Tensor]:
        """Layer -> shares of its pairs of widths: of the neighbours, exactly bilinear."""
        space = self._ground.space
        return {
            name: joint(
                self.weights[space.weight_key[name]].shares[:, -len(space.weights[name]) :],
                self.inputs[space.input_key[name]].shares[0],
            )
            for name in self._ground.problem.choices
        }

    def dearest(self) -> Tensor:
        """The largest of expected cost over budget; 1 without budgets."""
        costs, shares = self._ground.costs, self.shares()
        parts = [costs.expected(shares, name) / limit for name, limit in costs.budgets.items()]
        return torch.stack(parts).max() if parts else torch.ones(())

    def objective(self, loss: Tensor) -> Tensor:
        return loss + self._method.price * rounded(self.dearest() - 1).float()

    def losses(self) -> Losses:
        """What each width loses, from where widths came to rest; see ``lost``."""
        space, problem = self._ground.space, self._ground.problem
        weights, inputs = self._prices()
        sizes: dict[str, dict[str, int]] = {"weight": {}, "input": {}}
        for name in problem.choices:
            for kind, key in (("weight", space.weight_key), ("input", space.input_key)):
                sizes[kind][key[name]] = sizes[kind].get(key[name], 0) + 1
        own = {key: lost(part, weights[key]) for key, part in self.weights.items()}
        shared = {key: lost(part, inputs[key]) for key, part in self.inputs.items()}
        found: dict[str, dict[Precision, float]] = {}
        for name, row in problem.choices.items():
            first, group = space.weight_key[name], space.input_key[name]
            found[name] = {
                p: own[first][p.weight] / sizes["weight"][first]
                + shared[group][p.activation] / sizes["input"][group]
                for p in row
            }
        return found

    def widths(self) -> dict[str, Any]:
        """What was learned, as JSON takes it."""
        space, names = self._ground.space, self._ground.problem.choices
        prices, _ = self._prices()
        return {
            "weights": {n: self.weights[space.weight_key[n]].value.detach().tolist()
                        for n in names},
            "inputs": {n: float(self.inputs[space.input_key[n]].value.detach()) for n in names},
            "prices": {n: prices[space.weight_key[n]] for n in names},
            "pruned": sorted(self._pruned),
        }  # fmt: skip

    def _prices(self) -> tuple[dict[str, float], dict[str, float]]:
        """What a bit of each tensor takes of the budgets: by weight and by input variable."""
        self.draw(0.0)
        tensors = self.strengths()
        total = sum(
            (self._ground.costs.expected(self.shares(), name) / limit
             for name, limit in self._ground.costs.budgets.items()),
            torch.zeros((), dtype=torch.float64, device=tensors[0].device),
        )  # fmt: skip
        grads: Sequence[Tensor | None] = [None] * len(tensors)
        if total.requires_grad:
            grads = torch.autograd.grad(total, tensors, allow_unused=True)
        found = [0.0 if g is None else abs(float(g.double().sum())) for g in grads]
        least = LEAST_PRICE * (max(found, default=0.0) or 1.0)
        prices = [max(price, least) for price in found]
        split = len(self.weights)
        return (
            dict(zip(self.weights, prices[:split], strict=True)),
            dict(zip(self.inputs, prices[split:], strict=True)),
        )

    def _count(self, key: str) -> int:
        """Widths of a weight tensor: one, or its output channels."""
        space = self._ground.space
        tied = [name for name, first in space.weight_key.items() if first == key]
        channels = {self._ground.problem.layer(name).channels_out for name in tied}
        several = len(space.weights[key]) > 1 and len(channels) == 1
        return channels.pop() if self._method.granularity == "kernel" and several else 1

    def _prunable(self) -> frozenset[str]:
        """Layers that are searched and whose outputs are not the network's."""
        space, keep = self._ground.space, set(last_layers(self._ground.trainer.flat))
        names = [n for n in self._ground.problem.choices if len(space.weights[n]) > 1]
        lost = {
            key for n in names if n in keep or self._count(key := space.weight_key[n]) == 1
        }  # fmt: skip
        return frozenset(n for n in names if space.weight_key[n] not in lost)

    def _start(self, above: float) -> None:
        """All widths ``above`` that at which all together just keep the budgets."""
        every = [*self.weights.values(), *self.inputs.values()]
        low, high = 0.0, 8.0
        for _ in range(30):
            middle = (low + high) / 2
            for fraction in every:
                fraction.set(middle)
            over = bool(self.dearest().detach() > 1) and bool(self._ground.costs.budgets)
            low, high = (low, middle) if over else (middle, high)
        for fraction in every:
            fraction.set(low + above)
