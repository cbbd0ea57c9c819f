"""DNAS: every precision of every layer has its operator; Gumbel-softmax masks mix them."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from mpqc.graph import Precision
from mpqc.search.cache import Ledger
from mpqc.search.dnas import Dnas
from mpqc.search.problem import Problem
from mpqc.search.repair import repair
from mpqc.search.scores import Scores
from mpqc.search.solve import Losses, cheapest
from mpqc.train.fake_quant import InputQuantizer, WeightQuantizer
from mpqc.train.loop import SMALLEST, Recipe, parameter_groups
from mpqc.train.module import LayerHook, Product
from mpqc.train.quantized_layer import Quantizers
from mpqc.train.search.base import Ground, learn, open_trainer, place
from mpqc.train.search.loop import Relaxation, Schedule
from mpqc.train.search.mixed_layer import gumbel_softmax, input_quantizers, mixed
from mpqc.train.search.pick import held_loss

Mask: TypeAlias = Callable[[], Tensor]
"""The mask of a layer as drawn last: float32 [precisions], sum 1."""

COOLED = 50.0  # the first temperature over the last


def learned(problem: Problem, method: Dnas) -> Scores:
    """Scores of a search: ``-log P`` of each precision."""
    schedule = Schedule(
        "epoch", method.weights_share, method.warmup, method.strength_lr or None, "adam",
        method.strength_decay,
    )  # fmt: skip
    return learn(
        problem, method, lambda ground: DnasRelaxation(ground, method), schedule,
        "negative logarithm of the probability",
    )  # fmt: skip


class SuperLayer(LayerHook):
    """``sum of m_k product(A_k(x), Q_k(w_k))`` over the precisions of a layer.

    The products are linear in the weights, so that all precisions of one activation width take
    one product of their mixed weights.

    Args:
        precisions: of the layer.
        mask: of them.
        inputs: quantizer of the input by activation width; layers that read a value share them.
        weights: quantizer of each precision.
        start: the weights, of which each precision gets a copy; None: they share the network's.
    """

    def __init__(
        self,
        precisions: Sequence[Precision],
        mask: Mask,
        inputs: Mapping[int, InputQuantizer],
        weights: Sequence[WeightQuantizer],
        start: Tensor | None,
    ) -> None:
        super().__init__()
        self.precisions, self.mask = tuple(precisions), mask
        self.widths = tuple(sorted({p.activation for p in precisions}))
        self.inputs = nn.ModuleList(inputs[bits] for bits in self.widths)
        self.weights = nn.ModuleList(weights)
        self.copies: nn.ParameterList | None = None
        if start is not None:
            self.copies = nn.ParameterList(start.detach().clone() for _ in precisions)

    def forward(self, product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        mask = self.mask()
        total: Tensor | None = None
        for bits, quantizer in zip(self.widths, self.inputs, strict=True):
            members = [i for i, p in enumerate(self.precisions) if p.activation == bits]
            if not mask.requires_grad and not bool(mask[members].any()):
                continue  # of a hard sample; only strengths need what is not chosen
            rows = [
                self.weights[i](weight if self.copies is None else self.copies[i]) for i in members
            ]
            made = product(quantizer(x), mixed(rows, mask[members]), None)
            total = made if total is None else total + made
        assert total is not None, "masks sum to one"
        if bias is None:
            return total
        # of a matrix product the channels are last
        shape = [1] * total.dim()
        shape[1 if weight.dim() > 2 else -1] = -1
        return total + bias.reshape(shape)


class Architectures:
    """Logits of precisions, and masks drawn from them.

    Layers that share an activation width draw it together, with the probability of all that
    their logits give to it, and then each its weight width.

    Args:
        problem: choices, groups, ties.
        device: of the logits.

    Attributes:
        logits: layer (of tied layers the first) -> parameter [precisions].
        masks: layer -> as drawn last.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.choices = problem.choices
        first = {name: tie[0] for tie in problem.ties for name in tie}
        self.key = {name: first.get(name, name) for name in problem.choices}
        self.logits = {
            name: nn.Parameter(torch.zeros(len(problem.choices[name]), device=device))
            for name in dict.fromkeys(self.key.values())
        }
        self._groups = [
            list(dict.fromkeys(self.key[name] for name in group)) for group in problem.groups
        ]
        self.masks: dict[str, Tensor] = {}
        self.draw(1.0, noisy=False)

    def draw(
        self, temperature: float, noisy: bool = True, hard: bool = False, fixed: bool = False
    ) -> None:
        """New masks.

        Args:
            temperature: of the Gumbel-softmax.
            noisy: with Gumbel noise, else the probabilities at this temperature.
            hard: one-hot forward, soft backward.
            fixed: without gradients.
        """
        found: dict[str, Tensor] = {}
        for group in self._groups:
            if len(group) == 1:
                key = group[0]
                found[key] = gumbel_softmax(self.logits[key], temperature, noisy, hard)
            else:
                found |= self._together(group, temperature, noisy, hard)
        if fixed:
            found = {key: mask.detach() for key, mask in found.items()}
        self.masks = {name: found[key] for name, key in self.key.items()}

    def _together(
        self, group: Sequence[str], temperature: float, noisy: bool, hard: bool
    ) -> dict[str, Tensor]:
        widths = sorted({p.activation for p in self.choices[group[0]]})
        total = torch.stack([self._width(group, bits) for bits in widths])
        shared = gumbel_softmax(total, temperature, noisy, hard)
        found = {}
        for key in group:
            mask = torch.zeros_like(self.logits[key])
            for share, bits in zip(shared, widths, strict=True):
                index = self._index(key, bits)
                part = gumbel_softmax(self.logits[key][index], temperature, noisy, hard) * share
                mask = mask.index_put((index,), part)
            found[key] = mask
        return found

    def _width(self, group: Sequence[str], bits: int) -> Tensor:
        parts = [self.logits[key][self._index(key, bits)].logsumexp(0) for key in group]
        return torch.stack(parts).sum()

    def _index(self, key: str, bits: int) -> Tensor:
        found = [i for i, p in enumerate(self.choices[key]) if p.activation == bits]
        return torch.tensor(found, device=self.logits[key].device)

    def losses(self) -> Losses:
        """``-log P`` of each precision; what layers share is shared out among them."""
        found: dict[str, dict[Precision, float]] = {}
        with torch.no_grad():
            for group in self._groups:
                widths = sorted({p.activation for p in self.choices[group[0]]})
                total = torch.stack([self._width(group, bits) for bits in widths])
                logs = dict(zip(widths, total.double().log_softmax(0).tolist(), strict=True))
                for key in group:
                    row = {}
                    for bits in widths:
                        index = self._index(key, bits)
                        part = self.logits[key][index].double().log_softmax(0).tolist()
                        for i, value in zip(index.tolist(), part, strict=True):
                            row[self.choices[key][i]] = -(value + logs[bits] / len(group))
                    found[key] = row
        count = {key: list(self.key.values()).count(key) for key in found}
        return {
            name: {p: found[key][p] / count[key] for p in self.choices[name]}
            for name, key in self.key.items()
        }


