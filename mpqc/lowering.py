"""Lower a quantized, channels-last graph to a program: kernels, prepacked weights, steps.

Three kinds of groups, each one or more kernel calls:

* a *layer*: IntConv or IntMatMul with every elementwise node behind it that can run at the tile
  (requantize, activation, residual add, the next quantizer): one kernel;
* *elementwise*: quantizers and their neighbours that no layer took;
* a *region*: runs of float operators, which go through TVM's converters.

Values of codes exist in the forms that their readers ask for: bytes, or packed bitplanes; what
copies (padding, packing) is a step of its own and visible in the profile.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import tvm_ffi

from mpqc import kernels, winograd
from mpqc.compute import Padded
from mpqc.epilogue import Epilogue
from mpqc.errors import PassError
from mpqc.graph import Array, Graph, Node, Precision, TensorType
from mpqc.grouping import LAYERS, Group, form_groups
from mpqc.kernels import WINOGRAD, Kernel, Layer, Operand, Output, Shape
from mpqc.numerics import weight_codes
from mpqc.onnx_to_tir import convert_region
from mpqc.packing import (
    bitplane_weights,
    dot_weights,
    grouped_weights,
    lut_weights,
    pattern_tables,
    popcount_weights,
)
from mpqc.passes.channels_last import SUFFIX, first
from mpqc.program import LayerRecord, Program, Step, Tap
from mpqc.schedules import float_cpu
from mpqc.schedules.arm_intrinsics import POPCOUNTS
from mpqc.schedules.dot_intrinsics import DOTS
from mpqc.select_kernel import Choice, Selector
from mpqc.target import Target, llvm_target

TABLES = ".tables"  # behind the name of the codes that they are made of
SUMS = ".sums"  # behind the name of the patterns whose codes they are of


def lower(graph: Graph, target: Target, selector: Selector) -> Program:
    """Lower a graph after ``ChannelsLast``.

    Args:
        graph: quantized operators and ONNX float operators.
        target: machine to build for.
        selector: chooses the kernel of each layer.

    Returns:
        The program, its kernels scheduled.

    Raises:
        RegionError: a float operator cannot be converted.
    """
    if target.cuda:
        from mpqc.cuda.lowering import CudaLowering

        return CudaLowering(graph, target, selector).run()
    return Lowering(graph, target, selector).run()


class Lowering:
    """Walks over the groups of a graph; targets with other kernels override the parts."""

    def __init__(self, graph: Graph, target: Target, selector: Selector) -> None:
        self.graph = graph
        self.target = target
        self.selector = selector
        self.program = Program()
        self.choices = {
            node.name: selector.choose(graph, node) for node in graph if node.op in LAYERS
        }
        self._symbols: dict[int, list[tuple[Any, str]]] = {}
        self._llvm = llvm_target(target)

    def run(self) -> Program:
        program = self.program
        for name, kind in self.graph.inputs.items():
            program.inputs[name] = kind
            program.buffers[name] = kind
        for index, group in enumerate(form_groups(self.graph)):
            if group.kind == "region":
                self._region(group.nodes, f"r{index}")
            else:
                self._fused(group)
        self._outputs()
        return program

    # -- kernels and buffers

    def _symbol(self, func: Any, hint: str) -> str:
        """Name of a kernel; equal kernels share one."""
        key = int(tvm_ffi.structural_hash(func))
        for known, symbol in self._symbols.setdefault(key, []):
            if tvm_ffi.structural_equal(known, func):
                return symbol
        symbol = f"{hint}_{len(self.program.kernels)}"
        self._symbols[key].append((func, symbol))
        self.program.kernels[symbol] = func
        return symbol

    def _call(
        self, kernel: Kernel, inputs: Sequence[str], outputs: Sequence[str], label: str, kind: str
    ) -> None:
        for name, expected in zip(outputs, kernel.outputs, strict=True):
            self.program.buffers.setdefault(name, expected)
        symbol = self._symbol(kernel.func, f"mpqc_{_word(kind)}")
        self.program.steps.append(Step(symbol, tuple(inputs), tuple(outputs), label, kind))

    def _constant(self, name: str, array: Array) -> str:
        known = self.program.constants.get(name)
        if known is not None and not np.array_equal(known, array):
            raise PassError(f"two constants named {name}")
        self.program.constants[name] = np.ascontiguousarray(array)
        self.program.buffers[name] = TensorType.of(array)
        return name

    def _value(self, name: str) -> str:
        """Buffer that holds a graph value as the graph types it."""
        if name in self.graph.constants:
            return self._constant(name, self.graph.constants[name])
        if self.program.root(name) not in self.program.buffers:
            raise PassError(f"value {name} was never produced")
        return name

    # -- regions

    def _region(self, nodes: Sequence[Node], prefix: str) -> None:
        region = convert_region(
            nodes, self.graph, self._llvm, vector_bits=self.target.vector_bits, prefix=prefix
        )
        program = self.program
        for name, array in region.constants.items():
            self._constant(name, array)
        for name, kind in region.temps.items():
            program.buffers[name] = kind
        for name in region.outputs:
            if name not in region.aliases:
                program.buffers.setdefault(name, self.graph.type(name))
        for name, source in region.aliases.items():
            self._value(source)
            program.aliases[name] = source
        for name in region.inputs:
            self._value(name)
        scheduled = {name: self._schedule(func) for name, func in region.kernels.items()}
        for call in region.calls:
            symbol = self._symbol(scheduled[call.kernel], f"mpqc_float_{_word(call.kernel)}")
            program.steps.append(Step(symbol, call.inputs, call.outputs, call.kernel, "float"))
        for name in region.outputs:
            self._tap(name)

    def _schedule(self, func: Any) -> Any:
        """A float kernel with its loops in order."""
        return float_cpu.apply(func, self.target.vector_bits, self.target.cores)

    # -- layers and elementwise groups

    def _fused(self, group: Group) -> None:
        head = group.nodes[0]
        layer_node = head if head.op in LAYERS else None
        epilogue = group.nodes[1:] if layer_node is not None else group.nodes
        shape = self.graph.shape(head.output)
        plan = Epilogue(self.graph, layer_node, epilogue)
        outputs = self._output_specs(plan, group, layer_node)
        if layer_node is None:
            image = _image_shape(shape)
            operands = [self._operand(o, image[3]) for o in plan.operands]
            kernel = self._elementwise(image, plan.operands, [spec.output for spec in outputs])
            names = [name for spec in outputs for name in spec.names]
            self._call(kernel, operands, names, head.name, "elementwise")
        else:
            self._layer(layer_node, plan, outputs)
            self._say_floats(group, outputs)
        for spec in outputs:
            self._tap(spec.value)

    def _say_floats(self, group: Group, specs: Sequence["Spec"]) -> None:
        """Note which floats of a layer go to memory, and who needs them there."""
        inside = {node.name for node in group.nodes}
        for spec in specs:
            if self.graph.type(spec.value).dtype != "float32":
                continue
            readers = [node for node in self.graph.consumers(spec.value) if node.name not in inside]
            outputs = {spec.value, *(n.output for n in readers if n.op == "Transpose")}
            why = [
                f"{node.name} ({node.op}) computes with floats"
                for node in readers
                if node.output not in outputs or node.output not in self.graph.outputs
            ]
            if outputs & set(self.graph.outputs):
                why.append("an output of the model")
            self.program.floats[spec.value.removesuffix(SUFFIX)] = "; ".join(why)

    def _elementwise(
        self, image: Shape, operands: Sequence[Operand], outputs: Sequence[Output]
    ) -> Kernel:
        return kernels.elementwise_kernel(image, operands, outputs)

    def _operand(self, operand: Operand, channels: int) -> str:
        if not operand.per_channel:
            return self._value(operand.name)
        vector = self.graph.constants[operand.name].reshape(-1)
        if vector.size == channels:
            return self._constant(operand.name, vector)
        # one factor for all channels: the kernel reads a vector
        return self._constant(f"{operand.name}.{channels}", np.full(channels, vector[0]))

    def _output_specs(self, plan: "Epilogue", group: Group, layer: Node | None) -> list["Spec"]:
        """Values of the group that others read, in the forms that they read."""
        inside = {node.name for node in group.nodes}
        specs = []
        for node in group.nodes:
            value = node.output
            readers = [n for n in self.graph.consumers(value) if n.name not in inside]
            if not readers and value not in self.graph.outputs:
                continue
            if node.op in LAYERS:
                specs.append(Spec(value, Output(value, plan.cell(value)), (value,)))
                continue
            is_codes = node.op in ("Quantize", "Requantize")
            planes = is_codes and self._fuses_planes(value, layer, readers)
            plain = (
                value in self.graph.outputs
                or not planes
                or any(self._form(value, reader) != "planes" for reader in readers)
            )
            bits = node.int_attr("bits") if is_codes else 0
            output = Output(value, plan.cell(value), bits, plain, planes)
            names = ((value,) if plain else ()) + ((f"{value}.planes",) if planes else ())
            specs.append(Spec(value, output, names))
            plan.stored[value] = output.name
        return specs

    def _form(self, value: str, reader: Node) -> str:
        """Form in which the reader takes the value: "plain" or "planes"."""
        if reader.op not in LAYERS or reader.inputs[0] != value:
            return "plain"
        if self.choices[reader.name].kind != "bitplane":
            return "plain"
        groups = reader.int_attr("group", 1)
        channels = self.graph.shape(value)[-1]
        return "planes" if channels % 8 == 0 and channels // groups % 8 == 0 else "plain"

    def _fuses_planes(self, value: str, layer: Node | None, readers: Iterable[Node]) -> bool:
        """Whether the producing kernel packs: its tiles must hold whole bytes of channels."""
        if self.target.arch != "x86_64":
            return False  # LLVM packs poorly there: ``pack_script`` takes a tenth of the time
        if layer is not None:
            choice = self.choices[layer.name]
            if choice.tile.block % 8 or layer.int_attr("group", 1) > 1:
                return False
        return any(self._form(value, reader) == "planes" for reader in readers)

    def _layer(self, node: Node, plan: "Epilogue", specs: Sequence["Spec"]) -> None:
        choice = self.choices[node.name]
        layer, tile = choice.layer, choice.tile
        weight = self.graph.constants[node.inputs[1]]
        weight = as_conv_weight(node, weight, layer)
        data = self._rows(node, choice)
        inputs = [data]
        levels, bits = node.str_attr("weight_levels"), node.int_attr("weight_bits")
        if choice.kind == "bitplane":
            codes = weight_codes(weight, bits, levels)
            pack = popcount_weights if choice.variant in POPCOUNTS else bitplane_weights
            packed = pack(codes, bits, layer.groups, layer.taps, tile.block)
        elif choice.kind == "bitplane-lut":
            codes = weight_codes(weight, bits, levels)
            vector = kernels.lut_vector(layer, tile, choice.variant)
            slices = kernels.lut_slices(layer, self.target.arch)
            packed = lut_weights(codes, bits, layer.taps, tile.block, vector, slices)
        elif choice.variant == "multiply-add":
            packed = grouped_weights(weight, tile.block)
        elif choice.winograd:
            dot = DOTS[choice.instruction]
            packed = winograd.winograd_weights(weight, tile.block, dot.group, dot.weight)
        else:
            dot = DOTS[choice.variant]
            packed = dot_weights(weight, layer.taps, tile.block, dot.group, dot.weight)
        if self._reads_patterns(choice):
            tables = pattern_tables(layer.activation_bits)
            inputs.append(self._constant(f"tables of {layer.activation_bits}-bit codes", tables))
        inputs.append(self._constant(f"{node.name}.{choice.kind}", packed))
        zero_point, offset = node.int_attr("zero_point", 0), _offset(choice)
        if choice.winograd:
            signed = DOTS[choice.instruction].data == "int16"
            places = winograd.correction(weight, layer.activation_bits, signed, zero_point)
            inputs.append(self._constant(f"{node.name}.correction", places))
        elif layer.zero_point or offset:
            sums = weight.reshape(weight.shape[0], -1).astype(np.int64).sum(axis=1)
            correction = ((offset - zero_point) * sums).astype(np.int32)
            inputs.append(self._constant(f"{node.name}.correction", correction))
        if self._reads_patterns(choice):
            inputs += [f"{data}{SUMS}"] if layer.odd else []
        elif choice.kind != "int8" and layer.odd:
            name = f"{node.name}.sums"
            source, sums = self._sums(data, choice)
            self._call(sums, [source], [name], node.name, "window_sum")
            inputs.append(name)
        outputs = [spec.output for spec in specs]
        if choice.kind == "bitplane":
            kernel = kernels.bitplane_kernel(layer, plan.operands, outputs, tile, choice.variant)
        elif choice.kind == "bitplane-lut":
            kernel = kernels.lut_kernel(layer, plan.operands, outputs, tile, choice.variant)
        elif choice.variant == "multiply-add":
            kernel = kernels.grouped_kernel(layer, plan.operands, outputs, tile)
        elif choice.winograd:
            kernel = kernels.winograd_kernel(
                layer, plan.operands, outputs, tile, choice.instruction, choice.chunk
            )
        else:
            kernel = kernels.dot_kernel(
                layer, plan.operands, outputs, tile, choice.variant, choice.chunk
            )
        inputs += [self._operand(operand, layer.out_channels) for operand in plan.operands]
        names = [name for spec in specs for name in spec.names]
        self._call(kernel, inputs, names, node.name, choice.kind)
        self.program.layers.append(layer_record(node, choice, weight))

    def _rows(self, node: Node, choice: Choice) -> str:
        """Buffer with the layer's padded input in the form that its kernel reads."""
        value, layer = node.inputs[0], choice.layer
        shape = choice.source
        bits, zero_point = node.int_attr("activation_bits"), node.int_attr("zero_point", 0)
        if self._reads_patterns(choice):
            return self._patterns(node, choice)
        if choice.kind != "bitplane":
            source, dtype = self._value(value), "uint8"
            direct = choice.variant in DOTS and not choice.winograd
            wanted = DOTS[choice.variant].data if direct else "uint8"
            offset = _offset(choice)
            key = source
            if any(choice.pads) or wanted != dtype:
                key = f"{value}.{wanted}.{'_'.join(map(str, choice.pads))}.{zero_point}"
            if key not in self.program.buffers and key not in self.program.aliases:
                kernel = kernels.pad_kernel(
                    shape[0], shape[1:], choice.pads, [zero_point - offset], (dtype, wanted),
                    offset=offset,
                )  # fmt: skip
                self._call(kernel, [source], [key], value, "pad")
            if choice.winograd:
                return self._winograd_values(key, choice)
            return self._tables(key, choice) if choice.kind == "bitplane-lut" else key
        source = self._planes(value, shape, layer, bits)
        if not any(choice.pads):
            return source
        key = f"{source}.{'_'.join(map(str, choice.pads))}.{zero_point}"
        if key not in self.program.buffers:
            fill = [255 * (zero_point >> i & 1) for i in range(bits)]
            used = layer.group_in % 8
            kernel = kernels.pad_kernel(
                bits * shape[0],
                (shape[1], shape[2], layer.group_bytes * layer.groups),
                choice.pads, fill, ("uint8", "uint8"),
                last_mask=2**used - 1 if used and layer.groups == 1 else 255,
            )  # fmt: skip
            self._call(kernel, [source], [key], value, "pad")
        return key

    def _reads_patterns(self, choice: Choice) -> bool:
        lookup = choice.kind == "bitplane-lut"
        return lookup and kernels.reads_patterns(choice.layer, self.target.arch)

    def _patterns(self, node: Node, choice: Choice) -> str:
        """Places of the tables of a layer's padded codes."""
        value, layer = self._value(node.inputs[0]), choice.layer
        beside = layer.window.sx if choice.variant.endswith(kernels.PAIRS) else 0
        image = _unpadded(node, choice)
        geometry = (image.height, image.width, *image.pads, image.fill)  # 1x1 layers cut rows anew
        form = "_".join(map(str, (layer.activation_bits, beside, int(layer.odd), *geometry)))
        name = f"{value}.{form}.patterns"
        if name not in self.program.buffers:
            kernel = kernels.pattern_kernel(layer, image, beside)
            names = [name, f"{name}{SUMS}"][: len(kernel.outputs)]
            self._call(kernel, [value], names, value, "pack")
        return name

    def _sums(self, data: str, choice: Choice) -> tuple[str, Kernel]:
        """What adds up the codes under each window, and the buffer that it reads."""
        layer = choice.layer
        if choice.kind == "bitplane":
            return data, kernels.window_sum_kernel(layer)
        from_codes = kernels.code_sum_kernel(layer, self.target.arch)
        if from_codes is not None:
            return data.rpartition(TABLES)[0], from_codes
        return data, kernels.row_sum_kernel(layer)

    def _tables(self, codes: str, choice: Choice) -> str:
        """Tables of partial sums of padded codes, of two pixels each where the kernel wants so."""
        layer, arch = choice.layer, self.target.arch
        beside = layer.window.sx if choice.variant.endswith(kernels.PAIRS) else 0
        slices = kernels.lut_slices(layer, arch)
        name = f"{codes}{TABLES}{beside or ''}{f'.{slices}' if slices > 1 else ''}"
        if name not in self.program.buffers:
            n, h, w, channels = layer.image
            kernel = kernels.expand_kernel(n * h * w, channels, arch, beside, slices)
            self._call(kernel, [codes], [name], codes, "expand")
        return name

    def _winograd_values(self, codes: str, choice: Choice) -> str:
        """Transformed codes of whole 2x2 tiles."""
        kernel = kernels.winograd_image_kernel(choice.layer, choice.instruction, self.target)
        name = f"{codes}.{WINOGRAD}{kernel.outputs[0].dtype}"
        if name not in self.program.buffers:
            self._call(kernel, [codes], [name], codes, "winograd")
        return name

    def _planes(self, value: str, shape: Shape, layer: Layer, bits: int) -> str:
        whole_bytes = layer.group_in % 8 == 0
        name = f"{value}.planes" if whole_bytes else f"{value}.planes.g{layer.groups}"
        if name not in self.program.buffers:
            pixels = shape[0] * shape[1] * shape[2]
            groups = 1 if whole_bytes else layer.groups
            kernel = kernels.pack_kernel(pixels, shape[3], groups, bits, self.target.arch)
            self._call(kernel, [self._value(value)], [name], value, "pack")
        return name

    # -- outputs and taps

    def _outputs(self) -> None:
        """Give every graph output a buffer of its own: what the caller's pointer stands for."""
        program = self.program
        for name in self.graph.outputs:
            kind = self.graph.type(name)
            buffer = program.root(self._value(name))
            taken = buffer in program.inputs or buffer in program.results.values()
            if taken or buffer in program.constants:
                source, buffer = buffer, f"{name}.copy"
                self._copy(source, buffer, kind)
            program.outputs[name] = kind
            program.results[name] = buffer

    def _copy(self, source: str, result: str, kind: TensorType) -> None:
        size = max(1, prod(kind.shape))
        kernel = kernels.pad_kernel(1, (1, 1, size), (0, 0, 0, 0), [0], (kind.dtype, kind.dtype))
        self.program.buffers[result] = kind
        self._call(kernel, [source], [result], source, "copy")

    def _tap(self, value: str) -> None:
        """Remember where a value of the channels-first graph can be read."""
        program, step = self.program, len(self.program.steps) - 1
        perm: tuple[int, ...] = ()
        shape = self.graph.shape(value)
        name = value
        if value.endswith(SUFFIX):
            name, perm = value.removesuffix(SUFFIX), first(len(shape))
            shape = tuple(shape[axis] for axis in perm)
        if value in program.buffers or value in program.aliases:
            program.taps[name] = Tap(program.root(value), "plain", shape, perm, 0, step)
        elif f"{value}.planes" in program.buffers:
            producer = self.graph.producer(value)
            bits = producer.int_attr("bits") if producer is not None else 8
            program.taps[name] = Tap(f"{value}.planes", "planes", shape, perm, bits, step)


