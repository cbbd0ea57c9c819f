"""A compiled model beside the quantized file that it came from.

Tools write quantized models as float operators between quantizers, and ONNX Runtime computes them
that way: a float sum before a quantizer is rounded at every step, where the compiled model has the
exact integer. The two agree on a code unless that float sum lies at the border of two codes. So
every quantizer is computed once more, in ONNX Runtime, from what the *compiled* model had before
it: its codes have to be equal, or one step apart where the float value is at a border (a tie).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpqc.graph import Array, Graph, Node, TensorType

BORDER = 1e-3  # steps between a float value and the border of two codes that rounding may cross


@dataclass(frozen=True)
class OriginalRow:
    """One quantized value, over all samples.

    Attributes:
        value: name in the model.
        codes: compared.
        ties: one step apart, where the float value lies at the border of two codes.
        wrong: apart in any other way.
    """

    value: str
    codes: int
    ties: int
    wrong: int


@dataclass(frozen=True)
class Original:
    """The compiled model beside the quantized model that was compiled.

    Attributes:
        file: name of the original.
        samples: compared.
        rows: one a quantized value, in order of computation.
        difference: largest difference of the outputs from ONNX Runtime's, of their largest
            magnitude; a tie inside moves them too.
        whole: whether ONNX Runtime ran the file itself; else its quantizers were written in
            standard operators.
    """

    file: str
    samples: int
    rows: tuple[OriginalRow, ...]
    difference: float
    whole: bool

    @property
    def passed(self) -> bool:
        return not any(row.wrong for row in self.rows)

    @property
    def codes(self) -> int:
        return sum(row.codes for row in self.rows)

    @property
    def ties(self) -> int:
        return sum(row.ties for row in self.rows)

    @property
    def message(self) -> str:
        """One sentence for people."""
        bad = [row for row in self.rows if row.wrong]
        if bad:
            text = f"{sum(row.wrong for row in bad)} codes differ, first in {bad[0].value!r}"
        elif not self.rows:
            text = "no quantized value inside is kept in memory, outputs alone are compared"
        else:
            equal = "all equal" if not self.ties else f"equal but for {self.ties} rounding ties"
            text = f"{self.codes} codes of {len(self.rows)} quantized values {equal}"
            text += f" ({self.samples} samples)"
        text += (
            "; outputs equal"
            if not self.difference
            else (f"; outputs within {self.difference:.2g} of their largest magnitude")
        )
        if not self.whole:
            text += " (ONNX Runtime runs it with its quantizers in standard operators)"
        return text


@dataclass
class OriginalComparison:
    """Sums up, sample by sample, how a compiled model follows its quantized original.

    Args:
        name: of the file that was compiled.
        graph: its operators in float between its quantizers.
        session: the file in ONNX Runtime, or that graph in standard operators.
        whole: whether it is the file.
        reference: the integer model that the compiled one equals; gives the codes that never
            leave a kernel.
        known: values that can be read in the compiled model, and its inputs.
        outputs: of the compiled model.
    """

    name: str
    graph: Graph
    session: Any
    whole: bool
    reference: bytes
    known: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    rows: dict[str, OriginalRow] = field(default_factory=dict)
    samples: int = 0
    difference: float = 0.0

    def __post_init__(self) -> None:
        from mpqc.onnx_export import to_onnx
        from mpqc.onnx_parts import values

        self._form = to_onnx(self.graph)
        inside = values(self.reference)
        self._codes = {
            node.output: self.graph.type(node.output)
            for node in self.graph
            if node.op == "Quantize"
            and (node.output in inside or node.output in self.known)
            and self.known.get(node.output, TensorType("uint8", ())).dtype == "uint8"
        }
        self._codes |= self.graph.inputs
        self._parts: dict[tuple[bytes, str], Any] = {}

    def add(self, own: Mapping[str, Array], feed: Mapping[str, Array], valid: int) -> None:
        """One feed.

        Args:
            own: the compiled model's values: inputs, those inside, outputs.
            feed: its inputs.
            valid: samples in the feed.
        """
        self.samples += valid
        own = dict(own)
        for node in self.graph:
            if node.op != "Quantize" or node.output not in self._codes:
                continue
            if node.output not in own:
                own[node.output] = self._run(self.reference, node.output, self.known, own)
            self._count(self._judge(node, own))
        for name, array in self.session.run(feed, list(self.outputs)).items():
            largest = float(np.abs(array.astype(np.float64)).max(initial=0)) or 1.0
            apart = np.abs(own[name].astype(np.float64) - array.astype(np.float64))
            self.difference = max(self.difference, float(apart.max(initial=0)) / largest)

    def result(self) -> Original:
        """What was found."""
        rows = tuple(self.rows.values())
        return Original(self.name, self.samples, rows, self.difference, self.whole)

    def _count(self, row: OriginalRow) -> None:
        before = self.rows.get(row.value, OriginalRow(row.value, 0, 0, 0))
        self.rows[row.value] = OriginalRow(
            row.value, before.codes + row.codes, before.ties + row.ties, before.wrong + row.wrong
        )

    def _judge(self, node: Node, own: Mapping[str, Array]) -> OriginalRow:
        """The codes of one quantizer, computed from what the compiled model had before it."""
        value = self._run(self._form, node.inputs[0], self._codes, own)
        zero_point = node.int_attr("zero_point")
        top = 2 ** node.int_attr("bits") - 1
        low, high = node.int_attr("low", 0), node.int_attr("high", top)
        steps = value.astype(np.float64) / np.float64(np.float32(node.float_attr("scale")))
        wanted = np.clip(np.rint(steps) + zero_point, low, high)
        apart = np.abs(own[node.output].astype(np.int64) - wanted)
        border = np.abs(np.abs(steps - np.floor(steps)) - 0.5)
        tied = (apart == 1) & (border <= BORDER * np.maximum(1, np.abs(steps)))
        count = int(tied.sum())
        return OriginalRow(node.output, apart.size, count, int((apart != 0).sum()) - count)

    def _run(
        self, model: bytes, value: str, known: Mapping[str, TensorType], own: Mapping[str, Array]
    ) -> Array:
        """A value by ONNX Runtime, from the nearest ones of the compiled model."""
        from mpqc.onnx_parts import extract
        from mpqc.ort import Session

        if value in self.graph.inputs:
            return own[value]
        if (model, value) not in self._parts:
            part = extract(model, known, value, self.graph.type(value))
            self._parts[model, value] = Session(part)
        session = self._parts[model, value]
        found: Array = session.run({name: own[name] for name in session.inputs})[value]
        return found
