"""Output types of ONNX Runtime's quantized operators, which onnx knows nothing of."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mpqc.errors import ModelError
from mpqc.graph import TensorType

DOMAIN = "com.microsoft"


def contrib_types(proto: Any, types: Mapping[str, TensorType]) -> dict[str, TensorType] | None:
    """Types of what a node of that domain gives; None for an operator that is not known here.

    Args:
        proto: NodeProto.
        types: of its operands.

    Raises:
        ModelError: operands that do not fit together.
    """
    attrs = {a.name: a for a in proto.attribute}
    given = [types[name] if name else None for name in proto.input]
    found = _type(proto.op_type, given, attrs)
    return None if found is None else {proto.output[0]: found}


def _type(op: str, given: list[TensorType | None], attrs: Mapping[str, Any]) -> TensorType | None:
    def need(index: int) -> TensorType:
        kind = given[index] if index < len(given) else None
        if kind is None:
            raise ModelError(f"operand {index} is missing; export the model again")
        return kind

    def number(key: str, default: int) -> int:
        return int(attrs[key].i) if key in attrs else default

    def optional(index: int) -> TensorType | None:
        return given[index] if index < len(given) else None

    match op:
        case "QuantizeLinear":
            zero = optional(2)
            return TensorType(zero.dtype if zero else "uint8", need(0).shape)
        case "DequantizeLinear":
            return TensorType(need(1).dtype, need(0).shape)
        case "QLinearAdd" | "QLinearMul":
            try:
                shape = np.broadcast_shapes(need(0).shape, need(3).shape)
            except ValueError as error:
                raise ModelError("its operands do not broadcast; export the model again") from error
            return TensorType(need(0).dtype, shape)
        case "QLinearSigmoid" | "QLinearLeakyRelu" | "QLinearSoftmax":
            return need(0)
        case "QLinearConcat":
            return _concat(given, number("axis", 0))
        case "QLinearGlobalAveragePool":
            shape = need(0).shape
            ones = (1,) * (len(shape) - 2)
            last = number("channels_last", 0)
            return TensorType(
                need(0).dtype, (shape[0], *ones, shape[-1]) if last else (*shape[:2], *ones)
            )
        case "QLinearAveragePool":
            return _pool(need(0), attrs)
        case "QLinearReduceMean":
            axes = tuple(attrs["axes"].ints) if "axes" in attrs else ()
            return _reduced(need(0), axes, number("keepdims", 1))
        case "QGemm":
            if not len(need(0).shape) == len(need(3).shape) == 2:
                raise ModelError("its operands are no matrices; export the model again")
            rows = need(0).shape[1 if number("transA", 0) else 0]
            columns = need(3).shape[0 if number("transB", 0) else 1]
            zero = optional(8)
            return TensorType(zero.dtype if zero else "float32", (rows, columns))
        case "MatMulNBits":
            return TensorType(need(0).dtype, (*need(0).shape[:-1], number("N", 0)))
    return None


def _concat(given: list[TensorType | None], axis: int) -> TensorType:
    parts = [kind for kind in given[2::3] if kind is not None]
    if not parts or not -len(parts[0].shape) <= axis < len(parts[0].shape):
        raise ModelError("it has no such axis; export the model again")
    shape = list(parts[0].shape)
    axis %= len(shape)
    if any(len(part.shape) != len(shape) for part in parts):
        raise ModelError("its operands differ in rank; export the model again")
    shape[axis] = sum(part.shape[axis] for part in parts)
    return TensorType(parts[0].dtype, tuple(shape))


def _reduced(kind: TensorType, axes: tuple[int, ...], keep: int) -> TensorType:
    rank = len(kind.shape)
    gone = {axis % rank for axis in axes} or set(range(rank))
    if keep:
        shape = tuple(1 if axis in gone else n for axis, n in enumerate(kind.shape))
    else:
        shape = tuple(n for axis, n in enumerate(kind.shape) if axis not in gone)
    return TensorType(kind.dtype, shape)


def _pool(kind: TensorType, attrs: Mapping[str, Any]) -> TensorType:
    """As AveragePool; channels last where the node says so."""
    last = bool("channels_last" in attrs and attrs["channels_last"].i)
    spatial = kind.shape[1:-1] if last else kind.shape[2:]
    rank = len(spatial)
    kernel = tuple(attrs["kernel_shape"].ints) if "kernel_shape" in attrs else ()
    if len(kernel) != rank:
        raise ModelError(f"its window has {len(kernel)} axes; export the model again")
    strides = tuple(attrs["strides"].ints) if "strides" in attrs else (1,) * rank
    pads = tuple(attrs["pads"].ints) if "pads" in attrs else (0,) * 2 * rank
    auto = attrs["auto_pad"].s.decode() if "auto_pad" in attrs else "NOTSET"
    up = bool("ceil_mode" in attrs and attrs["ceil_mode"].i)
    out = []
    for axis, extent in enumerate(spatial):
        if auto.startswith("SAME"):
            out.append(-(-extent // strides[axis]))
            continue
        padded = extent + (0 if auto == "VALID" else pads[axis] + pads[axis + rank])
        reach = padded - kernel[axis]
        steps = -(-reach // strides[axis]) if up else reach // strides[axis]
        if up and steps * strides[axis] >= extent + pads[axis]:
            steps -= 1  # a window must start inside
        out.append(steps + 1)
    if min(out, default=1) < 1:
        raise ModelError("its window exceeds the picture; export the model again")
    shape = (kind.shape[0], *out, kind.shape[-1]) if last else (*kind.shape[:2], *out)
    return TensorType(kind.dtype, shape)
