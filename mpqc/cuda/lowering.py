"""Lower a quantized, channels-last graph to kernels of a GPU.

The walk over the graph is ``lowering.Lowering``; what differs is the form of values between
layers (words of 32 one-bit codes, or of four bytes) and that kernels pad as they read.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import numpy as np

from mpqc.cuda import kernels
from mpqc.cuda.packing import direct_weights, product_weights
from mpqc.cuda.select import DIRECT, CudaChoice
from mpqc.epilogue import Epilogue
from mpqc.graph import Array, Node, TensorType
from mpqc.grouping import LAYERS
from mpqc.kernels import Kernel, Operand, Output, Shape
from mpqc.lowering import Lowering, Spec, as_conv_weight, layer_record
from mpqc.numerics import weight_codes
from mpqc.program import Tap
from mpqc.schedules import cuda_float


class CudaLowering(Lowering):
    """``Lowering`` for the target's GPU."""

    def _choice(self, node: Node) -> CudaChoice:
        choice = self.choices[node.name]
        assert isinstance(choice, CudaChoice)
        return choice

    def _schedule(self, func: Any) -> Any:
        return cuda_float.apply(func)

    def _elementwise(
        self, shape: Shape, operands: Sequence[Operand], outputs: Sequence[Output]
    ) -> Kernel:
        return kernels.elementwise_kernel(shape, operands, outputs)

    def _copy(self, source: str, result: str, kind: TensorType) -> None:
        kernel = kernels.copy_kernel(max(1, prod(kind.shape)), kind.dtype)
        self.program.buffers[result] = kind
        self._call(kernel, [source], [result], source, "copy")

    # -- forms of values

    def _form(self, value: str, reader: Node) -> str:
        if reader.op not in LAYERS or reader.inputs[0] != value:
            return "plain"
        choice = self._choice(reader)
        return "planes" if choice.kind == "bitplane" and _whole_words(choice) else "plain"

    def _fuses_planes(self, value: str, layer: Node | None, readers: Iterable[Node]) -> bool:
        if layer is not None and not _whole_columns(self._choice(layer)):
            return False
        return any(self._form(value, reader) == "planes" for reader in readers)

    def _words(self, node: Node, choice: CudaChoice) -> str:
        """Buffer with the layer's input as the kernel's words; kernels that make it run first."""
        value, (n, h, w, channels) = node.inputs[0], choice.source
        groups, pixels = choice.layer.groups, n * h * w
        if choice.variant == DIRECT:
            return self._value(value)
        if choice.kind == "bitplane":
            name = f"{value}.planes" if _whole_words(choice) else f"{value}.planes.g{groups}"
            if name not in self.program.buffers:
                kernel = kernels.pack_kernel(pixels, channels, groups, choice.layer.activation_bits)
                self._call(kernel, [self._value(value)], [name], value, "pack")
            return name
        if choice.layer.group_in % kernels.QUAD == 0:
            return self._value(value)
        name = f"{value}.quads.g{groups}"
        if name not in self.program.buffers:
            kernel = kernels.quad_kernel(pixels, channels, groups)
            self._call(kernel, [self._value(value)], [name], value, "pack")
        return name

    # -- layers

    def _layer(self, node: Node, plan: Epilogue, specs: Sequence[Spec]) -> None:
        choice = self._choice(node)
        layer, shape = choice.layer, choice.shape
        weight = self.graph.constants[node.inputs[1]]
        inputs = [self._words(node, choice), self._weights(node, weight, choice)]
        if layer.zero_point:
            sums = as_conv_weight(node, weight, layer).reshape(layer.out_channels, -1)
            correction = -shape.zero_point * sums.astype(np.int64).sum(axis=1)
            inputs.append(self._constant(f"{node.name}.correction", correction.astype(np.int32)))
        inputs += [self._operand(operand, layer.out_channels) for operand in plan.operands]
        outputs = [spec.output for spec in specs]
        if choice.blocks is None:
            kernel = kernels.direct_kernel(shape, plan.operands, outputs, _direct_type(weight))
        else:
            kernel = kernels.product_kernel(
                shape, plan.operands, outputs, choice.blocks, choice.variant
            )
        names = [name for spec in specs for name in spec.names]
        self._call(kernel, inputs, names, node.name, choice.kind)
        self.program.layers.append(layer_record(node, choice, weight))

    def _weights(self, node: Node, weight: Array, choice: CudaChoice) -> str:
        whole = as_conv_weight(node, weight, choice.layer)
        if choice.blocks is None:
            packed = direct_weights(whole, _direct_type(weight))
        else:
            if choice.kind == "bitplane":
                levels, bits = node.str_attr("weight_levels"), node.int_attr("weight_bits")
                whole = weight_codes(whole, bits, levels)
            packed = product_weights(whole, choice.shape, choice.blocks)
        return self._constant(f"{node.name}.{choice.kind}", packed)

    # -- taps

    def _tap(self, value: str) -> None:
        super()._tap(value)
        for name, tap in self.program.taps.items():
            if tap.form == "planes":
                self.program.taps[name] = Tap(
                    tap.buffer, "words", tap.shape, tap.perm, tap.bits, tap.step
                )


def _whole_words(choice: CudaChoice) -> bool:
    """Whether the words of a pixel are those of a tensor without groups."""
    return choice.layer.groups == 1 or choice.layer.group_in % kernels.WORD == 0


def _whole_columns(choice: CudaChoice) -> bool:
    """Whether 32 threads that stand side by side make the channels of one word."""
    if choice.blocks is None:
        return True
    return choice.layer.groups == 1 or choice.layer.group_out % kernels.WORD == 0


def _direct_type(weight: Array) -> str:
    narrow = weight.min(initial=0) >= -128 and weight.max(initial=0) <= 127
    return "int8" if narrow else "int16"
