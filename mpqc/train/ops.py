"""ONNX operator -> function of torch: what the interpreter looks up. Float32 as ONNX means it.

A function gets a ``Call`` and returns the node's first output, or a tuple of all. Operands that
shape the result (axes, pads, sizes) are constants of the graph and read as numpy arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from mpqc import pooling
from mpqc.errors import ModelError
from mpqc.graph import Array, Graph, Node

Result: TypeAlias = Tensor | tuple[Tensor, ...]

DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "float16": torch.float16,
    "bfloat16": torch.bfloat16, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32,
    "int64": torch.int64, "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One node at work.

    Attributes:
        graph: that the node is of; its shapes are those of the batch it was imported at.
        node: the operator.
        x: operands; None where one is absent, or is a constant that shapes the result.
        training: BatchNormalization takes the statistics of the batch, and updates its own.
        fixed_means: averages are summed in the order that integer graphs fix.
    """

    graph: Graph
    node: Node
    x: tuple[Any, ...]
    training: bool = False
    fixed_means: bool = False

    def static(self, index: int) -> Array | None:
        """A constant operand; None where it is absent.

        Raises:
            ModelError: it is computed.
        """
        name = self.node.inputs[index] if len(self.node.inputs) > index else ""
        if not name:
            return None
        if name not in self.graph.constants:
            raise ModelError(
                f"{self.node.op} {self.node.name!r} computes its operand {name!r}; networks with "
                "shapes that depend on data cannot be trained"
            )
        return self.graph.constants[name]

    def ints(self, index: int) -> list[int] | None:
        """A constant operand as integers."""
        found = self.static(index)
        return None if found is None else [int(v) for v in found.reshape(-1)]

    def axes(self, index: int, attribute: str = "axes") -> list[int] | None:
        """Axes as an operand, or as an attribute in older opsets."""
        if attribute in self.node.attrs:
            return list(self.node.ints_attr(attribute))
        return self.ints(index)

    @property
    def out(self) -> tuple[int, ...]:
        """Shape of the first output as the graph says it."""
        return self.graph.shape(self.node.output)

    @property
    def declared(self) -> tuple[int, ...]:
        """Shape of the first operand as the graph says it."""
        return self.graph.shape(self.node.inputs[0])

    def number(self, name: str, default: float) -> float:
        return float(self.node.attrs.get(name, default))  # type: ignore[arg-type]


# Convolutions and products ---------------------------------------------------------------------

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d,
}  # fmt: skip


