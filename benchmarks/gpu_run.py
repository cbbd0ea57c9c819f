"""What benchmarks/gpu.py does on the GPU machine: needs numpy and this checkout."""

import importlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpqc.errors import MpqcError
from mpqc.runtime import CompiledModel
from mpqc.tensor_type import Array

HERE = Path(__file__).parent
TOLERANCE = 1e-3  # of the largest magnitude, where float operators take part; as verify's


@dataclass
class Budget:
    """Seconds that are left; what does not fit is named, not done.

    Attributes:
        end: on the monotonic clock.
        skipped: what was left out.
    """

    end: float
    skipped: list[str] = field(default_factory=list)

    def allows(self, what: str, seconds: float) -> bool:
        if time.monotonic() + seconds < self.end:
            return True
        self.skipped.append(what)
        return False


def rates(work: Path) -> dict[str, Any]:
    """Instruction rates of this GPU, compiled and measured here."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return {"error": "no nvcc here: instruction rates are not measured"}
    program = work / "rates"
    command = [nvcc, "-O3", "-std=c++17", "-arch=native", "-diag-suppress=128,177",
               str(HERE / "gpu_rates.cu"), "-o", str(program)]  # fmt: skip
    for words in (command, [str(program)]):
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            return {"error": f"{words[0]}: {done.stderr[-500:]}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def verify(folder: Path) -> dict[str, Any]:
    """One model on inputs whose outputs the integer reference gave."""
    inputs, outputs = (dict(np.load(folder / f"{part}.npz")) for part in ("inputs", "outputs"))
    result: dict[str, Any] = {}
    with CompiledModel(folder / "model.so") as model:
        for turn in range(2):
            got = model.run(inputs)
            for name, array in outputs.items():
                same = np.array_equal(got[name], array)
                gap = float(np.max(np.abs(got[name].astype(np.float64) - array), initial=0))
                near = gap <= TOLERANCE * float(np.max(np.abs(array), initial=1))
                if turn == 0 or not same:
                    result[name] = "exact" if same else "float" if near else f"WRONG by {gap}"
        result["seconds"] = fastest(lambda: model.run(inputs), model)
    return result


def fastest(run: Callable[[], object], model: CompiledModel, seconds: float = 0.3) -> float:
    """Least device time of repeated runs [s]."""
    best, end = float("inf"), time.monotonic() + seconds
    for _ in range(3):
        run()
    while time.monotonic() < end:
        run()
        best = min(best, model.device_seconds)
    return best


def network(library: Path, seconds: float) -> dict[str, Any]:
    """Whole runs as a graph, and every step."""
    with CompiledModel(library) as model:
        feeds: dict[str, Array] = {
            name: np.random.default_rng(0).normal(size=kind.shape).astype(kind.dtype)
            for name, kind in model.inputs.items()
        }
        whole = fastest(lambda: model.run(feeds), model, seconds)
        stepper, facts = model.steps(feeds), model.manifest
        best = [float("inf")] * len(stepper)
        end = time.monotonic() + seconds
        for turn in range(1000):
            if turn > 2 and time.monotonic() > end:
                break
            for index in range(len(stepper)):
                stepper.step(index)
                best[index] = min(best[index], model.device_seconds)
    layers = {layer["name"]: layer for layer in facts["layers"]}
    steps = [
        {
            "label": step["label"], "kind": step["kind"], "seconds": found,
            "variant": layers.get(step["label"], {}).get("variant", ""),
            "widths": layers.get(step["label"], {}).get("run", ""),
        }
        for step, found in zip(facts["steps"], best, strict=True)
    ]  # fmt: skip
    return {"seconds": whole, "steps": steps}


def run(folder: Path, seconds: float, opponents: bool) -> dict[str, Any]:
    """Verify, then measure as much as the time allows.

    Args:
        folder: the unpacked archive.
        seconds: for everything.
        opponents: also time PyTorch.
    """
    budget = Budget(time.monotonic() + seconds)
    result: dict[str, Any] = {"verify": {}, "networks": {}, "torch": {}}
    for place in sorted((folder / "verify").glob("*")):
        result["verify"][place.name] = attempt(verify, place)
        print("verify", place.name, result["verify"][place.name], flush=True)
    if budget.allows("instruction rates", 30):
        result["rates"] = attempt(rates, folder)
        print("rates", result["rates"], flush=True)
    libraries = sorted((folder / "networks").glob("*/*.so"))
    for library in libraries:
        name = f"{library.parent.name} {library.stem}"
        if budget.allows(name, 8):
            each = min(1.0, max(0.2, 0.3 * seconds / max(1, 2 * len(libraries))))
            found = attempt(network, library, each)
            result["networks"][name] = found
            print(name, found.get("error") or f"{1e3 * found['seconds']:.3f} ms", flush=True)
    if opponents:
        for place in sorted((folder / "networks").glob("*")):
            layers = json.loads((place / "layers.json").read_text("utf-8"))
            batches = sorted({int(x.stem.rpartition("-")[2]) for x in place.glob("*.so")})
            result["torch"][place.name] = attempt(
                against_torch, place.name, layers, batches, budget
            )
    result["skipped"] = budget.skipped
    return result


def attempt(measure: Callable[..., Mapping[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result, or what went wrong: one failure does not cost the other measurements."""
    try:
        return dict(measure(*arguments))
    except (MpqcError, OSError, RuntimeError, ValueError, ImportError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def against_torch(
    name: str, layers: list[dict[str, Any]], batches: list[int], budget: Budget
) -> dict[str, Any]:
    """PyTorch fp16 as CUDA graphs, channels last, cuDNN's choice: layers and networks."""
    import torch

    torch.backends.cudnn.benchmark = True

    def timed(module: Any, x: Any) -> float:
        for _ in range(3):
            module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            module(x)
        best = float("inf")
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(30):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) * 1e-3)
        return best

    def data(shape: list[int], batch: int) -> Any:
        x = torch.randn(batch, *shape[1:], device="cuda", dtype=torch.float16)
        return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x

    def layer_module(layer: Mapping[str, Any]) -> Any:
        if len(layer["weight"]) != 4:
            return torch.nn.Linear(layer["input"][-1], layer["weight"][0]).half().cuda()
        out, inside, *kernel = layer["weight"]
        module = torch.nn.Conv2d(
            inside * layer["groups"], out, kernel, layer["strides"], layer["pads"][:2],
            layer["dilations"], layer["groups"],
        )  # fmt: skip
        return module.half().cuda().to(memory_format=torch.channels_last)

    result: dict[str, Any] = {"version": torch.__version__, "fp16": {}, "layers": {}}
    with torch.no_grad():
        known: dict[str, float] = {}
        for batch in batches:
            for layer in layers:
                key = json.dumps([{k: v for k, v in layer.items() if k != "name"}, batch])
                if key not in known and budget.allows(f"torch {name} {layer['name']} {batch}", 3):
                    known[key] = timed(layer_module(layer), data(layer["input"], batch))
                if key in known:
                    result["layers"][f"{layer['name']} {batch}"] = known[key]
            models = importlib.import_module("torchvision.models")
            if hasattr(models, name) and budget.allows(f"torch {name} {batch}", 10):
                whole = getattr(models, name)().half().cuda().eval()
                whole = whole.to(memory_format=torch.channels_last)
                result["fp16"][str(batch)] = timed(whole, data([1, 3, 224, 224], batch))
    return result
