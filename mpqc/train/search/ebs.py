"""EBS: one set of meta weights, quantized at every width and mixed by strengths."""

import torch
from torch import Tensor, nn

from mpqc.graph import Precision
from mpqc.search.ebs import Ebs
from mpqc.search.problem import Problem
from mpqc.search.scores import Scores
from mpqc.search.solve import Losses
from mpqc.train.quantized_layer import Quantizers
from mpqc.train.search.base import Ground, learn
from mpqc.train.search.costs import LEAST_PRICE, joint
from mpqc.train.search.loop import Relaxation, Schedule
from mpqc.train.search.mixed_layer import MixedInput, MixedLayer, Strengths, input_quantizers

COOLING = 10.0  # the last temperature of stochastic strengths is the first over this
STEEPEST = 4.0  # of the logits at the start, a bit
LEAST_SHARE = 1e-3  # of narrower widths, where losses follow from shares


def learned(problem: Problem, method: Ebs) -> Scores:
    """Scores of a search; see ``learn``."""
    schedule = Schedule(
        "both" if method.level == "one" else "step", method.weights_share, method.warmup,
        method.strength_lr or None, method.strength_optimizer,
    )  # fmt: skip
    unit = "loss, in shares of budgets"
    if not balances(problem, method):
        unit = "negative logarithm of the strength"
    return learn(problem, method, lambda ground: EbsRelaxation(ground, method), schedule, unit)


def balances(problem: Problem, method: Ebs) -> bool:
    """Whether losses follow from where loss and price came to rest."""
    return method.choice == "balance" and bool(problem.budgets)


