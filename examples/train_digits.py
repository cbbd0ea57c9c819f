"""Train the model that `mpqc demo` compiles, and write it with its data.

A small residual network for scikit-learn's digits (1797 pictures of 8x8). It has what makes
quantization interesting: BatchNorm to fold, a residual stream, a depthwise convolution, a
pointwise one and a classifier. BatchNorm stays in the ONNX file: folding it is the compiler's
work.

    pip install "mpqc[train]" scikit-learn
    python examples/train_digits.py -o mpqc/demo

The result is committed; run this only to change it. Same seed, same machine, same file.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy, relu

SEED = 0
EPOCHS = 60
BATCH = 64
TEST, CALIBRATION = 597, 200  # pictures; calibration is drawn from the training set

# name, input channels, output channels, kernel, stride, groups
CONVS = (
    ("stem", 1, 32, 3, 1, 1),
    ("block.conv1", 32, 32, 3, 1, 1),
    ("block.conv2", 32, 32, 3, 1, 1),
    ("down", 32, 64, 3, 2, 1),
    ("depthwise", 64, 64, 3, 1, 64),
    ("pointwise", 64, 64, 1, 1, 1),
)
CLASSES = 10
Floats = npt.NDArray[np.float32]


class Trained:
    """The network as PyTorch modules by name; `forward` says how they are wired."""

    def __init__(self) -> None:
        self.convs = {
            name: nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)
            for name, i, o, k, stride, groups in CONVS
        }
        self.norms = {name: nn.BatchNorm2d(o) for name, _, o, *_ in CONVS}
        self.classifier = nn.Linear(CONVS[-1][2], CLASSES)
        self.modules = nn.ModuleList([*self.convs.values(), *self.norms.values(), self.classifier])

    def forward(self, x: Any) -> Any:
        """Logits [N, 10] of pictures [N, 1, 8, 8]."""

        def conv(name: str, x: Any) -> Any:
            return self.norms[name](self.convs[name](x))

        x = relu(conv("stem", x))
        x = relu(x + conv("block.conv2", relu(conv("block.conv1", x))))
        for name in ("down", "depthwise", "pointwise"):
            x = relu(conv(name, x))
        return self.classifier(x.mean((2, 3)))


def data() -> dict[str, tuple[Floats, npt.NDArray[np.int64]]]:
    """Pictures [n, 1, 8, 8] in 0..1 and labels, stratified: train, calibration, test."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=TEST, stratify=labels, random_state=SEED
    )
    _, x_calibration, _, y_calibration = train_test_split(
        x, y, test_size=CALIBRATION, stratify=y, random_state=SEED
    )
    return {
        "train": (x, y),
        "calibration": (x_calibration, y_calibration),
        "test": (x_test, y_test),
    }


def batches(x: Floats, y: npt.NDArray[np.int64]) -> Iterator[tuple[Any, Any]]:
    """One shuffled epoch; each picture is moved by up to a pixel either way."""
    order = torch.randperm(len(x))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    for chosen in order.split(BATCH):
        dy, dx = torch.randint(0, 3, (2,)).tolist()
        moved = padded[chosen.numpy(), :, dy : dy + x.shape[2], dx : dx + x.shape[3]]
        yield torch.from_numpy(moved), torch.from_numpy(y[chosen.numpy()])


def train(x: Floats, y: npt.NDArray[np.int64]) -> Trained:
    """SGD with momentum, one cosine."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    model = Trained()
    optimizer = torch.optim.SGD(
        model.modules.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    model.modules.train()
    for _ in range(EPOCHS):
        for images, labels in batches(x, y):
            optimizer.zero_grad()
            cross_entropy(model.forward(images), labels, label_smoothing=0.05).backward()
            optimizer.step()
        schedule.step()
    model.modules.eval()
    return model


def to_onnx(model: Trained) -> onnx.ModelProto:
    """The network in opset 17: `input` [N, 1, 8, 8] to `logits` [N, 10]."""
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, tensor: Any) -> str:
        constants.append(numpy_helper.from_array(tensor.detach().numpy(), name))
        return name

    def node(op: str, name: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output or name], name, **attributes))
        return output or name

    def conv(name: str, x: str) -> str:
        module, norm = model.convs[name], model.norms[name]
        k, stride = module.kernel_size[0], module.stride[0]
        y = node(
            "Conv", name, x, constant(f"{name}.weight", module.weight),
            kernel_shape=[k, k], strides=[stride] * 2, pads=[k // 2] * 4, group=module.groups,
        )  # fmt: skip
        statistics = {"scale": norm.weight, "bias": norm.bias,
                      "mean": norm.running_mean, "var": norm.running_var}  # fmt: skip
        operands = [constant(f"{name}.norm.{k}", v) for k, v in statistics.items()]
        return node("BatchNormalization", f"{name}.norm", y, *operands, epsilon=norm.eps)

    stem = node("Relu", "stem.relu", conv("stem", "input"))
    x = node("Relu", "block.relu1", conv("block.conv1", stem))
    x = node("Add", "block.add", stem, conv("block.conv2", x))
    x = node("Relu", "block.relu2", x)
    for name in ("down", "depthwise", "pointwise"):
        x = node("Relu", f"{name}.relu", conv(name, x))
    x = node("Flatten", "flatten", node("GlobalAveragePool", "pool", x))
    weight = constant("classifier.weight", model.classifier.weight)
    bias = constant("classifier.bias", model.classifier.bias)
    node("Gemm", "classifier", x, weight, bias, output="logits", transB=1)

    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        constants,
    )
    opset = helper.make_opsetid("", 17)
    proto = helper.make_model(graph, opset_imports=[opset], ir_version=8, producer_name="mpqc")
    onnx.checker.check_model(proto, full_check=True)
    return proto


def accuracy(model: Path, x: Floats, y: npt.NDArray[np.int64]) -> float:
    """Top-1 in percent, by ONNX Runtime from the file."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": x})
    return float((np.asarray(logits).argmax(1) == y).mean() * 100)


def main() -> None:
    """Train, export, write the data, report."""
    parser = argparse.ArgumentParser(description="Train the model of `mpqc demo`.")
    parser.add_argument("-o", "--output", type=Path, default=Path("mpqc/demo"))
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)

    sets = data()
    onnx.save(to_onnx(train(*sets["train"])), folder / "digits.onnx")
    for name in ("calibration", "test"):
        images, labels = sets[name]
        np.savez_compressed(folder / f"{name}.npz", input=images, labels=labels)
    for name, (images, labels) in sets.items():
        print(f"{name}: {accuracy(folder / 'digits.onnx', images, labels):.2f}% of {len(labels)}")


if __name__ == "__main__":
    main()
