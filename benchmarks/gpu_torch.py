"""PyTorch beside our layers on a GPU: cuDNN's fp16, and int8 where there is some.

Everything runs as a CUDA graph, channels last, with the algorithms that cuDNN finds fastest.
int8 is measured twice: ``int_mm`` is cuBLASLt's product of the layer's patches, which lie ready (so
that a convolution's own gathering is not counted); ``cudnn_int8`` is PyTorch's quantized
convolution, which its builds have or have not.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from benchmarks.gpu_floor import results

DEVICE = "cuda"
REPEAT = 30
LEAST_ROWS = 17  # of torch._int_mm


def timed(run: Callable[[], object]) -> float:
    """Least device time of a run [s]."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # cuDNN tries its algorithms before anything is recorded
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    best = float("inf")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(REPEAT):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e-3)
    return best


def attempt(measure: Callable[[], float | None], errors: list[str]) -> float | None:
    """A time, or None and one line why not."""
    try:
        return measure()
    except Exception as error:  # an opponent may fail in any way
        line = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if line not in errors:
            errors.append(line)
        return None


def layers(
    every: Sequence[Mapping[str, Any]], batch: int, allows: Callable[[str, float], bool]
) -> dict[str, Any]:
    """Times of all layers of a network at one batch.

    Args:
        every: as ``gpu_build.layers_of`` writes them.
        batch: of the run.
        allows: whether there is time for something that takes so many seconds.
    """
    import torch

    torch.backends.cudnn.benchmark = True
    known: dict[str, dict[str, float | None]] = {}
    found: dict[str, dict[str, float | None]] = {}
    errors: dict[str, list[str]] = {"fp16": [], "int_mm": [], "cudnn_int8": []}
    measures = {"fp16": fp16_layer, "int_mm": int_mm, "cudnn_int8": cudnn_int8}
    with torch.no_grad():
        for layer in every:
            key = json.dumps({k: v for k, v in layer.items() if k != "name"}, sort_keys=True)
            if key not in known and allows(f"torch {layer['name']} {batch}", 2):
                known[key] = {
                    name: attempt(lambda m=measure, x=layer: m(x, batch), errors[name])  # type: ignore[misc]
                    for name, measure in measures.items()
                }
            if key in known:
                found[layer["name"]] = known[key]
    return {"layers": found, "errors": {k: v for k, v in errors.items() if v}}


def whole(name: str, batch: int) -> dict[str, Any]:
    """The network of that name in torchvision, in fp16, BatchNorm folded into the convolutions."""
    import torch

    torch.backends.cudnn.benchmark = True
    models = importlib.import_module("torchvision.models")
    if not hasattr(models, name):
        return {}
    network = getattr(models, name)().eval()
    optimization = importlib.import_module("torch.fx.experimental.optimization")
    network = optimization.fuse(network).half().to(DEVICE).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 224, 224, device=DEVICE, dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        return {"fp16": timed(lambda: network(x))}


def fp16_layer(layer: Mapping[str, Any], batch: int) -> float:
    """Convolution of cuDNN, or product of cuBLAS."""
    import torch

    x = torch.randn(batch, *layer["input"][1:], device=DEVICE, dtype=torch.float16)
    if len(layer["weight"]) != 4:
        inside = layer["input"][-1]
        outside = prod(layer["weight"]) // inside
        linear = torch.nn.Linear(inside, outside).half().to(DEVICE)
        return timed(lambda: linear(x))
    out, inside, *kernel = layer["weight"]
    module = torch.nn.Conv2d(
        inside * layer["groups"], out, kernel, layer["strides"], 0, layer["dilations"],
        layer["groups"],
    )  # fmt: skip
    module = module.half().to(DEVICE).to(memory_format=torch.channels_last)
    top, left, bottom, right = layer["pads"]
    if (top, left) == (bottom, right):
        module.padding = (top, left)
    else:
        x = torch.nn.functional.pad(x, (left, right, top, bottom))  # not counted
    x = x.to(memory_format=torch.channels_last)
    return timed(lambda: module(x))


def int_mm(layer: Mapping[str, Any], batch: int) -> float | None:
    """The layer as one product of bytes: [rows, depth] x [depth, channels] to int32."""
    import torch

    if layer.get("groups", 1) != 1:
        return None
    weight = layer["weight"]
    depth = prod(weight[1:]) if len(weight) == 4 else layer["input"][-1]
    channels = weight[0] if len(weight) == 4 else prod(weight) // depth
    rows = results(layer) * batch // channels
    rows, depth, channels = max(rows, LEAST_ROWS), -(-depth // 8) * 8, -(-channels // 8) * 8

    def random(*shape: int) -> Any:
        return torch.randint(-128, 128, shape, device=DEVICE, dtype=torch.int8)

    data, filters = random(rows, depth), random(channels, depth).t()
    return timed(lambda: torch._int_mm(data, filters))


def cudnn_int8(layer: Mapping[str, Any], batch: int) -> float | None:
    """PyTorch's quantized convolution on cuDNN; not in every build."""
    import torch

    if len(layer["weight"]) != 4 or layer["groups"] != 1 or layer["input"][1] % 16:
        return None
    top, left, bottom, right = layer["pads"]
    x = torch.randn(batch, *layer["input"][1:], device=DEVICE)
    if (top, left) != (bottom, right):
        x, top, left = torch.nn.functional.pad(x, (left, right, top, bottom)), 0, 0
    x = x.to(memory_format=torch.channels_last)
    codes = torch.quantize_per_tensor(x, 0.05, 0, torch.qint8)
    weight = torch.randn(*layer["weight"], device=DEVICE).to(memory_format=torch.channels_last)
    filters = torch.quantize_per_tensor(weight, 0.05, 0, torch.qint8)
    packed = torch.ops.quantized.conv2d_prepack(
        filters, None, layer["strides"], [top, left], layer["dilations"], 1
    )
    return timed(lambda: torch.ops.quantized.conv2d(codes, packed, 0.1, 0))