class DnasRelaxation(Relaxation):
    """The super-net.

    Args:
        ground: problem, trainer, network.
        method: options.

    Attributes:
        architectures: logits and masks.
    """

    name = "dnas"

    def __init__(self, ground: Ground, method: Dnas) -> None:
        self._ground, self._method = ground, method
        self.module = ground.module
        problem, space = ground.problem, ground.space
        device = next(self.module.parameters()).device
        self.architectures = Architectures(problem, device)
        kinds = Quantizers("dorefa", "pact") if method.quantizer == "dorefa" else Quantizers()
        data: dict[str, dict[int, InputQuantizer]] = {}
        for name, row in problem.choices.items():
            value = self.module.layers[name].input
            if value not in data:
                made = input_quantizers(ground, value, space.inputs[name], kinds)
                data[value] = dict(zip(space.inputs[name], made, strict=True))
            weight = self.module.weight(name).detach()
            hook = SuperLayer(
                row,
                lambda name=name: self.architectures.masks[name],  # type: ignore[misc]
                data[value],
                [kinds.weight(weight, p.weight) for p in row],
                None if method.share_weights or len(row) == 1 else weight,
            )
            self.module.hooks.put(name, hook.to(device))
        self._least, self._start = self._reference()

    def strengths(self) -> list[nn.Parameter]:
        return list(self.architectures.logits.values())

    def weight_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Copies learn at the rates of the weights that they are copies of."""
        copies: dict[int, list[nn.Parameter]] = {}
        known: set[int] = set()
        for name in self.module.hooks.names():
            for tensor in self.module.hooks.find(name).copies or ():
                size = max(float(tensor.detach().square().mean().sqrt()), SMALLEST * 0.1)
                copies.setdefault(round(math.log2(size)), []).append(tensor)
                known.add(id(tensor))
        groups = [
            group | {"params": [p for p in group["params"] if id(p) not in known]}
            for group in parameter_groups(self.module, recipe)
        ]
        return groups + [
            {"params": tensors, "lr": recipe.lr * 2.0**size, "weight_decay": recipe.weight_decay}
            for size, tensors in sorted(copies.items())
        ]

    def temperature(self, epoch: float) -> float:
        """``T0 exp(-eta epoch)``."""
        method, epochs = self._method, self._ground.trainer.recipe.epochs
        eta = method.cooling or math.log(COOLED) / epochs
        return max(method.temperature * math.exp(-eta * epoch), 1e-3)

    def draw(self, epoch: float) -> None:
        self.architectures.draw(
            self.temperature(epoch), hard=self._method.hard_sample, fixed=not self.learning
        )

    def shares(self) -> dict[str, Tensor]:
        """Layer -> mask as drawn last, over its pairs of widths."""
        space, found = self._ground.space, {}
        for name, row in self._ground.problem.choices.items():
            mask = self.architectures.masks[name]
            grid = mask.new_zeros(len(space.weights[name]), len(space.inputs[name]))
            where = (
                torch.tensor([space.weights[name].index(p.weight) for p in row]),
                torch.tensor([space.inputs[name].index(p.activation) for p in row]),
            )
            found[name] = grid.index_put(tuple(index.to(mask.device) for index in where), mask)
        return found

    def objective(self, loss: Tensor) -> Tensor:
        costs, method = self._ground.costs, self._method
        shares = self.shares()
        if method.cost == "budget":
            return loss * (1 + method.price * costs.excess(shares))
        for name, least in self._least.items():
            scale = self._log(costs.expected(shares, name), least) / self._start[name]
            loss = loss * scale.pow(method.gamma).float()
        return loss

    def _reference(self) -> tuple[dict[str, float], dict[str, float]]:
        """Least costs, and the logarithms with which the search starts, so that C is 1 there."""
        problem, costs = self._ground.problem, self._ground.costs
        names = list(problem.budgets) or ["bitops"]
        least = {name: problem.cost(cheapest(problem, name), name) for name in names}
        with torch.no_grad():
            shares = self.shares()
            start = {n: float(self._log(costs.expected(shares, n), least[n])) for n in names}
        return least, start

    @staticmethod
    def _log(cost: Tensor, least: float) -> Tensor:
        """Of the cost in units of which the cheapest plan costs e: never below 1."""
        return (cost / max(least, 1e-300)).log() + 1

    def losses(self) -> Losses:
        return self.architectures.losses()


def chosen(problem: Problem, method: Dnas, scores: Scores) -> dict[str, Precision]:
    """The best after short training: of the most probable plan and of some that were drawn.

    All of them keep the budgets: where a drawn one does not, the knapsack over its perturbed
    logarithms repairs it.
    """
    plans = drawn(problem, scores.losses, method.samples)
    if len(plans) == 1:
        return plans[0]
    trainer = open_trainer(problem, method.name())
    path, _ = place(problem, trainer, method)
    known = Ledger(None if path is None else path.with_suffix(".samples.jsonl"))
    teacher = trainer.teacher()
    best: tuple[float, dict[str, Precision]] | None = None
    for number, widths in enumerate(plans):
        name = json.dumps([str(precision) for precision in widths.values()])
        if name not in known:
            problem.progress("dnas, architectures", number, len(plans))
            module = trainer.network(trainer.plan(widths), trainer.checkpoint)
            trainer.fit(module, method.short, teacher)
            known[name] = held_loss(trainer, module, teacher)
        if best is None or known[name] < best[0]:
            best = known[name], widths
    assert best is not None
    return best[1]


def drawn(problem: Problem, losses: Losses, count: int) -> list[dict[str, Precision]]:
    """Different plans under the budgets: the most probable one, then some with Gumbel noise.

    Args:
        problem: its seed draws.
        losses: ``-log P``.
        count: of drawn ones, at most.
    """
    plans = [repair(problem, losses)]
    rng = np.random.default_rng([problem.seed, 5])
    for _ in range(count):
        noisy = {
            name: {p: loss - float(rng.gumbel()) for p, loss in row.items()}
            for name, row in losses.items()
        }
        widths = repair(problem, noisy)
        if widths not in plans:
            plans.append(widths)
    return plans
