"""Training: float graphs as torch modules, quantizers that learn, fine-tuning. ``mpqc[train]``.

This package is the door to PyTorch; nothing else of mpqc imports it, and it is imported only
where something is trained. The parts, in the order in which a search that trains uses them::

    graph = load_graph("model.onnx")               # static shapes, BatchNorm kept, pads folded
    module = GraphModule(graph)                    # any network: an interpreter, weights learned
    module.layers["conv1"]                         # find_layers' Layer: macs, weights, input
    y = module({"input": x})["logits"]             # first axis: any multiple of the graph's batch

``module.hooks.put(name, hook)`` replaces what a layer computes. A hook is a ``LayerHook``, whose
``forward(product, x, weight, bias)`` gets the layer's input, its weights with the output channels
first, its bias, and ``product(x, weight, bias)``, the convolution or matrix product itself, to be
called as often as wanted and with any operands of those shapes. So

- one set of weights at mixed widths (EBS, FracBits) is
  ``product(mixed_input(x), sum(p * q(weight) for p, q in ...), bias)``;
- a super-net (DNAS) keeps copies of the weights in the hook and returns
  ``sum(m * product(a(x), q(w), bias) for ...)``;
- quantizers are those of ``fake_quant``: ``LsqWeights``, ``DoReFaWeights`` (original, modified,
  centered, SAT rescaling), ``LsqInput``, ``PactInput``, and the functions below them (``lsq``,
  ``to_integers``, ``straight_through``). Widths may differ by channel; width 0 is zero.

Layers that read one value share its width: keep one input quantizer for each
``module.layers[name].input`` and give it to all of them. Parameters of hooks are found by
``module.hooks.parameters()``, the network's own by ``module.learned()``, an important difference
where both have their own optimizer.

``quantize_module(module, plan, calibration, rounded, quantizers)`` attaches ``QuantizedLayer``
hooks for a plan; with what ``round_layers`` found the module starts exactly where training-free
quantization ends. In evaluation mode such layers compute what the compiled network does, bit for
bit: codes, integer sums, one multiplication and addition in float32, BatchNorm folded in. Hooks
whose ``rounded`` is None (mixtures) compute in evaluation as in training.

``module.rounded()`` is the result for the compiler: a ``RoundedLayer`` for each layer, for
``QuantizeLayers(plan, calibration, rounded=..., rules=module.rules())`` on
``folded(module.to_graph(graph))``, where ``graph`` is the same model loaded at another batch;
``export.to_qcdq`` writes it as a file.

``loop.train`` runs epochs (distillation, labels, cosine schedule, EMA, checkpoints, resume);
``batches.TrainingSet`` holds samples and deals them in an order that the seed and the epoch fix;
``finetune`` is the verb; ``trainer.PlanTrainer`` is the ``Trainer`` of search problems: from a
checkpoint to the metric after some epochs at given widths.
"""

from mpqc.errors import EnvironmentLacks

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise EnvironmentLacks(
        f'training needs PyTorch ({error}): pip install "mpqc[train]"'
    ) from error

from mpqc.train.fake_quant import (
    DoReFaWeights,
    InputQuantizer,
    LsqInput,
    LsqWeights,
    PactInput,
    WeightQuantizer,
)
from mpqc.train.module import GraphModule, LayerHook, Product, check_batching, load_graph
from mpqc.train.quantized_layer import QuantizedLayer, Quantizers, folded, quantize_module

__all__ = [
    "DoReFaWeights",
    "GraphModule",
    "InputQuantizer",
    "LayerHook",
    "LsqInput",
    "LsqWeights",
    "PactInput",
    "Product",
    "QuantizedLayer",
    "Quantizers",
    "WeightQuantizer",
    "check_batching",
    "folded",
    "load_graph",
    "quantize_module",
]