def convolve(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Conv's product, with any operands of its shapes."""
    node = call.node
    kernel = tuple(weight.shape[2:])
    rank = len(kernel)
    pads = pooling.explicit_pads(node, tuple(x.shape[2:]), call.out[2:], kernel)
    padding: tuple[int, ...] = pads[:rank]
    if pads[:rank] != pads[rank:]:
        x, padding = _padded(x, pads, 0.0), (0,) * rank
    return _CONV[rank](
        x,
        weight,
        bias,
        node.ints_attr("strides", (1,) * rank),
        padding,
        node.ints_attr("dilations", (1,) * rank),
        node.int_attr("group", 1),
    )


def _padded(x: Tensor, pads: tuple[int, ...], value: float) -> Tensor:
    """Pad the spatial axes; begins, then ends."""
    rank = len(pads) // 2
    flat: list[int] = []
    for axis in reversed(range(rank)):
        flat += [pads[axis], pads[axis + rank]]
    return F.pad(x, flat, value=value)


def _conv(call: Call) -> Tensor:
    return convolve(call, call.x[0], call.x[1], call.x[2] if len(call.x) > 2 else None)


def _conv_transpose(call: Call) -> Tensor:
    node, (x, weight) = call.node, call.x[:2]
    rank = weight.dim() - 2
    extra = node.ints_attr("output_padding", (0,) * rank)
    full = _TRANSPOSED[rank](
        x,
        weight,
        call.x[2] if len(call.x) > 2 else None,
        node.ints_attr("strides", (1,) * rank),
        0,
        extra if any(extra) else 0,
        node.int_attr("group", 1),
        node.ints_attr("dilations", (1,) * rank),
    )
    spatial = call.out[2:]
    begins = list(node.ints_attr("pads", (0,) * 2 * rank)[:rank])
    auto = node.str_attr("auto_pad", "NOTSET")
    if auto.startswith("SAME") or "output_shape" in node.attrs:
        for axis in range(rank):
            total = full.shape[2 + axis] - spatial[axis]
            begins[axis] = total // 2 if auto == "SAME_UPPER" else total - total // 2
    for axis in range(rank):
        full = full.narrow(2 + axis, begins[axis], spatial[axis])
    return full


def _gemm(call: Call) -> Tensor:
    a, b = call.x[:2]
    a = a.T if call.node.int_attr("transA", 0) else a
    b = b.T if call.node.int_attr("transB", 0) else b
    product = a @ b
    alpha, beta = call.number("alpha", 1.0), call.number("beta", 1.0)
    product = product if alpha == 1 else product * alpha
    if len(call.x) < 3 or call.x[2] is None:
        return product
    return product + (call.x[2] if beta == 1 else call.x[2] * beta)


# Normalisation ---------------------------------------------------------------------------------


def _batch_norm(call: Call) -> Tensor:
    x, scale, bias, mean, variance = call.x[:5]
    # ONNX's momentum is of the old value, torch's of the new one
    momentum = 1.0 - call.number("momentum", 0.9)
    epsilon = call.number("epsilon", 1e-5)
    return F.batch_norm(x, mean, variance, scale, bias, call.training, momentum, epsilon)


def _layer_norm(call: Call) -> Tensor:
    x, scale = call.x[:2]
    axis = call.node.int_attr("axis", -1) % x.dim()
    shape = tuple(x.shape[axis:])
    bias = call.x[2].expand(shape) if len(call.x) > 2 and call.x[2] is not None else None
    return F.layer_norm(x, shape, scale.expand(shape), bias, call.number("epsilon", 1e-5))


def _group_norm(call: Call) -> Tensor:
    x, scale, bias = call.x[:3]
    groups = call.node.int_attr("num_groups")
    if scale.numel() != x.shape[1]:  # opset 18: one scale a group
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return F.group_norm(x, groups, scale, bias, call.number("epsilon", 1e-5))


def _instance_norm(call: Call) -> Tensor:
    x, scale, bias = call.x[:3]
    return F.instance_norm(x, None, None, scale, bias, True, 0.0, call.number("epsilon", 1e-5))


def _lrn(call: Call) -> Tensor:
    return F.local_response_norm(
        call.x[0],
        call.node.int_attr("size"),
        call.number("alpha", 1e-4),
        call.number("beta", 0.75),
        call.number("bias", 1.0),
    )


# Pooling ---------------------------------------------------------------------------------------

_MAX_POOL: dict[int, Callable[..., Tensor]] = {
    1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d,
}  # fmt: skip
_AVERAGE_POOL: dict[int, Callable[..., Tensor]] = {
    1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d,
}  # fmt: skip


def _max_pool(call: Call) -> Tensor:
    x, node = call.x[0], call.node
    if len([name for name in node.outputs if name]) > 1:
        raise ModelError(f"MaxPool {node.name!r} gives indices: such networks cannot be trained")
    kernel = node.ints_attr("kernel_shape")
    rank = len(kernel)
    strides = node.ints_attr("strides", (1,) * rank)
    dilations = node.ints_attr("dilations", (1,) * rank)
    spatial, out = tuple(x.shape[2:]), call.out[2:]
    pads = pooling.explicit_pads(node, spatial, out, kernel)
    reach = [(out[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 for i in range(rank)]
    ends = [max(pads[i + rank], reach[i] - spatial[i] - pads[i]) for i in range(rank)]
    if any(pads[:rank]) or any(ends):
        x = _padded(x, (*pads[:rank], *ends), -torch.inf)
    return _MAX_POOL[rank](x, kernel, strides, 0, dilations)


def _average(call: Call) -> Tensor:
    """GlobalAveragePool, AveragePool, and ReduceMean over the spatial axes."""
    x: Tensor = call.x[0]
    found = pooling.windows(call.graph, call.node)
    if found is None:
        return _reduce(lambda x, axes, keep: x.mean(axes, keep))(call)
    if call.fixed_means:
        return _tree_mean(call, x, found)
    if call.node.op != "AveragePool":
        keep = call.node.op == "GlobalAveragePool" or bool(call.node.int_attr("keepdims", 1))
        return x.mean(tuple(range(2, x.dim())), keep)
    if set(found.dilations) != {1}:
        raise ModelError(f"AveragePool {call.node.name!r} has dilations; it cannot be trained")
    mean = _AVERAGE_POOL[len(found.kernel)](
        _padded(x, (*found.begins, *found.ends), 0.0), found.kernel, found.strides
    )
    if (found.count == prod(found.kernel)).all():
        return mean
    factor = (prod(found.kernel) / found.count).astype(np.float32)
    return mean * torch.from_numpy(factor).to(x.device)


def _tree_mean(call: Call, x: Tensor, found: pooling.Windows) -> Tensor:
    """``numerics.tree_mean`` over the windows."""
    if found.whole:
        terms = x.flatten(2)[:, :, None]
    else:
        padded = _padded(x, (*found.begins, *found.ends), 0.0)
        terms = torch.stack([padded[(..., *at)] for at in found.slices()], -1)
    while (n := terms.shape[-1]) > 1:
        half = (n + 1) // 2
        pairs = terms[..., : n - half] + terms[..., half:]
        terms = torch.cat([pairs, terms[..., n - half : half]], -1)
    factor = (1 / found.count.astype(np.float64)).astype(np.float32)
    factors = torch.from_numpy(factor).to(x.device)
    mean = terms[..., 0] * (factors.reshape(1, 1, -1) if found.whole else factors)
    return mean.reshape(x.shape[0], *call.out[1:])


# Shapes ----------------------------------------------------------------------------------------


def batched(declared: tuple[int, ...], elements: int) -> list[int]:
    """A shape of the graph at another batch: the first axis grows with the number of elements."""
    whole = prod(declared)
    if elements == whole or not declared or not whole:
        return list(declared)
    if declared[0] * elements % whole:
        raise ModelError(f"{elements} elements do not fill samples of {list(declared)}")
    return [declared[0] * elements // whole, *declared[1:]]


def _reshape(call: Call) -> Tensor:
    x: Tensor = call.x[0]
    return x.reshape(batched(call.out, x.numel()))


def _flatten(call: Call) -> Tensor:
    x: Tensor = call.x[0]
    axis = call.node.int_attr("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(prod(x.shape[:axis]), -1)


def _expand(call: Call) -> Tensor:
    x: Tensor = call.x[0]
    target = list(call.out)
    same_rank = len(target) == x.dim()
    if same_rank and x.shape[0] != call.declared[0] and call.declared[0] == target[0]:
        target[0] = x.shape[0]
    return x.expand(target)


def _squeeze(call: Call) -> Tensor:
    x: Tensor = call.x[0]
    axes = call.axes(1)
    if axes is None:
        axes = [axis for axis, extent in enumerate(call.declared) if extent == 1]
    return x.squeeze(tuple(axes))


def _unsqueeze(call: Call) -> Tensor:
    x: Tensor = call.x[0]
    axes = call.axes(1) or []
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _transpose(call: Call) -> Tensor:
    x: Tensor = call.x[0]
    return x.permute(call.node.ints_attr("perm", tuple(reversed(range(x.dim())))))


def _slice(call: Call) -> Tensor:
    x: Tensor = call.x[0]
    starts, ends = call.ints(1) or [], call.ints(2) or []
    axes = call.ints(3) or list(range(len(starts)))
    steps = call.ints(4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        where = range(x.shape[axis])[
            slice(start, None if step < 0 and end < -(2**31) else end, step)
        ]
        if step >= 1:  # a view
            first = where.start if len(where) else 0
            part = slice(first, first + step * len(where), step)
            x = x[(slice(None),) * (axis % x.dim()) + (part,)]
        else:
            x = x.index_select(axis, torch.tensor(list(where), device=x.device))
    return x


def _split(call: Call) -> Result:
    x: Tensor = call.x[0]
    axis = call.node.int_attr("axis", 0)
    sizes = [call.graph.shape(name)[axis] if name else 0 for name in call.node.outputs]
    given = call.axes(1, "split")
    return tuple(x.split(given or sizes, axis))


def _pad(call: Call) -> Tensor:
    x: Tensor = call.x[0]
    pads = call.ints(1) or []
    value = call.static(2)
    axes = call.ints(3) or list(range(x.dim()))
    amounts = [(0, 0)] * x.dim()
    for index, axis in enumerate(axes):
        amounts[axis] = (pads[index], pads[index + len(axes)])
    flat = [amount for pair in reversed(amounts) for amount in pair]
    mode = call.node.str_attr("mode", "constant")
    if mode == "constant":
        return F.pad(x, flat, value=0.0 if value is None else float(value.reshape(())))
    modes = {"edge": "replicate", "reflect": "reflect", "wrap": "circular"}
    spatial = flat[: 2 * (x.dim() - 2)]
    if any(flat[2 * (x.dim() - 2) :]):
        raise ModelError(f"Pad {call.node.name!r} pads channels with mode {mode}")
    return F.pad(x, spatial, mode=modes[mode])


def _tile(call: Call) -> Tensor:
    x: Tensor = call.x[0]
    return x.repeat(call.ints(1) or [])


def _concat(call: Call) -> Tensor:
    longest = max(x.shape[0] for x in call.x)
    axis = call.node.int_attr("axis") % call.x[0].dim()
    if axis == 0:
        return torch.cat(call.x, 0)
    # a constant operand has the batch of the graph
    return torch.cat([x.expand(longest, *x.shape[1:]) for x in call.x], axis)


def _gather(call: Call) -> Tensor:
    data, indices = call.x[:2]
    axis = call.node.int_attr("axis", 0) % data.dim()
    indices = indices.long()
    indices = torch.where(indices < 0, indices + data.shape[axis], indices)
    taken = data.index_select(axis, indices.reshape(-1))
    return taken.reshape(*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])


def _depth_to_space(call: Call) -> Tensor:
    x: Tensor = call.x[0]
    size = call.node.int_attr("blocksize")
    n, c, h, w = x.shape
    if call.node.str_attr("mode", "DCR") == "CRD":
        x = x.reshape(n, c // size**2, size, size, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        x = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // size**2, h * size, w * size)


def _space_to_depth(call: Call) -> Tensor:
    x: Tensor = call.x[0]
    size = call.node.int_attr("blocksize")
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * size**2, h // size, w // size)


def _resize(call: Call) -> Tensor:
    x, node = call.x[0], call.node
    before, after = call.declared, call.out
    scales = call.static(2) if len(node.inputs) > 2 and node.inputs[2] else None
    mode = node.str_attr("mode", "nearest")
    for axis in range(2, len(after)):
        if before[axis] == after[axis]:
            continue
        scale = after[axis] / before[axis]
        if scales is not None and scales.size == len(after):
            scale = float(scales[axis])
        places = _places(node, before[axis], after[axis], scale)
        if mode == "nearest":
            x = x.index_select(axis, _tensor(_nearest(node, places, before[axis]), x))
        elif mode == "linear":
            places = np.clip(places, 0, before[axis] - 1)
            low = np.minimum(np.floor(places), before[axis] - 2).clip(0).astype(np.int64)
            high = np.minimum(low + 1, before[axis] - 1)
            share = _tensor((places - low).astype(np.float32), x)
            share = share.reshape([-1] + [1] * (len(after) - axis - 1))
            left, right = (x.index_select(axis, _tensor(at, x)) for at in (low, high))
            x = left * (1 - share) + right * share
        else:
            raise ModelError(f"Resize {node.name!r} has mode {mode}; it cannot be trained")
    return x


def _tensor(array: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)


def _places(node: Node, before: int, after: int, scale: float) -> Array:
    """Coordinates in the source of every target element: float64 [after]."""
    at = np.arange(after, dtype=np.float64)
    match node.str_attr("coordinate_transformation_mode", "half_pixel"):
        case "asymmetric":
            return np.asarray(at / scale)
        case "half_pixel":
            return np.asarray((at + 0.5) / scale - 0.5)
        case "pytorch_half_pixel":
            return np.asarray((at + 0.5) / scale - 0.5 if after > 1 else at * 0)
        case "align_corners":
            return np.asarray(at * (before - 1) / max(after - 1, 1))
        case other:
            raise ModelError(f"Resize {node.name!r} has coordinates {other}; it cannot be trained")


def _nearest(node: Node, places: Array, before: int) -> Array:
    match node.str_attr("nearest_mode", "round_prefer_floor"):
        case "floor":
            found = np.floor(places)
        case "ceil":
            found = np.ceil(places)
        case "round_prefer_ceil":
            found = np.floor(places + 0.5)
        case _:
            found = np.ceil(places - 0.5)
    return np.clip(found, 0, before - 1).astype(np.int64)


# Reductions and elementwise --------------------------------------------------------------------


def _reduce(
    function: Callable[[Tensor, tuple[int, ...], bool], Tensor],
) -> Callable[[Call], Tensor]:
    def run(call: Call) -> Tensor:
        x: Tensor = call.x[0]
        axes = call.axes(1)
        if not axes:
            if axes is not None and call.node.int_attr("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.dim()))
        return function(x, tuple(axes), bool(call.node.int_attr("keepdims", 1)))

    return run


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keep)
    return x


def _arg(function: Callable[..., Tensor]) -> Callable[[Call], Tensor]:
    def run(call: Call) -> Tensor:
        keep = bool(call.node.int_attr("keepdims", 1))
        return function(call.x[0], call.node.int_attr("axis", 0), keep)

    return run


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Call], Tensor]:
    return lambda call: function(call.x[0])


def _binary(function: Callable[[Any, Any], Tensor]) -> Callable[[Call], Tensor]:
    return lambda call: function(call.x[0], call.x[1])


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Call], Tensor]:
    def run(call: Call) -> Tensor:
        total: Tensor = call.x[0]
        for operand in call.x[1:]:
            total = function(total, operand)
        return total

    return run


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _clip(call: Call) -> Tensor:
    x: Tensor = call.x[0]
    limits: list[float | None] = []
    for index, key in ((1, "min"), (2, "max")):
        bound = call.static(index)
        attribute = call.number(key, 0.0) if key in call.node.attrs else None
        limits.append(attribute if bound is None else bound.reshape(()).item())
    return x if limits == [None, None] else x.clamp(limits[0], limits[1])


def _prelu(call: Call) -> Tensor:
    x, slope = call.x[:2]
    return torch.where(x < 0, x * slope, x)


def _gelu(call: Call) -> Tensor:
    return F.gelu(call.x[0], approximate=call.node.str_attr("approximate", "none"))


def _cast(call: Call) -> Tensor:
    x: Tensor = call.x[0]
    return x.to(DTYPES[call.graph.type(call.node.output).dtype])


def _one_hot(call: Call) -> Tensor:
    indices = call.x[0].long()
    depth = int(np.asarray(call.static(1)).reshape(-1)[0])
    off, on = np.asarray(call.static(2)).tolist()
    axis = call.node.int_attr("axis", -1)
    hot = F.one_hot(indices % depth, depth).to(DTYPES[call.graph.type(call.node.output).dtype])
    hot = hot * (on - off) + off
    return hot.movedim(-1, axis)


def _top_k(call: Call) -> Result:
    k = (call.ints(1) or [1])[0]
    largest = bool(call.node.int_attr("largest", 1))
    return tuple(call.x[0].topk(k, call.node.int_attr("axis", -1), largest))


def _einsum(call: Call) -> Tensor:
    return torch.einsum(call.node.str_attr("equation"), *call.x)


def _softmax(function: Callable[..., Tensor]) -> Callable[[Call], Tensor]:
    return lambda call: function(call.x[0], dim=call.node.int_attr("axis", -1))


OPS: dict[str, Callable[[Call], Result]] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "AveragePool": _average,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Ceil": _unary(torch.ceil),
    "Celu": lambda call: F.celu(call.x[0], call.number("alpha", 1.0)),
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Cos": _unary(torch.cos),
    "DepthToSpace": _depth_to_space,
    "Div": _binary(_divide),
    "Einsum": _einsum,
    "Elu": lambda call: F.elu(call.x[0], call.number("alpha", 1.0)),
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _unary(torch.floor),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _average,
    "GlobalMaxPool": lambda call: call.x[0].amax(tuple(range(2, call.x[0].dim())), True),
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "GroupNormalization": _group_norm,
    "HardSigmoid": lambda call: (
        call.x[0] * call.number("alpha", 0.2) + call.number("beta", 0.5)
    ).clamp(0, 1),
    "HardSwish": _unary(F.hardswish),
    "Identity": _unary(lambda x: x),
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda call: F.leaky_relu(call.x[0], call.number("alpha", 0.01)),
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "LogSoftmax": _softmax(F.log_softmax),
    "MatMul": _binary(torch.matmul),
    "Max": _fold(torch.maximum),
    "MaxPool": _max_pool,
    "Mean": lambda call: _fold(torch.add)(call) / len(call.x),
    "Min": _fold(torch.minimum),
    "Mish": _unary(F.mish),
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "OneHot": _one_hot,
    "Or": _binary(torch.logical_or),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _binary(torch.pow),
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceL1": _reduce(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "ReduceL2": _reduce(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMean": _average,
    "ReduceMin": _reduce(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceProd": _reduce(_prod),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: x.square().sum(axes, keep)),
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": _unary(torch.round),
    "Selu": lambda call: (
        F.elu(call.x[0], call.number("alpha", 1.6732632)) * call.number("gamma", 1.050701)
    ),
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Slice": _slice,
    "Softmax": _softmax(F.softmax),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(torch.sub),
    "Sum": _fold(torch.add),
    "Tanh": _unary(torch.tanh),
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": lambda call: torch.where(call.x[0], call.x[1], call.x[2]),
}

# Operands that a function reads as constants (``Call.static``), not as tensors.
STATIC: dict[str, tuple[int, ...]] = {
    "Clip": (1, 2), "Expand": (1,), "OneHot": (1, 2), "Pad": (1, 2, 3), "Reshape": (1,),
    "Resize": (1, 2, 3), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,), "Tile": (1,),
    "TopK": (1,), "Unsqueeze": (1,),
} | {op: (1,) for op in OPS if op.startswith("Reduce")}  # fmt: skip
