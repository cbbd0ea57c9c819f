"""plan.json: the width of every quantized layer, bound to one model by its hash."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mpqc.errors import OutputError, PlanError
from mpqc.graph import Graph, Precision
from mpqc.passes.find_layers import (
    Layer,
    find_float_layers,
    find_layers,
    first_layers,
    last_layers,
    tied_groups,
)

Bits = Annotated[int, Field(ge=1, le=8)]
ChannelBits = Annotated[int, Field(ge=0, le=8)]
Kernel = Literal["auto", "bitplane", "bitplane-lut", "int8"]


class _Section(BaseModel):
    """Unknown keys are errors, and a number is a number: ``"2"`` and ``true`` are not."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LayerPlan(_Section):
    """Widths of one layer.

    Attributes:
        weight_bits: 1 to 8, or one width an output channel; channels of width 0 are pruned: their
            weights are zero.
        activation_bits: 1 to 8, of the layer's input.
        kernel: ``auto`` takes the fastest as measured.
    """

    weight_bits: Bits | tuple[ChannelBits, ...]
    activation_bits: Bits
    kernel: Kernel = "auto"

    @field_validator("weight_bits")
    @classmethod
    def _some_channel(cls, bits: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if not isinstance(bits, int) and not any(bits):
            raise ValueError("a layer cannot lose all its channels: give one a width above 0")
        return bits

    @property
    def widest(self) -> int:
        """The widest weight of the layer in bits."""
        return self.weight_bits if isinstance(self.weight_bits, int) else max(self.weight_bits)

    def channel_bits(self, channels: int) -> tuple[int, ...]:
        """Weight width of each output channel."""
        if isinstance(self.weight_bits, int):
            return (self.weight_bits,) * channels
        return self.weight_bits

    @property
    def text(self) -> str:
        """Widths as people write them: ``w2a4``, and ``w0-4a3`` where channels differ."""
        low = self.widest if isinstance(self.weight_bits, int) else min(self.weight_bits)
        weights = str(low) if low == self.widest else f"{low}-{self.widest}"
        return f"w{weights}a{self.activation_bits}"

    @property
    def counts(self) -> dict[int, int]:
        """Width -> output channels of that width, where they differ."""
        if isinstance(self.weight_bits, int):
            return {}
        return {bits: self.weight_bits.count(bits) for bits in sorted(set(self.weight_bits))}


class TensorPlan(_Section):
    """Width of a value that float operators read too, such as a residual stream."""

    bits: Bits


class SearchRecord(_Section):
    """How the plan came about. Budgets and costs in bytes, BitOPs and seconds."""

    method: str
    budget: dict[str, float] = {}
    cost: dict[str, float] = {}
    seed: int = 0
    version: str = ""


class Plan(_Section):
    """Layers that are not named stay float."""

    mpqc_plan: Literal[1] = 1
    model_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    layers: dict[str, LayerPlan]
    tensors: dict[str, TensorPlan] = {}
    search: SearchRecord | None = None

    @property
    def narrow(self) -> bool:
        """Whether any layer has less than eight bits."""
        return any(
            min(layer.activation_bits, *layer.channel_bits(1)) < 8 for layer in self.layers.values()
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read plan.json.

        Raises:
            PlanError: missing, not JSON, an unknown key, a width out of range.
        """
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, source: str = "plan") -> Self:
        """Read the text of a plan.json; ``source`` stands in error messages."""
        try:
            plan = cls.model_validate_json(text)
            json.loads(text, object_pairs_hook=_unique)
        except ValidationError as error:
            raise PlanError(f"{source} is not a plan: {_first(error)}") from error
        except ValueError as error:
            raise PlanError(f"{source} is not a plan: {error}") from error
        return plan

    def text(self) -> str:
        """JSON as ``save`` writes it: stable, one layer a line."""
        body = self.model_dump(mode="json", exclude_none=True)
        if not self.tensors:
            del body["tensors"]
        sections = []
        for key, value in body.items():
            if key in ("layers", "tensors") and value:
                rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
                sections.append(f' "{key}": {{\n{rows}\n }}')
            else:
                sections.append(f' "{key}": {json.dumps(value)}')
        return "{\n" + ",\n".join(sections) + "\n}\n"

    def save(self, path: str | Path) -> None:
        """Write plan.json.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            Path(path).write_text(self.text(), "utf-8")
        except OSError as error:
            raise OutputError(f"cannot write the plan {path}: {error}") from error

    @classmethod
    def uniform(
        cls,
        graph: Graph,
        precision: Precision,
        first_last: Precision | None = Precision(8, 8),  # noqa: B008 - frozen
        *,
        classifier: Precision | None = None,
        model_sha256: str = "0" * 64,
    ) -> Self:
        """One precision for the body.

        Args:
            graph: the folded float graph.
            precision: of every layer between the ends.
            first_last: of the layers that no layer feeds and of those that feed none (the
                classifier, every head of a detector); None: as the body. A layer that shares
                its input with one of them takes the wider activation of the two.
            classifier: of the last layers alone, where it differs; the cost tables of the
                papers give the classifier the body's activations.
            model_sha256: of the model file.
        """
        widths = {layer.name: precision for layer in find_layers(graph)}
        if first_last is not None:
            widths |= dict.fromkeys((*last_layers(graph), *first_layers(graph)), first_last)
        if classifier is not None:
            widths |= dict.fromkeys(last_layers(graph), classifier)
        return cls.of(graph, widths, model_sha256=model_sha256)

    @classmethod
    def of(
        cls,
        graph: Graph,
        widths: dict[str, Precision],
        *,
        model_sha256: str = "0" * 64,
        search: SearchRecord | None = None,
    ) -> Self:
        """A plan from layer names to precisions; tied layers take their widest activation."""
        layers = {}
        for group in tied_groups(find_layers(graph)):
            planned = [name for name in group if name in widths]
            for name in planned:
                activation = max(widths[other].activation for other in planned)
                layers[name] = LayerPlan(
                    weight_bits=widths[name].weight, activation_bits=activation
                )
        if strangers := sorted(widths.keys() - layers.keys()):
            raise PlanError(f"not quantizable layers of this model: {', '.join(strangers)}")
        ordered = {
            layer.name: layers[layer.name] for layer in find_layers(graph) if layer.name in layers
        }
        return cls(model_sha256=model_sha256, layers=ordered, search=search)

    def with_tensors(self, values: Iterable[str], bits: int) -> "Plan":
        """This plan with those values narrowed too; what it narrows already stays."""
        added = {value: TensorPlan(bits=bits) for value in values}
        return self.model_copy(update={"tensors": {**added, **self.tensors}})

    def check(self, graph: Graph, sha256: str | None, force: bool = False) -> None:
        """Refuse a plan of another model.

        Args:
            graph: the folded float graph.
            sha256: of the model file; None where it is not known.
            force: let the hash differ; names, channels and ties have to fit all the same.

        Raises:
            PlanError: names everything that does not fit.
        """
        if sha256 is not None and self.model_sha256 != sha256 and not force:
            raise PlanError(
                f"the plan was made for the model {self.model_sha256[:12]}, this one is "
                f"{sha256[:12]}; search again, or use --force where the layer names fit"
            )
        layers = {layer.name: layer for layer in find_layers(graph)}
        problems = [*self._strangers(graph, layers), *self._misfits(layers)]
        problems += [
            f"tensor {name!r} is not a float32 value of this model"
            for name in self.tensors
            if name not in graph.types or graph.type(name).dtype != "float32"
        ]
        if problems:
            raise PlanError("the plan does not fit the model: " + "; ".join(problems))

    def _strangers(self, graph: Graph, layers: dict[str, Layer]) -> list[str]:
        reasons = {layer.name: layer.reason for layer in find_float_layers(graph)}
        return [
            f"{name!r} cannot be quantized: {reasons[name]}"
            if name in reasons
            else f"{name!r} is not a layer of this model"
            for name in self.layers
            if name not in layers
        ]

    def _misfits(self, layers: dict[str, Layer]) -> list[str]:
        problems = []
        widths: dict[str, tuple[str, int]] = {}
        for name, planned in self.layers.items():
            if name not in layers:
                continue
            layer = layers[name]
            listed = len(planned.channel_bits(layer.channels_out))
            if listed != layer.channels_out:
                problems.append(
                    f"{name!r} lists {listed} weight widths for {layer.channels_out} "
                    "output channels"
                )
            other, bits = widths.setdefault(layer.input, (name, planned.activation_bits))
            if bits != planned.activation_bits:
                problems.append(
                    f"{name!r} and {other!r} share the input {layer.input!r} but ask for "
                    f"{planned.activation_bits} and {bits} activation bits"
                )
        return problems

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """JSON schema of plan.json."""
        return Plan.model_json_schema()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A plan that names a layer twice would silently lose one."""
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"key {twice[0]!r} stands twice")
    return dict(pairs)


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"])) or "file"
    more = error.error_count() - 1
    return f"{where}: {problem['msg']}" + (f" (and {more} more)" if more else "")
