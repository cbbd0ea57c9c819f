"""Float ONNX models of well-known topologies with seeded random weights, for timing.

    python benchmarks/models.py resnet18 -o resnet18.onnx --data resnet18.npz

He-initialised, BatchNorm kept with statistics that fit, so that activations stay near unit
variance in depth. Their outputs mean nothing; shapes, MACs and weight counts are the real ones.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
# Variance of relu(x), x ~ N(0, 1): 1/2 - 1/(2 pi). A clip at 6 changes the fourth digit.
RELU_VARIANCE = 0.5 - 0.5 / np.pi


class Builder:
    """Appends operators to one graph; a value is its name, an operator is named as its output.

    Args:
        name: of the graph.
        input_shape: [C, H, W] without the batch.
        seed: of every random number.
    """

    def __init__(self, name: str, input_shape: tuple[int, int, int], seed: int) -> None:
        self.name = name
        self.random = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.input = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *input_shape])
        # Of each value: its channels, and the variance that BatchNorm's statistics follow.
        self.channels = {"input": input_shape[0]}
        self.variance = {"input": 1.0}

    def constant(self, name: str, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(
        self, op: str, name: str, *inputs: str, channels: int = 0, variance: float = 0, **attrs: Any
    ) -> str:
        """Append; channels and variance are the first operand's unless given."""
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attrs))
        self.channels[name] = channels or self.channels[inputs[0]]
        self.variance[name] = variance or self.variance[inputs[0]]
        return name

    def weight(self, name: str, shape: tuple[int, ...]) -> str:
        """He-initialised; filters over several channels sum to zero.

        Activations after a ReLU have a positive mean. Without the centring it would become a
        constant of each channel that drowns the picture, layer after layer.
        """
        fan_in = int(np.prod(shape[1:]))
        array = self.random.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / fan_in))
        if shape[1] > 1:
            array -= array.mean(tuple(range(1, len(shape))), keepdims=True)
        return self.constant(name, array)

    def conv(
        self, name: str, x: str, channels: int, kernel: int | tuple[int, int], stride: int = 1,
        *, groups: int = 1, pads: tuple[int, int, int, int] | None = None, bias: bool = False,
    ) -> str:  # fmt: skip
        """Convolution, padded by half the kernel unless `pads` says otherwise."""
        kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
        operands = [
            x,
            self.weight(f"{name}.weight", (channels, self.channels[x] // groups, kh, kw)),
        ]
        if bias:
            values = self.random.normal(0, 0.05, channels).astype(np.float32)
            operands.append(self.constant(f"{name}.bias", values))
        return self.node(
            "Conv", name, *operands, channels=channels, variance=2 * self.variance[x],
            kernel_shape=[kh, kw], strides=[stride, stride], group=groups,
            pads=pads or [kh // 2, kw // 2] * 2,
        )  # fmt: skip

    def norm(self, name: str, x: str) -> str:
        """BatchNorm whose statistics spread around those of its input, as trained ones do."""
        channels, deviation = self.channels[x], np.sqrt(self.variance[x])
        draw = self.random.uniform
        statistics = {
            "scale": draw(0.75, 1.25, channels),
            "bias": draw(-0.25, 0.25, channels),
            "mean": draw(-0.25, 0.25, channels) * deviation,
            "var": draw(0.75, 1.25, channels) * self.variance[x],
        }
        operands = [
            self.constant(f"{name}.{key}", array.astype(np.float32))
            for key, array in statistics.items()
        ]
        return self.node("BatchNormalization", name, x, *operands, variance=1.0)

    def relu(self, name: str, x: str) -> str:
        return self.node("Relu", name, x, variance=RELU_VARIANCE * self.variance[x])

    def relu6(self, name: str, x: str) -> str:
        for bound, value in (("zero", 0.0), ("six", 6.0)):
            if bound not in {constant.name for constant in self.constants}:
                self.constant(bound, np.float32(value))
        return self.node("Clip", name, x, "zero", "six", variance=RELU_VARIANCE * self.variance[x])

    def conv_norm(
        self, name: str, x: str, channels: int, kernel: int, *args: Any, **kw: Any
    ) -> str:
        return self.norm(f"{name}.norm", self.conv(name, x, channels, kernel, *args, **kw))

    def add(self, name: str, x: str, y: str) -> str:
        return self.node("Add", name, x, y, variance=self.variance[x] + self.variance[y])

    def classifier(self, x: str, classes: int) -> onnx.ModelProto:
        """Global average, one fully connected layer, and the finished model."""
        flat = self.node("Flatten", "flatten", self.node("GlobalAveragePool", "pool", x))
        weight = self.weight("fc.weight", (classes, self.channels[x]))
        bias = self.constant("fc.bias", np.zeros(classes, np.float32))
        attrs = {"transB": 1}
        self.nodes.append(helper.make_node("Gemm", [flat, weight, bias], ["logits"], "fc", **attrs))
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])
        graph = helper.make_graph(self.nodes, self.name, [self.input], [logits], self.constants)
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=8, producer_name="mpqc")


