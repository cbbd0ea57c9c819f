"""Door to onnx: look into a reference model: expose inner values, cut parts out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mpqc.errors import GraphError, ModelError
from mpqc.graph import TensorType
from mpqc.onnx_nodes import element_type


def expose(model: bytes, values: Mapping[str, TensorType]) -> bytes:
    """Add inner values to a model's outputs, behind those that it has.

    Args:
        model: a serialized model.
        values: name -> type of each value; a value that is an output already stays one.

    Raises:
        GraphError: the model has no such inner value.
    """
    proto = _parse(model)
    defined = {name for node in proto.graph.node for name in node.output}
    if strangers := sorted(values.keys() - defined):
        raise GraphError(f"the reference has no value named {strangers[0]!r}; compile again")
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(_info(n, kind) for n, kind in values.items() if n not in known)
    return bytes(proto.SerializeToString(deterministic=True))


def extract(model: bytes, known: Mapping[str, TensorType], result: str, kind: TensorType) -> bytes:
    """The part of a model that computes one value from the nearest known ones.

    Args:
        model: a serialized model.
        known: values that may be fed, with their types; ``result`` itself never is.
        result: value to compute.
        kind: its type.

    Returns:
        A model whose inputs are those known values that the result really depends on.

    Raises:
        GraphError: the result has no producer, or depends on an input that is not known.
    """
    proto = _parse(model)
    producers = {name: node for node in proto.graph.node for name in node.output if name}
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    if result not in producers:
        raise GraphError(f"the reference does not compute {result!r}; compile again")
    fed, used, kept = [], set(), set()
    waiting, seen = [result], {result}
    while waiting:
        value = waiting.pop()
        if value in known and value != result:
            fed.append(value)
        elif value in constants:
            used.add(value)
        elif value in producers:
            node = producers[value]
            kept.add(id(node))
            fresh = [name for name in node.input if name and name not in seen]
            seen.update(fresh)
            waiting += fresh
        else:
            raise GraphError(f"{result!r} depends on {value!r}, which nobody knows")
    part = helper.make_graph(
        [node for node in proto.graph.node if id(node) in kept],
        "part",
        [_info(name, known[name]) for name in sorted(fed)],
        [_info(result, kind)],
        [constants[name] for name in sorted(used)],
    )
    whole = helper.make_model(part, opset_imports=proto.opset_import)
    whole.ir_version = proto.ir_version
    return bytes(whole.SerializeToString(deterministic=True))


def open_batch(model: bytes, name: str = "N") -> bytes:
    """Let the first axis of inputs and outputs be of any extent; inner types are dropped."""
    proto = _parse(model)
    for info in (*proto.graph.input, *proto.graph.output):
        if info.type.tensor_type.shape.dim:
            info.type.tensor_type.shape.dim[0].dim_param = name
    del proto.graph.value_info[:]
    return bytes(proto.SerializeToString(deterministic=True))


def operators(model: bytes) -> frozenset[str]:
    """Operator types in a model."""
    return frozenset(node.op_type for node in _parse(model).graph.node)


def values(model: bytes) -> frozenset[str]:
    """Names of the values that a model computes."""
    return frozenset(name for node in _parse(model).graph.node for name in node.output if name)


def quantized_ranges(model: bytes) -> dict[str, tuple[float, float]]:
    """Range that each input's quantizer covers, of the inputs that are quantized directly.

    Reads the form in which ``onnx_export`` writes Quantize: Div, Round, Add, Clip.

    Returns:
        Input name -> (low, high) in the input's units; the widest, where quantizers differ.
    """
    graph = _parse(model).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        readers.setdefault(node.input[0] if node.input else "", []).append(node)

    def number(name: str) -> float:
        return float(numpy_helper.to_array(constants[name]).reshape(()))

    ranges: dict[str, tuple[float, float]] = {}
    for entry in graph.input:
        for divide in readers.get(entry.name, []):
            chain = [divide]
            for _ in range(3):
                chain += readers.get(chain[-1].output[0], [])[:1]
            if [node.op_type for node in chain] != ["Div", "Round", "Add", "Clip"]:
                continue
            operands = [name for node in chain for name in node.input[1:]]
            if not set(operands) <= constants.keys():
                continue
            scale, zero_point, low, high = map(number, operands)
            before = ranges.get(entry.name, (np.inf, -np.inf))
            ranges[entry.name] = (
                min(before[0], (low - zero_point) * scale),
                max(before[1], (high - zero_point) * scale),
            )
    return ranges


def _parse(model: bytes) -> Any:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(model)
    except Exception as error:  # protobuf's DecodeError, whichever implementation is installed
        raise ModelError("the reference model is damaged; compile again") from error
    return proto


def _info(name: str, kind: TensorType) -> Any:
    return helper.make_tensor_value_info(name, element_type(kind.dtype), kind.shape)
