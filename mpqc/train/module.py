"""Any float graph as a torch module: one interpreter, no class per network."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from mpqc import importer
from mpqc.errors import GraphError, ModelError
from mpqc.graph import Array, Graph, Node
from mpqc.passes.base import run
from mpqc.passes.drop_dead import DropDead
from mpqc.passes.find_layers import Layer, find_layers
from mpqc.passes.fold_batch_norm import affine_chain
from mpqc.passes.fold_pad import FoldPad
from mpqc.quantizers import ActivationQuantizer
from mpqc.rounding import RoundedLayer
from mpqc.train import ops
from mpqc.train.deployment import Deployed, deploy

Product: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x, weights with output channels first, bias or None) -> the layer's output, before BatchNorm."""
Feeds: TypeAlias = Mapping[str, Tensor]

# Operands that are learned; what else is constant stays as it is.
_LEARNED: dict[str, tuple[int, ...]] = {
    "BatchNormalization": (1, 2),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gather": (0,),
    "Gemm": (0, 1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "MatMul": (0, 1),
    "PRelu": (1,),
}
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class LayerHook(nn.Module):
    """What a layer computes instead of its plain product. The default is the plain product.

    A search plugin derives from it: ``forward`` may quantize, mix several quantized weights or
    call the product several times.

    Attributes:
        plain: whether ``forward`` gives what one call of ``product`` gives, so that
            BatchNormalization with fixed statistics can be folded into the product.
    """

    plain = False

    def forward(self, product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the layer.

        Args:
            product: the layer's convolution or matrix product, with any operands of its shapes.
            x: input of the layer, float32.
            weight: float32 [O, I/groups, *kernel] or [N, K]: output channels first always.
            bias: float32 [O] or None.
        """
        return product(x, weight, bias)

    def rounded(self, weight: Tensor, bias: Tensor | None) -> RoundedLayer | None:
        """What the compiler is to compute, BatchNorm aside; None while it has no such form.

        Args:
            weight: as in ``forward``.
            bias: likewise.

        Returns:
            Weights as [O, I/groups, *kernel] or [N, K].
        """
        return None


class Named(nn.ModuleDict):
    """Modules by names with any characters."""

    @staticmethod
    def _key(name: str) -> str:
        return "n:" + name.replace("%", "%25").replace(".", "%2E")

    def put(self, name: str, module: nn.Module) -> None:
        super().__setitem__(self._key(name), module)

    def find(self, name: str) -> Any:
        """The module, or None."""
        return self._modules.get(self._key(name))

    def drop(self, name: str) -> None:
        if self._key(name) in self:
            del self[self._key(name)]

    def names(self) -> list[str]:
        return [key[2:].replace("%2E", ".").replace("%25", "%") for key in self.keys()]


class GraphModule(nn.Module):
    """Interprets a float graph; its weights are parameters, BatchNorm's statistics buffers.

    In training mode everything runs as the graph says, with the hooks of layers and the
    quantizers of tensors in place, and BatchNormalization on the statistics of the batch (unless
    ``freeze_batch_norm``). In evaluation mode a layer whose hook has a rounded form computes as
    the compiled network does: integer codes, exact sums, one multiplication and addition in
    float32, with the BatchNormalization behind it folded in.

    Args:
        graph: float, from ``load_graph``: static shapes, BatchNormalization kept.

    Attributes:
        graph: as given; ``to_graph`` has the trained weights.
        layers: name -> what ``find_layers`` says of each quantizable layer.
        hooks: ``LayerHook`` of layers, by name.
        tensors: quantizers of values, by name: all readers see what they return.
        freeze_batch_norm: use and keep the running statistics in training too.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        if unknown := sorted({node.op for node in graph} - ops.OPS.keys()):
            where = next(node.name for node in graph if node.op == unknown[0])
            raise ModelError(
                f"{', '.join(unknown)} (as {where!r}) cannot be trained; "
                "training takes float models in standard operators"
            )
        self.graph = graph
        self.layers: dict[str, Layer] = {layer.name: layer for layer in find_layers(graph)}
        self.hooks = Named()
        self.tensors = Named()
        self.freeze_batch_norm = False
        self._params: dict[str, str] = {}
        self._positive: set[str] = set()
        learned = _learned(graph)
        for index, (name, array) in enumerate(_operands(graph).items()):
            tensor = torch.from_numpy(_plain(array))
            self._params[name] = f"c{index}"
            if name in learned:
                self.register_parameter(f"c{index}", nn.Parameter(tensor))
            else:
                self.register_buffer(f"c{index}", tensor)
        self._chains = {
            name: tuple(node.name for node in affine_chain(graph, graph[name])[0])
            for name in self.layers
        }
        self._norms = {
            name: graph[chain[0]]
            for name, chain in self._chains.items()
            if chain and graph[chain[0]].op == "BatchNormalization"
        }
        self._last = _last_uses(graph)
        self._cache: tuple[tuple[int, ...], dict[str, Deployed]] | None = None

    # Weights ---------------------------------------------------------------------------------

    def constant(self, name: str) -> Tensor:
        """Parameter or buffer of a constant of the graph.

        Raises:
            GraphError: no operator reads it as a tensor.
        """
        if name not in self._params:
            raise GraphError(f"no operator of the network reads a constant {name!r}")
        tensor: Tensor = getattr(self, self._params[name])
        return tensor.abs() if name in self._positive else tensor

    def raw(self, name: str) -> Tensor:
        """The parameter itself, to be changed in place."""
        tensor: Tensor = getattr(self, self._params[name])
        return tensor

    def weight(self, layer: str) -> Tensor:
        """A layer's weights, output channels first (alpha of a Gemm multiplied in)."""
        return self._rows(self.graph[layer])

    def bias(self, layer: str) -> Tensor | None:
        """A layer's own bias, float32 [O] (beta multiplied in), or None."""
        return self._bias(self.graph[layer])

    def learned(self) -> dict[str, nn.Parameter]:
        """Constant name -> parameter."""
        found = {name: getattr(self, key) for name, key in self._params.items()}
        return {name: p for name, p in found.items() if isinstance(p, nn.Parameter)}

    def statistics(self) -> dict[str, Tensor]:
        """Constant name -> buffer of the running means and variances."""
        names = [v for node in self.graph if node.op == "BatchNormalization" for v in node.inputs]
        found = {name: getattr(self, self._params[name]) for name in names if name in self._params}
        return {k: tensor for k, tensor in found.items() if not isinstance(tensor, nn.Parameter)}

    def to_graph(self, graph: Graph | None = None) -> Graph:
        """The graph with the weights and statistics as they are now.

        Args:
            graph: of the same model at another batch size; by default this module's.
        """
        target = self.graph if graph is None else graph
        constants: dict[str, Array] = {}
        for name in self._params:
            if name not in target.constants or target.constants[name].dtype.kind != "f":
                continue
            tensor = self.constant(name).detach().cpu().numpy()
            constants[name] = tensor.astype(target.constants[name].dtype)
        return target.with_(constants=constants)

    def make_positive(self, layer: str) -> bool:
        """Keep the scale of the BatchNormalization behind a layer positive from now on.

        Channels of negative scale change their sign, in weights, bias, mean and scale: the same
        function. False where the constants are shared, or there is no such BatchNormalization.
        """
        chain = self._chains[layer]
        norm = self.graph[chain[0]] if chain else None
        if norm is None or norm.op != "BatchNormalization":
            return False
        scale, mean = norm.inputs[1], norm.inputs[3]
        node = self.graph[layer]
        own = [name for name in node.inputs[1:] if name]
        if any(len(self.graph.consumers(name)) > 1 for name in (*own, scale, mean)):
            return False
        if scale in self._positive:
            return True
        with torch.no_grad():
            sign = torch.where(self.raw(scale) < 0, -1.0, 1.0)
            for name in (*own, scale, mean):
                tensor = self.raw(name)
                axis = _channel_axis(node) if name == own[0] else 0
                shape = [1] * tensor.dim()
                shape[axis] = -1
                if tensor.shape[axis] == 1 and sign.numel() > 1:
                    return False
                tensor.mul_(sign.reshape(shape))
        self._positive.add(scale)
        return True

    def settle_batch_norm(self, batches: Iterable[Feeds], keep: bool) -> None:
        """Give BatchNormalization the statistics that it sees in these batches.

        Quantization shifts them. Where biases make up for that already, as after rounding with
        compensation, scale and bias change too, so that the network computes what it did:
        statistics of batches would make up for the same shift a second time.

        Args:
            batches: as ``forward`` takes them; none: nothing happens.
            keep: the function; else the normalization does what it is for.
        """
        norms = {
            node.inputs[0]: node
            for node in self.graph
            if node.op == "BatchNormalization"
            and all(len(self.graph.consumers(name)) == 1 for name in node.inputs[1:5])
            and all(name in self._params for name in node.inputs[1:5])
        }
        if not norms:
            return
        training, frozen = self.training, self.freeze_batch_norm
        self.train()
        self.freeze_batch_norm = keep
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {value: [] for value in norms}
        with torch.no_grad():
            for feeds in batches:
                for value, x in self(feeds, tuple(norms)).items():
                    rows = x.double().transpose(0, 1).flatten(1)
                    unbiased = int(rows.shape[1] > 1)
                    seen[value].append((rows.mean(1), rows.var(1, correction=unbiased)))
            for value, node in norms.items():
                if not seen[value]:
                    continue
                scale, bias, mean, variance = (self.raw(name) for name in node.inputs[1:5])
                epsilon = float(node.attrs.get("epsilon", 1e-5))  # type: ignore[arg-type]
                new_mean, new_variance = (
                    torch.stack(rows).mean(0) for rows in zip(*seen[value], strict=True)
                )
                if keep:
                    factor = self.constant(node.inputs[1]) / (variance.double() + epsilon).sqrt()
                    bias.add_((new_mean - mean) * factor)
                    scale.copy_(factor * (new_variance + epsilon).sqrt())
                mean.copy_(new_mean)
                variance.copy_(new_variance)
        self.train(training)
        self.freeze_batch_norm = frozen

    # Running ---------------------------------------------------------------------------------

    def forward(
        self, feeds: Feeds | Tensor, wanted: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Compute outputs.

        Args:
            feeds: one tensor an input, or the tensor of the only input; the first axis may be
                any multiple of the graph's batch.
            wanted: values of the graph, by default its outputs.
        """
        names = tuple(self.graph.outputs if wanted is None else wanted)
        values: dict[str, Tensor] = {}
        results: dict[str, Tensor] = {}
        deployed = {} if self.training else self.deployed()
        skipped = {step for name in deployed for step in self._chains[name]}
        absorbing = self._absorbing(names) if not deployed else {}
        skipped |= {norm.name for norm in absorbing.values()}

        def define(value: str, tensor: Tensor) -> None:
            if value in names:
                results[value] = tensor
            rule = self.tensors.find(value)
            values[value] = tensor if rule is None else rule(tensor)

        if isinstance(feeds, Tensor):
            feeds = {next(iter(self.graph.inputs)): feeds}
        for name in self.graph.inputs:
            define(name, _laid_out(feeds[name]))
        for node in self.graph:
            if node.name in skipped:
                continue
            end = node.output
            if node.name in absorbing:
                norm = absorbing[node.name]
                define(norm.output, self._normalized(node, norm, values[node.inputs[0]]))
            elif node.name in deployed:
                chain = self._chains[node.name]
                end = self.graph[chain[-1]].output if chain else end
                define(end, self._integers(node, values[node.inputs[0]], deployed[node.name]))
            else:
                made = self._compute(node, values, bool(deployed))
                outputs = made if isinstance(made, tuple) else (made,)
                for value, tensor in zip(node.outputs, outputs, strict=False):
                    if value:
                        define(value, tensor)
            for value in self._last.get(node.name, ()):
                values.pop(value, None)
            if len(results) == len(names):
                break
        if missing := [name for name in names if name not in results]:
            raise GraphError(f"value {missing[0]!r} is not computed: a layer absorbed it")
        return {name: results[name] for name in names}

    def _compute(self, node: Node, values: Mapping[str, Tensor], fixed: bool) -> ops.Result:
        static = ops.STATIC.get(node.op, ())
        hook = self.hooks.find(node.name)
        if hook is not None:
            product = self._product(node)
            made: Tensor = hook(product, values[node.inputs[0]], self._rows(node), self._bias(node))
            return made
        operands = tuple(
            None
            if not name or index in static
            else values[name]
            if name in values
            else self.constant(name)
            for index, name in enumerate(node.inputs)
        )
        training = self.training and not self.freeze_batch_norm
        return ops.OPS[node.op](ops.Call(self.graph, node, operands, training, fixed))

    def _absorbing(self, wanted: Sequence[str]) -> dict[str, Node]:
        """Layers -> BatchNormalization of fixed statistics that their products can absorb."""
        if self.training and not self.freeze_batch_norm:
            return {}
        found = {}
        for name, norm in self._norms.items():
            hook, value = self.hooks.find(name), norm.inputs[0]
            seen = value in wanted or self.tensors.find(value) is not None
            if not seen and (hook is None or hook.plain):
                found[name] = norm
        return found

    def _normalized(self, node: Node, norm: Node, x: Tensor) -> Tensor:
        """A layer and the BatchNormalization behind it, as one product.

        The normalization, and its gradients, then cost a pass over the weights and not several
        over the values.
        """
        scale, shift, mean, variance = (self.constant(name) for name in norm.inputs[1:5])
        epsilon = float(norm.attrs.get("epsilon", 1e-5))  # type: ignore[arg-type]
        factor = scale * (variance + epsilon).rsqrt()
        shift = shift - mean * factor
        product = self._product(node)

        def folded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            rows = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
            return product(x, rows, shift if bias is None else shift + bias * factor)

        hook = self.hooks.find(node.name)
        weight, bias = self._rows(node), self._bias(node)
        made: Tensor
        made = folded(x, weight, bias) if hook is None else hook(folded, x, weight, bias)
        return made

    def _product(self, node: Node) -> Product:
        if node.op == "Conv":
            call = ops.Call(self.graph, node, ())
            return lambda x, weight, bias: ops.convolve(call, x, weight, bias)
        return _matrix_product

    def _rows(self, node: Node) -> Tensor:
        weight = self.constant(node.inputs[1])
        if node.op == "Conv":
            return weight
        if node.op == "MatMul":
            return weight.T
        weight = weight if node.int_attr("transB", 0) else weight.T
        alpha = float(node.attrs.get("alpha", 1.0))  # type: ignore[arg-type]
        return weight if alpha == 1 else weight * alpha

    def _bias(self, node: Node) -> Tensor | None:
        if len(node.inputs) < 3 or not node.inputs[2]:
            return None
        bias = self.constant(node.inputs[2]).reshape(-1)
        bias = bias.expand(self.layers[node.name].channels_out)
        beta = float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0  # type: ignore[arg-type]
        return bias if beta == 1 else bias * beta

    def _integers(self, node: Node, x: Tensor, made: Deployed) -> Tensor:
        """Codes, exact sums, scale and shift: what the compiled layer computes."""
        weight = made.weight
        codes = made.codes(x)
        if made.wide or x.device.type != "cpu":  # no fast algorithm may round
            codes, weight = codes.double(), weight.double()
        # fast convolutions may be off by less than half
        total = self._product(node)(codes, weight, None).round().float()
        shape = [1] * total.dim()
        shape[1 if node.op == "Conv" else -1] = -1
        scaled = total * made.m.reshape(shape)
        return scaled + made.b.reshape(shape)

    # The compiler's view ---------------------------------------------------------------------

    def rounded(self) -> dict[str, RoundedLayer]:
        """Layer -> what it computes with, as ``QuantizeLayers`` of the folded graph takes it.

        Layers without a hook, or whose hook has no rounded form, are left out.
        """
        graph: Graph | None = None
        found = {}
        for name in self.hooks.names():
            hook = self.hooks.find(name)
            with torch.no_grad():
                made = hook.rounded(self.weight(name), self.bias(name))
            if made is None:
                continue
            graph = graph or self.to_graph()
            _, scale, shift = affine_chain(graph, graph[name])
            found[name] = deploy(made, scale, shift, self.layers[name].op == "Conv")
        return found

    def rules(self) -> dict[str, ActivationQuantizer]:
        """Value -> rule of its quantizer, for values that all readers see quantized."""
        return {name: self.tensors.find(name).rule() for name in self.tensors.names()}

    def deployed(self) -> dict[str, Deployed]:
        """Layer -> its compiled arithmetic as tensors; kept until a weight changes."""
        if not len(self.hooks):
            return {}
        tensors = [*self.parameters(), *self.buffers()]
        key = (*(tensor._version for tensor in tensors), *(tensor.data_ptr() for tensor in tensors))
        if self._cache is None or self._cache[0] != key:
            device = next(iter(tensors)).device
            made = {
                name: Deployed.of(layer, self.layers[name].op == "Conv", device)
                for name, layer in self.rounded().items()
            }
            self._cache = (key, made)
        return self._cache[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": None}


def load_graph(path: str | Path, dims: Mapping[str, int] | None = None, batch: int = 1) -> Graph:
    """An ONNX file as a graph for training: static shapes, pads folded, BatchNorm kept.

    Args:
        path: ONNX file.
        dims: of symbolic dimensions.
        batch: of the graph; a model that fixes its own batch keeps it.
    """
    try:
        graph = importer.load(path, dims, batch)
    except ModelError:
        if batch == 1:
            raise
        graph = importer.load(path, dims)
    return run(graph, FoldPad(), DropDead())


def _laid_out(x: Tensor) -> Tensor:
    """Pictures with their channels last: the layout that convolutions on CPUs are fast in."""
    if x.dim() != 4 or x.device.type != "cpu" or not x.is_floating_point():
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _matrix_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x, weight, bias)


def _plain(array: Array) -> Array:
    """A copy of an element type that torch has."""
    kind = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}.get(str(array.dtype))
    return np.array(array, dtype=kind or array.dtype, order="C")


def _operands(graph: Graph) -> dict[str, Array]:
    """Constants that operators read as tensors."""
    found: dict[str, Array] = {}
    for node in graph:
        static = ops.STATIC.get(node.op, ())
        for index, name in enumerate(node.inputs):
            if name in graph.constants and index not in static:
                found[name] = graph.constants[name]
    for name in graph.outputs:
        if name in graph.constants:
            raise ModelError(f"output {name!r} is constant: there is nothing to train")
    return found


def _learned(graph: Graph) -> set[str]:
    """Constants that are trained: operands of layers and norms, and biases added behind layers."""
    found: set[str] = set()
    for node in graph:
        names = [node.inputs[i] for i in _LEARNED.get(node.op, ()) if len(node.inputs) > i]
        if node.op == "Add":
            producers = [graph.producer(value) for value in node.inputs]
            if any(producer is not None and producer.op in _PRODUCTS for producer in producers):
                names += node.inputs
        found.update(
            name
            for name in names
            if name in graph.constants and graph.constants[name].dtype == np.float32
        )
    return found


def _channel_axis(node: Node) -> int:
    """Of the output channels in the weight constant."""
    if node.op == "Conv":
        return 0
    return 0 if node.op == "Gemm" and node.int_attr("transB", 0) else 1


def _last_uses(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Node -> values that nobody reads behind it."""
    last: dict[str, str] = {}
    for node in graph:
        for value in filter(None, node.inputs):
            last[value] = node.name
    found: dict[str, list[str]] = {}
    for value, name in last.items():
        if value not in graph.constants and value not in graph.outputs:
            found.setdefault(name, []).append(value)
    return {name: tuple(values) for name, values in found.items()}


def check_batching(module: GraphModule, feeds: Mapping[str, Array]) -> None:
    """Samples must not see one another: compare a batch with its halves.

    Args:
        module: at any batch of which the feeds hold two.
        feeds: input name -> array [2 * batch, ...].

    Raises:
        ModelError: the outputs differ, or have no batch axis.
    """
    training = module.training
    module.eval()
    with torch.no_grad():
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
        device = next(module.parameters()).device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        try:
            whole = module(tensors)
        except (RuntimeError, IndexError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise ModelError(f"the network cannot take several samples at once: {line}") from error
        half = {name: tensor[: len(tensor) // 2] for name, tensor in tensors.items()}
        for name, tensor in module(half).items():
            got = whole[name][: len(tensor)]
            close = got.shape == tensor.shape and torch.allclose(got, tensor, 1e-3, 1e-4)
            if not close:
                raise ModelError(
                    f"output {name!r} of a sample depends on the other samples of its batch: "
                    "export the model with an open batch dimension, or use --batch-size 1"
                )
    module.train(training)