def resnet18(seed: int = 0) -> onnx.ModelProto:
    """ResNet-18 (He et al. 2015): 1814.1 M MACs, 11.679 M weights."""
    b = Builder("resnet18", (3, 224, 224), seed)
    x = _imagenet_stem(b)
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            stride = 2 if stage > 1 and block == 0 else 1
            x = _basic_block(b, f"layer{stage}.{block}", x, width, stride)
    return b.classifier(x, 1000)


def resnet50(seed: int = 0) -> onnx.ModelProto:
    """ResNet-50 v1.5, the stride on the 3x3: 4089.2 M MACs, 25.503 M weights."""
    b = Builder("resnet50", (3, 224, 224), seed)
    x = _imagenet_stem(b)
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = b.relu(f"{name}.relu1", b.conv_norm(f"{name}.conv1", x, width, 1))
            y = b.relu(f"{name}.relu2", b.conv_norm(f"{name}.conv2", y, width, 3, stride))
            y = b.conv_norm(f"{name}.conv3", y, 4 * width, 1)
            if b.channels[x] != 4 * width:
                x = b.conv_norm(f"{name}.downsample", x, 4 * width, 1, stride)
            x = b.relu(f"{name}.relu3", b.add(f"{name}.add", y, x))
    return b.classifier(x, 1000)


def mobilenet_v1(seed: int = 0) -> onnx.ModelProto:
    """MobileNetV1 1.0 (Howard et al. 2017): 568.7 M MACs, 4.209 M weights."""
    b = Builder("mobilenet_v1", (3, 224, 224), seed)
    x = b.relu("stem.relu", b.conv_norm("stem", "input", 32, 3, 2))
    layers = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5]
    for index, (width, stride) in enumerate([*layers, (1024, 2), (1024, 1)], start=1):
        x = _separable(b, f"block{index}", x, width, stride)
    return b.classifier(x, 1000)


def mobilenet_v2(seed: int = 0) -> onnx.ModelProto:
    """MobileNetV2 1.0 (Sandler et al. 2018): 300.8 M MACs, 3.470 M weights."""
    b = Builder("mobilenet_v2", (3, 224, 224), seed)
    x = b.relu6("stem.relu", b.conv_norm("stem", "input", 32, 3, 2))
    # expansion, channels, repeats, first stride
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
              (6, 160, 3, 2), (6, 320, 1, 1))  # fmt: skip
    for stage, (expansion, width, repeats, first) in enumerate(stages, start=1):
        for block in range(repeats):
            stride = first if block == 0 else 1
            x = _inverted_residual(b, f"block{stage}.{block}", x, width, stride, expansion)
    x = b.relu6("head.relu", b.conv_norm("head", x, 1280, 1))
    return b.classifier(x, 1000)


def ds_cnn(seed: int = 0) -> onnx.ModelProto:
    """DS-CNN keyword spotting of MLPerf Tiny: 49 frames of 10 coefficients, 2.66 M MACs."""
    b = Builder("ds_cnn", (1, 49, 10), seed)
    # TensorFlow's SAME padding: odd rows go to the bottom.
    x = b.conv("stem", "input", 64, (10, 4), 2, pads=(4, 1, 5, 1), bias=True)
    x = b.relu("stem.relu", b.norm("stem.norm", x))
    for index in range(1, 5):
        x = _separable(b, f"block{index}", x, 64, 1, bias=True)
    return b.classifier(x, 12)


