"""A float model in PyTorch on the GPU: an opponent of benchmarks."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mpqc.errors import EnvironmentLacks, ModelError
from mpqc.graph import Array, Graph, Node
from mpqc.pipeline import import_model
from mpqc.train.module import GraphModule, LayerHook, Product

LEAST_ROWS = 17  # of torch._int_mm
EIGHT = 8  # its sizes are multiples


class TorchOpponent:
    """A float model in fp16, channels last, as a CUDA graph; BatchNorm is folded as ours is.

    With int8, matrix products and 1x1 convolutions multiply bytes (``torch._int_mm``, cuBLASLt),
    with one scale for the data, taken from the first run, and one for each output channel; PyTorch
    has no other int8 on GPUs, and the rest stays fp16.

    Args:
        model: ONNX file.
        kind: "fp16" or "int8".
        dims: values of symbolic dimensions.
        batch: samples of one run.
        device: where it runs; tests run it on the CPU, without a graph.

    Raises:
        EnvironmentLacks: this PyTorch sees no GPU.
        ModelError: an operator that our interpreter in PyTorch lacks; or nothing to multiply in
            int8.
    """

    def __init__(
        self,
        model: Path,
        kind: Literal["fp16", "int8"],
        dims: Mapping[str, int] | None = None,
        batch: int = 1,
        device: str = "cuda",
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise EnvironmentLacks(
                f"this PyTorch ({torch.__version__}) sees no GPU: install a build with CUDA"
            )
        torch.backends.cudnn.benchmark = True
        self._device = torch.device(device)
        self._graph = import_model(model, dims, batch)
        self._module = GraphModule(self._graph).eval()
        if kind == "int8":
            names = [name for name in self._module.layers if _is_product(self._graph, name)]
            if not names:
                raise ModelError(
                    f"{model} has no matrix product or 1x1 convolution for PyTorch's int8"
                )
            for name in names:
                self._module.hooks.put(name, Int8Product())
        self._module.half().to(self._device)
        self._module.to(memory_format=torch.channels_last)
        self._inputs = {
            name: torch.zeros(kind_.shape, dtype=_dtype(kind_.dtype), device=self._device)
            for name, kind_ in self._graph.inputs.items()
        }
        self._replay: Callable[[], dict[str, Tensor]] | None = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Feed every input, get all outputs by name."""
        with torch.no_grad():
            for name, held in self._inputs.items():
                held.copy_(torch.from_numpy(np.ascontiguousarray(feeds[name])))
            if self._replay is None:
                self._replay = self._record()
            return {name: tensor.cpu().numpy() for name, tensor in self._replay().items()}

    def seconds(self, feeds: Mapping[str, Array], repeat: int) -> list[float]:
        """Wall time of single runs [s], outputs fetched as numpy arrays."""
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            self.run(feeds)
            times.append(time.perf_counter() - start)
        return times

    def _once(self) -> dict[str, Tensor]:
        feeds = {}
        for name, held in self._inputs.items():
            x = held.half() if held.is_floating_point() else held
            feeds[name] = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        found: Mapping[str, Tensor] = self._module(feeds)
        return {n: t.float() if t.dtype == torch.float16 else t for n, t in found.items()}

    def _record(self) -> Callable[[], dict[str, Tensor]]:
        """A CUDA graph of a run; the run itself where an operator cannot be recorded."""
        if self._device.type != "cuda":
            return self._once
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # cuDNN tries its algorithms, scales are taken
            for _ in range(3):
                self._once()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                results = self._once()
        except RuntimeError:
            torch.cuda.synchronize()
            return self._once

        def replay() -> dict[str, Tensor]:
            graph.replay()
            return results

        return replay


class Int8Product(LayerHook):
    """A product of bytes, as PyTorch has it, in place of a product in fp16."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: float | None = None

    def forward(self, product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As ``LayerHook.forward``."""
        matrix = weight.flatten(1)
        image = weight.dim() == 4
        rows = (x.permute(0, 2, 3, 1) if image else x).reshape(-1, matrix.shape[1])
        if rows.shape[0] < LEAST_ROWS:
            return product(x, weight, bias)
        if self.scale is None:
            self.scale = max(float(rows.abs().amax()), 1e-6) / 127
            largest = matrix.float().abs().amax(1).clamp(min=1e-6) / 127
            codes = (matrix.float() / largest[:, None]).round().to(torch.int8)
            self.codes = nn.Parameter(codes, requires_grad=False)
            self.scales = nn.Parameter(largest * self.scale, requires_grad=False)
        data = (rows / self.scale).round().clamp(-127, 127).to(torch.int8)
        sums = torch._int_mm(data.contiguous(), self.codes.t()).float() * self.scales
        if bias is not None:
            sums = sums + bias.float()
        result = sums.to(x.dtype)
        if not image:
            return result.reshape(*x.shape[:-1], matrix.shape[0])
        n, _, h, w = x.shape
        return result.reshape(n, h, w, -1).permute(0, 3, 1, 2)


def _is_product(graph: Graph, name: str) -> bool:
    """Whether ``torch._int_mm`` computes a layer."""
    node: Node = graph[name]
    shape = graph.shape(node.inputs[1])
    if node.op == "Conv":
        plain = node.int_attr("group", 1) == 1 and not any(node.ints_attr("pads", (0,)))
        ones = (*shape[2:], *node.ints_attr("strides", (1,)))
        if len(shape) != 4 or not plain or any(extent != 1 for extent in ones):
            return False
        inside, outside = shape[1], shape[0]
    elif len(shape) == 2:
        inside, outside = graph.shape(node.inputs[0])[-1], graph.shape(node.output)[-1]
    else:
        return False
    return inside % EIGHT == 0 and outside % EIGHT == 0 and inside >= 2 * EIGHT


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found
