"""What benchmarks/gpu.py runs on a GPU machine: compiled ahead, anywhere, into one archive."""

import json
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from mpqc import ort, pipeline
from mpqc.artifact import Artifact
from mpqc.cuda.toolkit import find_nvcc
from mpqc.data import Data, open_data
from mpqc.graph import Array, Graph, Precision
from mpqc.passes.find_layers import find_layers
from mpqc.patches import Geometry
from mpqc.rounding import Accuracy
from mpqc.target import Target

REPEATED = 16  # output channels, over and over: archives stay small, times do not change
# Of models that leave dimensions open.
DIMS: dict[str, dict[str, int]] = {"ppocr_v2_angle_cls": {"x:2": 48, "x:3": 192}}
QUICK = Accuracy(rounding="nearest", clipping="mse", bias_correction=False)


def random_data(graph: Graph, samples: int, seed: int = 0) -> dict[str, Array]:
    """Normal floats, small integers."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.normal(size=(samples, *kind.shape[1:])).astype(kind.dtype)
        if kind.dtype.startswith("float")
        else generator.integers(0, 2, (samples, *kind.shape[1:])).astype(kind.dtype)
        for name, kind in graph.inputs.items()
    }


def compile_for(
    model: Path, folder: Path, target: Target, bits: str, kernel: str, batch: int
) -> Artifact:
    """An artifact with random calibration data; no bits for models that are quantized already."""

    def data(graph: Graph) -> Data:
        return open_data(random_data(graph, max(4, batch)), graph)

    return pipeline.compile_model(
        model, folder, pipeline.Options(target, kernel=kernel, accuracy=QUICK, max_samples=4),
        bits=Precision.parse(bits) if bits else None, data=data, dims=DIMS.get(model.stem),
        batch=batch, overwrite=True,
    )  # fmt: skip


def repeat_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every filter bank repeats its first channels."""
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim > 1 and array.shape[0] > REPEATED:
            turns = -(-array.shape[0] // REPEATED)
            whole = np.concatenate([array[:REPEATED]] * turns)[: array.shape[0]]
            tensor.CopyFrom(numpy_helper.from_array(whole, tensor.name))
    return model


def expected(artifact: Artifact, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs, and what the integer reference makes of them."""
    graph_inputs = json.loads((artifact.folder / "manifest.json").read_text("utf-8"))["inputs"]
    generator = np.random.default_rng(seed)
    feeds = {
        name: generator.normal(size=kind["shape"]).astype(kind["dtype"])
        for name, kind in graph_inputs.items()
    }
    session = ort.Session(artifact.reference.read_bytes())
    return feeds, dict(session.run(feeds))


def layers_of(model: Path) -> list[dict[str, Any]]:
    """Convolutions and products of a float model, for opponents: geometry at batch 1."""
    graph = pipeline.import_model(model)
    found = []
    for layer in find_layers(graph):
        at, node = Geometry.of(graph, layer), graph[layer.name]
        found.append({
            "name": layer.name, "input": graph.shape(node.inputs[0]),
            "weight": graph.shape(node.inputs[1]), "strides": at.strides, "pads": at.pads,
            "dilations": at.dilations, "groups": at.groups, "macs": layer.macs,
        })  # fmt: skip
    return found


def build(
    output: Path,
    target: Target,
    real: Sequence[tuple[Path, str, str]],
    networks: Mapping[str, Path],
    widths: Sequence[tuple[str, str]],
    batches: Sequence[int],
) -> None:
    """Compile everything and pack it.

    Args:
        output: archive (.tar.xz).
        target: GPU.
        real: models that are verified: file, bits, kernel.
        networks: models that are timed, by name.
        widths: of these: bits, kernel.
        batches: of these.
    """
    with tempfile.TemporaryDirectory(prefix="mpqc-gpu-") as folder:
        root = Path(folder)
        compile_rates(root / "rates", target)
        for model, bits, kernel in real:
            place = root / "verify" / f"{model.stem}-{bits or 'own'}-{kernel}"
            artifact = compile_for(model, root / "work", target, bits, kernel, 1)
            feeds, outputs = expected(artifact, seed=1)
            place.mkdir(parents=True)
            (place / "model.so").write_bytes(artifact.library.read_bytes())
            np.savez(place / "inputs.npz", **feeds)
            np.savez(place / "outputs.npz", **outputs)
            print(place.name, flush=True)
        for name, model in networks.items():
            (root / "networks" / name).mkdir(parents=True)
            layers = json.dumps(layers_of(model))
            (root / "networks" / name / "layers.json").write_text(layers, "utf-8")
            for bits, kernel in widths:
                for batch in batches:
                    artifact = compile_for(model, root / "work", target, bits, kernel, batch)
                    place = root / "networks" / name / f"{bits}-{kernel}-{batch}.so"
                    place.write_bytes(artifact.library.read_bytes())
                    print(name, place.name, flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(output, "w:xz") as archive:
            for part in ("rates", "verify", "networks"):
                if (root / part).exists():
                    archive.add(root / part, part)
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")


def compile_rates(output: Path, target: Target) -> None:
    """The program that measures instruction rates; where it cannot be linked, GPU machines try."""
    command = [find_nvcc(), "-O3", "-std=c++17", f"-arch={target.cuda}", "-diag-suppress=128,177",
               str(Path(__file__).parent / "gpu_rates.cu"), "-o", str(output)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"rates: not compiled: {done.stderr[-300:].strip()}", flush=True)


def timed_model(model: onnx.ModelProto, path: Path) -> Path:
    """A network for timing on disk."""
    onnx.save(repeat_weights(model), path)
    return path
