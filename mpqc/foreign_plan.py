"""Bitwidths that other tools chose, read as plans.

Two kinds of files say a width for each tensor of an ONNX model:

- ONNX Runtime's ``TensorQuantOverrides`` (``extra_options`` of its quantizers) as JSON: tensor
  name -> list of ``{"quant_type": "QInt4", ...}``, one entry a tensor or a channel;
- AIMET's encodings, versions 0.5 and 0.6 (``activation_encodings`` and ``param_encodings`` as
  mappings), 1.0 (as lists with ``name`` and ``bw``) and 2.0 (``encodings`` with
  ``output_dtype``).

A plan holds widths and no ranges: scales and offsets of these files are not taken over, mpqc
calibrates them on data as for any plan.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mpqc import importer
from mpqc.errors import PlanError
from mpqc.graph import Graph, Node
from mpqc.passes.find_layers import find_layers, tied_groups
from mpqc.passes.moves import moves
from mpqc.pipeline import import_model
from mpqc.plan import LayerPlan, Plan, SearchRecord

# Tensor -> bits of each of its channels, or of all at once; None where it stays in float.
Widths: TypeAlias = dict[str, tuple[int, ...] | None]


@dataclass(frozen=True)
class ForeignPlan:
    """A plan, and what of the file it could not take over.

    Attributes:
        plan: widths of the layers whose weights and inputs both have one.
        source: "TensorQuantOverrides" or "AIMET encodings".
        floats: layer -> why it stays in float.
    """

    plan: Plan
    source: str
    floats: Mapping[str, str]

    @property
    def message(self) -> str:
        """One line for people."""
        text = f"{self.source}: widths of {len(self.plan.layers)} layers"
        if not self.floats:
            return text
        first, reason = next(iter(self.floats.items()))
        more = f" and {len(self.floats) - 1} more" if len(self.floats) > 1 else ""
        return f"{text}; in float: {first} ({reason}){more}"


def load_plan(
    path: str | Path, model: str | Path, dims: Mapping[str, int] | None = None
) -> tuple[Plan, ForeignPlan | None]:
    """Read plan.json, or the widths that another tool wrote for the same model.

    Args:
        path: JSON file of any of the kinds.
        model: ONNX file that it is about.
        dims: values of the model's symbolic dimensions.

    Returns:
        The plan, and where it is from unless it is a plan.json.

    Raises:
        PlanError: missing, not JSON, of no known kind, or without a width for any layer.
    """
    content = _read(Path(path))
    if not isinstance(content, dict) or "mpqc_plan" in content:
        return Plan.load(path), None
    source, widths = _widths(content, str(path))
    found = _plan(source, widths, Path(model), dims)
    if not found.plan.layers:
        reason = next(iter(found.floats.values()), "the model has no layer to quantize")
        raise PlanError(f"{path} ({source}) gives no layer of {model} its widths: {reason}")
    return found.plan, found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the plan {path}: {error}") from error
    except ValueError as error:
        raise PlanError(f"{path} is not a plan: it is not JSON: {error}") from error


def _widths(content: dict[str, Any], path: str) -> tuple[str, Widths]:
    if "activation_encodings" in content or "param_encodings" in content:
        sections = [content.get(key, {}) for key in ("activation_encodings", "param_encodings")]
        return "AIMET encodings", {
            name: bits for section in sections for name, bits in _aimet(section, path)
        }
    if "encodings" in content:
        return "AIMET encodings", dict(_aimet(content["encodings"], path))
    if content and all(_is_override(value) for value in content.values()):
        return "TensorQuantOverrides", {
            name: _common(map(_override_bits, entries)) for name, entries in content.items()
        }
    raise PlanError(
        f"{path} is no plan.json (no key 'mpqc_plan'), no AIMET encodings (no key "
        "'param_encodings' or 'encodings') and no TensorQuantOverrides (tensor -> list of "
        "entries)"
    )


def _aimet(section: Any, path: str) -> Iterable[tuple[str, tuple[int, ...] | None]]:
    """Tensor and widths of a section: a mapping before version 1.0, a list after."""
    if isinstance(section, dict):
        entries = [(name, found) for name, found in section.items()]
    elif isinstance(section, list):
        entries = [
            (entry.get("name"), [entry]) if isinstance(entry, dict) else (None, [])
            for entry in section
        ]
    else:
        raise PlanError(f"{path}: encodings are neither a mapping nor a list")
    for name, found in entries:
        found = [found] if isinstance(found, dict) else found
        if not isinstance(name, str) or not isinstance(found, list) or not found:
            raise PlanError(f"{path}: an encoding without a name or without entries")
        if not all(isinstance(entry, dict) for entry in found):
            raise PlanError(f"{path}: the encoding of {name!r} is not a list of entries")
        yield name, _common(_aimet_bits(name, entry, path) for entry in found)


def _aimet_bits(name: str, entry: dict[str, Any], path: str) -> int | None:
    if "output_dtype" in entry:  # 2.0: "int4", "uint8", "float16"
        return _type_bits(str(entry["output_dtype"]))
    if str(entry.get("dtype", "int")).lower() != "int":
        return None
    bits = entry.get("bitwidth", entry.get("bw"))
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise PlanError(f"{path}: the encoding of {name!r} has no integer 'bitwidth' or 'bw'")
    return bits


def _is_override(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(e, dict) for e in value)


def _override_bits(entry: dict[str, Any]) -> int | None:
    """Bits of an entry; ONNX Runtime's default type has eight."""
    kind = entry.get("quant_type")
    return 8 if kind is None else _type_bits(str(kind).rpartition(".")[2])