def cifar_resnet20(seed: int = 0) -> onnx.ModelProto:
    """ResNet-20 for CIFAR-10 with option A shortcuts (slice, pad channels): 40.55 M MACs."""
    b = Builder("cifar_resnet20", (3, 32, 32), seed)
    x = b.relu("stem.relu", b.conv_norm("stem", "input", 16, 3))
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(3):
            stride = 2 if stage > 1 and block == 0 else 1
            x = _basic_block(b, f"layer{stage}.{block}", x, width, stride, option_a=True)
    return b.classifier(x, 10)


def _imagenet_stem(b: Builder) -> str:
    x = b.relu("stem.relu", b.conv_norm("stem", "input", 64, 7, 2))
    return b.node("MaxPool", "stem.pool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])


def _basic_block(
    b: Builder, name: str, x: str, width: int, stride: int, *, option_a: bool = False
) -> str:
    y = b.relu(f"{name}.relu1", b.conv_norm(f"{name}.conv1", x, width, 3, stride))
    y = b.conv_norm(f"{name}.conv2", y, width, 3)
    if b.channels[x] != width and option_a:
        x = _option_a(b, name, x, width)
    elif b.channels[x] != width:
        x = b.conv_norm(f"{name}.downsample", x, width, 1, stride)
    return b.relu(f"{name}.relu2", b.add(f"{name}.add", y, x))


def _option_a(b: Builder, name: str, x: str, width: int) -> str:
    """Every other pixel, and zero channels on both sides: no weights."""
    window = {"starts": [0, 0], "ends": [2**31 - 1] * 2, "axes": [2, 3], "steps": [2, 2]}
    operands = [b.constant(f"{name}.{key}", np.array(v, np.int64)) for key, v in window.items()]
    x = b.node("Slice", f"{name}.slice", x, *operands)
    missing = width - b.channels[x]
    before, after = missing // 2, missing - missing // 2
    pads = b.constant(f"{name}.pads", np.array([0, before, 0, 0, 0, after, 0, 0], np.int64))
    return b.node("Pad", f"{name}.pad", x, pads, channels=width)


def _separable(
    b: Builder, name: str, x: str, width: int, stride: int, *, bias: bool = False
) -> str:
    """Depthwise 3x3, then pointwise, each with BatchNorm and ReLU."""
    groups = b.channels[x]
    x = b.conv_norm(f"{name}.depthwise", x, groups, 3, stride, groups=groups, bias=bias)
    x = b.relu(f"{name}.relu1", x)
    return b.relu(f"{name}.relu2", b.conv_norm(f"{name}.pointwise", x, width, 1, bias=bias))


def _inverted_residual(
    b: Builder, name: str, x: str, width: int, stride: int, expansion: int
) -> str:
    hidden, y = b.channels[x] * expansion, x
    if expansion > 1:
        y = b.relu6(f"{name}.relu1", b.conv_norm(f"{name}.expand", y, hidden, 1))
    y = b.conv_norm(f"{name}.depthwise", y, hidden, 3, stride, groups=hidden)
    y = b.conv_norm(f"{name}.project", b.relu6(f"{name}.relu2", y), width, 1)
    return b.add(f"{name}.add", y, x) if stride == 1 and b.channels[x] == width else y


MODELS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v2": mobilenet_v2,
    "ds_cnn": ds_cnn,
    "cifar_resnet20": cifar_resnet20,
}


def main() -> None:
    """Write one model and, if asked, random inputs for it."""
    parser = argparse.ArgumentParser(description="Write a float ONNX model with random weights.")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("-o", "--output", type=Path, help="default: MODEL.onnx")
    parser.add_argument("--data", type=Path, help="also write 16 inputs ~ N(0, 1) as .npz")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = MODELS[args.model](args.seed)
    onnx.save(model, args.output or Path(f"{args.model}.onnx"))
    if args.data:
        dims = model.graph.input[0].type.tensor_type.shape.dim
        shape = (16, *(dim.dim_value for dim in dims[1:]))
        random = np.random.default_rng(args.seed)
        np.savez(args.data, input=random.standard_normal(shape, np.float32))


if __name__ == "__main__":
    main()
