"""Reader of the graph's text form."""

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mpqc.errors import GraphError
from mpqc.graph import Array, Attribute, Graph, Node, TensorType

_LINE = re.compile(
    r"(?P<outs>[^=]+?)\s*=\s*(?P<op>[\w.:]+)\((?P<args>[^)]*)\)"
    r"(?:\s*\{(?P<attrs>.*)\})?\s*:\s*(?P<types>[^@]+?)(?:\s*@(?P<name>\S+))?\s*"
)


def parse_graph(text: str, constants: Mapping[str, Array]) -> Graph:
    """Build the graph that ``str(graph)`` printed; see ``Graph.parse``."""
    inputs: dict[str, TensorType] = {}
    arrays: dict[str, Array] = {}
    nodes: list[Node] = []
    types: dict[str, TensorType] = {}
    outputs: list[str] = []
    for raw in text.strip().splitlines():
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        if line.startswith("return "):
            outputs = _values(line.removeprefix("return "))
            continue
        match = _LINE.fullmatch(line)
        if not match:
            raise GraphError(f"cannot read line: {line}")
        outs, kinds = _values(match["outs"]), _types(match["types"])
        attrs = _attributes(match["attrs"] or "")
        if match["op"] == "Input":
            inputs[outs[0]] = kinds[0]
        elif match["op"] == "Constant":
            arrays[outs[0]] = _constant(outs[0], kinds[0], attrs, constants)
        else:
            named = [value for value in outs if value]
            types.update(zip(named, kinds, strict=True))
            name = match["name"] or outs[0]
            nodes.append(Node(name, match["op"], tuple(_values(match["args"])), tuple(outs), attrs))
    return Graph(inputs, outputs, nodes, arrays, types)


def _values(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    return ["" if word in ("_", "%") else word.removeprefix("%") for word in words]


def _types(text: str) -> list[TensorType]:
    return [TensorType.parse(word) for word in re.findall(r"\w+\[[\d,\s]*\]", text)]


def _attributes(text: str) -> dict[str, Attribute]:
    attrs: dict[str, Attribute] = {}
    for key, value in re.findall(r'(\w+)=(\[[^\]]*\]|"[^"]*"|[^,\s]+)', text):
        parsed: Any = json.loads(value)
        attrs[key] = tuple(parsed) if isinstance(parsed, list) else parsed
    return attrs


def _constant(
    name: str, kind: TensorType, attrs: Mapping[str, Attribute], given: Mapping[str, Array]
) -> Array:
    if name in given:
        array = np.asarray(given[name])
        if TensorType.of(array) != kind:
            raise GraphError(f"constant {name}: {TensorType.of(array)} given for {kind}")
        return array
    if "value" in attrs:
        return np.asarray(attrs["value"], kind.dtype).reshape(kind.shape)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if kind.dtype.startswith("float"):
        return rng.standard_normal(kind.shape).astype(kind.dtype)
    return rng.integers(0, 2, kind.shape).astype(kind.dtype)