class EbsRelaxation(Relaxation):
    """The network with mixed layers.

    Args:
        ground: problem, trainer, network.
        method: options.

    Attributes:
        weights: strengths of weight widths, by layer (or the first of a tie).
        inputs: strengths of activation widths, by the first layer of a group.
    """

    name = "ebs"

    def __init__(self, ground: Ground, method: Ebs) -> None:
        self._ground, self._method = ground, method
        self.module = ground.module
        space, names = ground.space, list(ground.problem.choices)
        device = next(self.module.parameters()).device
        self.weights = Strengths(
            {space.weight_key[n]: len(space.weights[n]) for n in names}, device
        )
        self.inputs = Strengths({space.input_key[n]: len(space.inputs[n]) for n in names}, device)
        kinds = Quantizers("dorefa", "pact") if method.quantizer == "dorefa" else Quantizers()
        data: dict[str, MixedInput] = {}
        for name in names:
            value = self.module.layers[name].input
            if value not in data:
                made = input_quantizers(
                    ground, value, space.inputs[name], kinds, method.alpha == "shared"
                )
                data[value] = MixedInput(made, self.inputs.find(space.input_key[name]))
            weight = self.module.weight(name).detach()
            hook = MixedLayer(
                [kinds.weight(weight, bits) for bits in space.weights[name]],
                self.weights.find(space.weight_key[name]),
                data[value],
            )
            self.module.hooks.put(name, hook.to(device))
        if method.start == "budget":
            self._start()

    def strengths(self) -> list[nn.Parameter]:
        return [*self.weights, *self.inputs]

    def draw(self, epoch: float) -> None:
        noisy = self._method.strengths == "stochastic"
        done = min(1.0, epoch / self._ground.trainer.recipe.epochs)
        temperature = self._method.temperature * COOLING**-done if noisy else 1.0
        self.weights.draw(temperature, noisy)
        self.inputs.draw(temperature, noisy)

    def shares(self) -> dict[str, Tensor]:
        """Layer -> shares of its pairs of widths, as drawn last."""
        space = self._ground.space
        return {
            name: joint(
                self.weights.shares[space.weight_key[name]],
                self.inputs.shares[space.input_key[name]],
            )
            for name in self._ground.problem.choices
        }

    def objective(self, loss: Tensor) -> Tensor:
        return loss + self._method.price * self._ground.costs.excess(self.shares())

    def losses(self) -> Losses:
        """What each width loses; a tensor that several layers share, shares its loss out."""
        space, problem = self._ground.space, self._ground.problem
        parts = self._balanced() if balances(problem, self._method) else self._likeliest()
        keys = (space.weight_key, space.input_key)
        sizes: list[dict[str, int]] = [{}, {}]
        for size, key in zip(sizes, keys, strict=True):
            for name in problem.choices:
                size[key[name]] = size.get(key[name], 0) + 1
        found: dict[str, dict[Precision, float]] = {}
        for name, row in problem.choices.items():
            rows = []
            for part, key, size, widths in zip(
                parts, keys, sizes, (space.weights[name], space.inputs[name]), strict=True
            ):
                each = [loss / size[key[name]] for loss in part[key[name]]]
                rows.append(dict(zip(widths, each, strict=True)))
            found[name] = {p: rows[0][p.weight] + rows[1][p.activation] for p in row}
        return found

    def _likeliest(self) -> tuple[dict[str, list[float]], ...]:
        """``-log p`` of weight and of activation widths, by variable."""
        return tuple(
            {key: [-p for p in part.log(key)] for key in part.logits}
            for part in (self.weights, self.inputs)
        )

    def _balanced(self) -> tuple[dict[str, list[float]], ...]:
        """Losses of single widths, from mixtures that have come to rest.

        Let e_i be the error of Q_i. Errors of a finer width are hardly correlated with the rest
        of those of a coarser one, so the loss, quadratic in the error of the mixture, has the
        slope P_i D_i when a share goes from width i to the next wider: D_i is the difference of
        their powers, P_i the share of all widths up to i. Where training rests, that is the price
        c_i of the bits. One width instead of the other gains half of D_i: c_i / (2 P_i).
        """
        for part in (self.weights, self.inputs):
            part.draw()
        costs = self._ground.costs
        shares = [part.shares for part in (self.weights, self.inputs)]
        total = torch.stack(
            [costs.expected(self.shares(), name) / limit for name, limit in costs.budgets.items()]
        ).sum()
        flat = [share for part in shares for share in part.values()]
        grads = iter(torch.autograd.grad(total, flat, allow_unused=True))
        prices = [
            {key: torch.zeros_like(share) if (grad := next(grads)) is None else grad
             for key, share in part.items()}
            for part in shares
        ]  # fmt: skip
        steps = [
            {key: row.double().diff().tolist() for key, row in part.items()} for part in prices
        ]
        every = [step for part in steps for row in part.values() for step in row]
        least = LEAST_PRICE * (max(every, default=0.0) or 1.0)
        found: list[dict[str, list[float]]] = []
        for drawn, step in zip(shares, steps, strict=True):
            found.append({})
            for key, share in drawn.items():
                below = share.detach().double().cumsum(0).clamp_min(LEAST_SHARE).tolist()
                loss = [0.0]
                for price, reached in reversed(list(zip(step[key], below, strict=False))):
                    loss.append(loss[-1] + max(price, least) / (2 * reached))
                found[-1][key] = loss[::-1]
        return tuple(found)

    def _start(self) -> None:
        """Logits that fall (or rise) with the width, until expected costs meet the budgets.

        Of all shares with such a mean width the most even ones.
        """
        costs, space = self._ground.costs, self._ground.space
        widths = (
            {key: space.weights[key] for key in self.weights.logits},
            {key: space.inputs[key] for key in self.inputs.logits},
        )

        def dearest(slope: float) -> float:
            with torch.no_grad():
                for part, known in zip((self.weights, self.inputs), widths, strict=True):
                    for key, logits in part.logits.items():
                        bits = torch.tensor(known[key], dtype=logits.dtype, device=logits.device)
                        logits.copy_(slope * (bits - bits.mean()))
                    part.draw()
                return max(
                    float(costs.expected(self.shares(), name)) / limit
                    for name, limit in costs.budgets.items()
                )

        if not costs.budgets:
            return
        low, high = -STEEPEST, STEEPEST
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if dearest(middle) > 1 else (middle, high)
        dearest(low)
        for part in (self.weights, self.inputs):
            part.draw()