def _type_bits(kind: str) -> int | None:
    """``QInt4``, ``uint8`` -> bits; None for types that are no integers."""
    match = re.fullmatch(r"q?u?int(\d+)", kind.strip().lower())
    return int(match[1]) if match else None


def _common(bits: Iterable[int | None]) -> tuple[int, ...] | None:
    """Widths of the channels, one where all are equal; None where any is float."""
    found = tuple(bits)
    if any(width is None for width in found):
        return None
    whole = tuple(width for width in found if width is not None)
    return whole[:1] if len(set(whole)) == 1 else whole


def _plan(source: str, widths: Widths, model: Path, dims: Mapping[str, int] | None) -> ForeignPlan:
    original = importer.load(model, dims)  # weights still have the file's names
    graph = import_model(model, dims)
    chosen: dict[str, LayerPlan] = {}
    floats: dict[str, str] = {}
    layers = find_layers(graph)
    for layer in layers:
        if layer.name not in original:
            floats[layer.name] = "it is not a node of the file"
            continue
        node = original[layer.name]
        weight, data = _weight_bits(original, node, widths), _input_bits(original, node, widths)
        channels = layer.channels_out
        if isinstance(weight, str) or isinstance(data, str):
            floats[layer.name] = weight if isinstance(weight, str) else str(data)
        elif len(weight) not in (1, channels):
            floats[layer.name] = f"{len(weight)} widths for {channels} output channels"
        else:
            chosen[layer.name] = LayerPlan(
                weight_bits=weight[0] if len(weight) == 1 else weight, activation_bits=max(data)
            )
    for group in tied_groups(layers):
        planned = [name for name in group if name in chosen]
        for name in planned:
            widest = max(chosen[other].activation_bits for other in planned)
            chosen[name] = chosen[name].model_copy(update={"activation_bits": widest})
    plan = Plan(
        model_sha256=importer.sha256(model),
        layers={layer.name: chosen[layer.name] for layer in layers if layer.name in chosen},
        search=SearchRecord(method=source, budget={}, cost={}, seed=0, version=""),
    )
    return ForeignPlan(plan, source, floats)


def _weight_bits(graph: Graph, node: Node, widths: Widths) -> tuple[int, ...] | str:
    """Widths of the layer's weights, or why there are none."""
    return _checked(node.inputs[1], widths.get(node.inputs[1]), node.inputs[1] in widths, "weights")


def _input_bits(graph: Graph, node: Node, widths: Widths) -> tuple[int, ...] | str:
    """Widths of the value that the layer reads, or of what operators in between only move."""
    name = value = node.inputs[0]
    while name not in widths:
        producer = graph.producer(name)
        if producer is None or not (moves(producer) or producer.op == "Pad"):
            break
        name = producer.inputs[0]
    found = name if name in widths else value
    return _checked(found, widths.get(found), found in widths, "input")


def _checked(
    name: str, bits: tuple[int, ...] | None, listed: bool, what: str
) -> tuple[int, ...] | str:
    if not listed:
        return f"no width for its {what} {name!r}"
    if bits is None:
        return f"its {what} {name!r} stay in float"
    if not all(1 <= width <= 8 for width in bits):
        return f"its {what} {name!r} have {max(bits)} bits, beyond 8"
    return bits
