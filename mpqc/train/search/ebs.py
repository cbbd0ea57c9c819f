"""EBS: one set of meta weights, quantized at every width and mixed by strengths."""

from typing import Any

from torch import Tensor, nn

from mpqc.graph import Precision
from mpqc.search.ebs import Ebs
from mpqc.search.problem import Problem
from mpqc.search.scores import Scores
from mpqc.search.solve import Losses
from mpqc.train.quantized_layer import Quantizers
from mpqc.train.search.base import Ground, learn
from mpqc.train.search.costs import joint
from mpqc.train.search.loop import Relaxation, Schedule
from mpqc.train.search.mixed_layer import MixedInput, MixedLayer, Strengths, input_quantizers

COOLING = 10.0  # the last temperature of stochastic strengths is the first over this


def learned(problem: Problem, method: Ebs) -> Scores:
    """Scores of a search; see ``learn``."""
    schedule = Schedule(
        "both" if method.level == "one" else "step", method.weights_share, method.warmup,
        method.strength_lr or None, method.strength_optimizer,
    )  # fmt: skip
    return learn(problem, method, lambda ground: EbsRelaxation(ground, method), schedule)


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
        """``-log p`` of the weight width and of the activation width.

        A tensor that several layers share counts once: its loss is shared out among them.
        """
        space, problem = self._ground.space, self._ground.problem
        keys = (space.weight_key, space.input_key)
        sizes: list[dict[str, int]] = [{}, {}]
        for size, key in zip(sizes, keys, strict=True):
            for name in problem.choices:
                size[key[name]] = size.get(key[name], 0) + 1
        found: dict[str, dict[Precision, float]] = {}
        for name, row in problem.choices.items():
            parts: list[dict[int, float]] = []
            tensors: tuple[Any, ...] = (
                (self.weights, space.weights[name]), (self.inputs, space.inputs[name])
            )  # fmt: skip
            for (strengths, widths), key, size in zip(tensors, keys, sizes, strict=True):
                logs = strengths.log(key[name])
                parts.append({b: -p / size[key[name]] for b, p in zip(widths, logs, strict=True)})
            found[name] = {p: parts[0][p.weight] + parts[1][p.activation] for p in row}
        return found