@dataclass(frozen=True)
class Spec:
    """An output of a fused kernel: graph value, how it is computed, buffers that receive it."""

    value: str
    output: Output
    names: tuple[str, ...]


def _offset(choice: Choice) -> int:
    """What the layer's kernel wants taken from every code."""
    return DOTS[choice.variant].offset if choice.variant in DOTS else 0


def _unpadded(node: Node, choice: Choice) -> Padded:
    """A layer's codes as they lie in memory."""
    n, height, width, channels = choice.layer.image
    top, left, bottom, right = choice.pads
    size = (n, height - top - bottom, width - left - right, channels)
    return Padded(*size, choice.pads, node.int_attr("zero_point", 0))


def layer_record(node: Node, choice: Choice, weight: Array) -> LayerRecord:
    """What the manifest says of a layer."""
    layer = choice.layer
    bits, zero = node.int_attr("activation_bits"), node.int_attr("zero_point", 0)
    reach = max(zero, 2**bits - 1 - zero)
    sums = np.abs(weight.astype(np.int64)).reshape(weight.shape[0], -1).sum(axis=1)
    precision = str(Precision(node.int_attr("weight_bits"), bits))
    macs = prod(layer.out_shape) * layer.reduction
    return LayerRecord(
        node.name, precision, precision, choice.kind, choice.variant, "int32",
        int(sums.max(initial=0)) * reach, macs, choice.reason, choice.chosen,
    )  # fmt: skip


def as_conv_weight(node: Node, weight: Array, layer: Layer) -> Array:
    """[O, I/G, KH, KW]: matrices [K, N] and 1-D kernels as 2-D convolutions."""
    if node.op == "IntMatMul":
        return weight.T[:, :, None, None]
    return weight.reshape(*weight.shape[:2], layer.window.kh, layer.window.kw)


def _image_shape(shape: tuple[int, ...]) -> Shape:
    """Any shape as (1, 1, rows, channels)."""
    return (1, 1, prod(shape[:-1]), shape[-1]) if shape else (1, 1, 1, 1)


def _word(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
