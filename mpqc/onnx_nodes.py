"""Door to onnx for single operators: types, attributes, shape inference, evaluation."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx.shape_inference
from onnx import helper, numpy_helper

from mpqc.errors import ModelError
from mpqc.graph import Array, Attribute, Node, TensorType
from mpqc.tensor_type import SHORT_NAMES

MAX_INFERENCE_ELEMENTS = 1 << 16  # larger constants are no shapes, axes or counts

# The reference evaluator lacks or mistakes these at older opsets; their meaning is the same.
_EVALUATED_SINCE = {"BatchNormalization": 15, "QuantizeLinear": 19, "DequantizeLinear": 19}

_DEFAULT_DOMAINS = ("", "ai.onnx")


def split_op(op: str) -> tuple[str, str]:
    """Domain and operator type of ``Node.op``."""
    domain, _, kind = op.rpartition("::")
    return domain, kind


def join_op(domain: str, kind: str) -> str:
    """``Node.op`` of a domain's operator type."""
    return kind if domain in _DEFAULT_DOMAINS else f"{domain}::{kind}"


def element_type(dtype: str) -> int:
    """ONNX's number of an element type that the IR names as numpy does."""
    if dtype == "string":
        return int(onnx.TensorProto.STRING)
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def dtype_name(elem_type: int) -> str | None:
    """The IR's name of an ONNX element type; None for one that the IR does not have."""
    if elem_type == onnx.TensorProto.BFLOAT16:
        return "bfloat16"
    try:
        name = str(helper.tensor_dtype_to_np_dtype(elem_type))
    except KeyError:
        return None
    return name if name in SHORT_NAMES else None


def type_proto(kind: TensorType) -> Any:
    """The type as ONNX spells it."""
    return helper.make_tensor_type_proto(element_type(kind.dtype), kind.shape)


def tensor_type(proto: Any) -> TensorType | None:
    """The static type a TypeProto stands for; None when anything of it is open."""
    if not proto.HasField("tensor_type") or not proto.tensor_type.HasField("shape"):
        return None
    dtype = dtype_name(proto.tensor_type.elem_type)
    extents = proto.tensor_type.shape.dim
    if dtype is None or any(not dim.HasField("dim_value") or dim.dim_value < 0 for dim in extents):
        return None
    return TensorType(dtype, tuple(dim.dim_value for dim in extents))


def refuse_element_type(value: str, proto: Any) -> None:
    """Say of a tensor's TypeProto that the IR has no such element type, if it has none.

    Raises:
        ModelError: an 8-bit float, a complex number or the like.
    """
    kind = proto.tensor_type.elem_type if proto.HasField("tensor_type") else 0
    if kind and dtype_name(kind) is None:
        name = onnx.TensorProto.DataType.Name(kind)
        raise ModelError(f"its output {value} has the element type {name}, which is not compiled")


def attribute_value(attribute: Any) -> Attribute:
    """The IR's form of an ONNX attribute.

    Raises:
        ModelError: a subgraph, a type proto, a sparse tensor: the IR has no such attributes.
    """
    kinds = onnx.AttributeProto
    match attribute.type:
        case kinds.INT:
            return int(attribute.i)
        case kinds.FLOAT:
            return float(attribute.f)
        case kinds.STRING:
            return str(attribute.s.decode("utf-8", "replace"))
        case kinds.INTS:
            return tuple(attribute.ints)
        case kinds.FLOATS:
            return tuple(attribute.floats)
        case kinds.STRINGS:
            return tuple(s.decode("utf-8", "replace") for s in attribute.strings)
        case kinds.TENSOR:
            return np.asarray(numpy_helper.to_array(attribute.t))
    raise ModelError(f"attribute {attribute.name} is of a kind that cannot be compiled")


def node_proto(node: Node) -> Any:
    """The node as ONNX spells it."""
    domain, kind = split_op(node.op)
    proto = helper.make_node(kind, node.inputs, node.outputs, name=node.name, domain=domain)
    for key, value in sorted(node.attrs.items()):
        proto.attribute.append(_attribute_proto(key, value))
    return proto


def _attribute_proto(key: str, value: Attribute) -> Any:
    if isinstance(value, np.ndarray):
        return helper.make_attribute(key, numpy_helper.from_array(np.ascontiguousarray(value), key))
    if isinstance(value, tuple) and not value:
        return helper.make_attribute(key, value, attr_type=onnx.AttributeProto.INTS)
    return helper.make_attribute(key, value)


def infer(
    proto: Any,
    types: Mapping[str, TensorType],
    constants: Mapping[str, Array],
    opsets: Mapping[str, int],
) -> dict[str, Any]:
    """TypeProtos of a node's outputs, by ONNX's own shape inference for that operator.

    Raises:
        ModelError: no such operator at that opset, or operands that it refuses.
    """
    domain = "" if proto.domain in _DEFAULT_DOMAINS else proto.domain
    try:
        schema = onnx.defs.get_schema(proto.op_type, opsets.get(domain, 1), domain)
    except onnx.defs.SchemaError as error:
        raise ModelError(
            f"no operator {join_op(domain, proto.op_type)} in opset {opsets.get(domain)}"
        ) from error
    operands = {name for name in proto.input if name}
    values = {
        name: numpy_helper.from_array(np.ascontiguousarray(constants[name]), name)
        for name in operands & constants.keys()
        if constants[name].size <= MAX_INFERENCE_ELEMENTS and constants[name].dtype != object
    }
    context = onnx.checker.DEFAULT_CONTEXT
    context.opset_imports = dict(opsets)
    try:
        onnx.checker.check_node(proto, context)
        found: dict[str, Any] = onnx.shape_inference.infer_node_outputs(
            schema,
            proto,
            {name: type_proto(types[name]) for name in operands},
            values,
            opset_imports=[helper.make_opsetid(key, version) for key, version in opsets.items()],
        )
    except Exception as error:  # the C++ checker raises many kinds
        raise ModelError(f"{join_op(domain, proto.op_type)}: {_first_line(error)}") from error
    return found


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def evaluate(node: Node, operands: Sequence[Array | None], opset: int) -> tuple[Array, ...]:
    """Compute one float operator by ONNX's reference evaluator (numpy).

    Args:
        node: with default-domain operator and static attributes.
        operands: in the order of ``node.inputs``; None where an operand is absent.
        opset: of the default domain.

    Returns:
        One array per output of the node.
    """
    return evaluate_proto(node_proto(node), operands, opset)


def evaluate_proto(proto: Any, operands: Iterable[Array | None], opset: int) -> tuple[Array, ...]:
    """As ``evaluate``, for a NodeProto."""
    names = [name for name in proto.input]
    outputs = [name for name in proto.output if name]
    feeds = {name: array for name, array in zip(names, operands, strict=True) if array is not None}
    if proto.op_type == "GlobalMaxPool":  # the evaluator reduces the wrong axes of 1-D pictures
        (x,) = feeds.values()
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)
    opset = max(opset, _EVALUATED_SINCE.get(proto.op_type, opset))
    graph = helper.make_graph(
        [proto],
        "one",
        [helper.make_empty_tensor_value_info(name) for name in feeds],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            found = onnx.reference.ReferenceEvaluator(model).run(outputs, feeds)
    except Exception as error:  # whatever numpy or the evaluator says about these operands
        raise ModelError(
            f"cannot compute {proto.op_type} {proto.name or outputs[0]!r}: {_first_line(error)}"
        ) from error
    return tuple(np.asarray(array) for array in found)
