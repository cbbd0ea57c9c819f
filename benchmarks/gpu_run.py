"""What benchmarks/gpu.py does on the GPU machine: needs numpy and this checkout.

Every section runs in a process of its own with a limit of its own: one that crashes, hangs or
leaves the GPU's context broken costs its own result and no other.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import gpu_torch
from mpqc.errors import EnvironmentLacks
from mpqc.runtime import CompiledModel
from mpqc.tensor_type import Array

HERE = Path(__file__).parent
TOLERANCE = 1e-3  # of the largest magnitude, where float operators take part; as verify's
Result = dict[str, Any]


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

    @property
    def left(self) -> float:
        return max(1.0, self.end - time.monotonic())


# ---- sections, each in its own process


def rates(work: Path) -> Result:
    """Instruction rates of this GPU: compiled ahead, or, where that does not run, here."""
    program = work / "rates"
    errors = []
    if program.is_file():
        program.chmod(0o755)
        done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return parse_rates(done.stdout)
        errors.append(done.stderr[-300:].strip())
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        errors.append("no nvcc here")
        raise RuntimeError("; ".join(errors))
    program = work / "rates-here"
    command = [nvcc, "-O3", "-std=c++17", "-arch=native", "-diag-suppress=128,177",
               str(HERE / "gpu_rates.cu"), "-o", str(program)]  # fmt: skip
    for words in (command, [str(program)]):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError("; ".join([*errors, f"{words[0]}: {done.stderr[-300:].strip()}"]))
    return parse_rates(done.stdout)


def parse_rates(text: str) -> Result:
    """What the program prints."""
    found: Result = json.loads(text)
    return found


def verify(folder: Path) -> Result:
    """One model on inputs whose outputs the integer reference gave, with and without a graph."""
    inputs, outputs = (dict(np.load(folder / f"{part}.npz")) for part in ("inputs", "outputs"))
    result: Result = {}
    for graph in ("1", "0"):
        os.environ["MPQC_CUDA_GRAPH"] = graph
        with CompiledModel(folder / "model.so") as model:
            for _ in range(2):
                for name, array in model.run(inputs).items():
                    said = judge(array, outputs[name])
                    if result.get(name, "exact") == "exact" or said.startswith("WRONG"):
                        result[name] = said
            key = "seconds" if graph == "1" else "seconds_without_graph"
            result[key] = fastest(lambda m=model: m.run(inputs), model)  # type: ignore[misc]
    return result


def judge(got: Array, expected: Array) -> str:
    """Bit for bit; or as near as float operators explain."""
    if np.array_equal(got, expected):
        return "exact"
    gap = float(np.max(np.abs(got.astype(np.float64) - expected), initial=0))
    near = gap <= TOLERANCE * float(np.max(np.abs(expected), initial=1))
    return f"float, off by {gap:.3g}" if near else f"WRONG by {gap:.3g}"


def fastest(run: Callable[[], object], model: CompiledModel, seconds: float = 0.2) -> float:
    """Least device time of repeated runs [s]."""
    best, end = float("inf"), time.monotonic() + seconds
    for _ in range(3):
        run()
    while time.monotonic() < end or best == float("inf"):
        run()
        best = min(best, model.device_seconds)
    return best


def network(library: Path, seconds: float, together: int) -> Result:
    """Whole runs as a graph, and every step, so many runs of it between looks at the clock."""
    with CompiledModel(library) as model:
        generator = np.random.default_rng(0)
        feeds: dict[str, Array] = {
            name: generator.normal(size=kind.shape).astype(kind.dtype)
            for name, kind in model.inputs.items()
        }
        whole = fastest(lambda: model.run(feeds), model, seconds)
        wall = min(model.seconds(feeds, 10))
        facts = model.manifest
        best = [float("inf")] * len(facts["steps"])
        end = time.monotonic() + seconds
        for turn in range(20):
            if turn and time.monotonic() > end:
                break
            for index in range(len(best)):
                best[index] = min(best[index], model.time_step(index, together))
    known = {layer["name"]: layer for layer in facts["layers"]}
    steps = [
        {
            "label": step["label"], "kind": step["kind"], "seconds": found,
            "variant": known.get(step["label"], {}).get("variant", ""),
            "widths": known.get(step["label"], {}).get("run", ""),
        }
        for step, found in zip(facts["steps"], best, strict=True)
    ]  # fmt: skip
    return {"seconds": whole, "wall_seconds": wall, "steps": steps}


def errors(library: Path) -> Result:
    """What a process says that is shown no GPU, and that the library loads in spite of it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        with CompiledModel(library):
            return {"no GPU": "WRONG: the model started"}
    except EnvironmentLacks as error:
        return {"no GPU": str(error)}


def torch_layers(place: Path, batch: int, seconds: float) -> Result:
    """PyTorch's times of a network's layers."""
    every = json.loads((place / "layers.json").read_text("utf-8"))
    budget = Budget(time.monotonic() + seconds)
    found = gpu_torch.layers(every, batch, budget.allows)
    import torch

    return found | {"version": torch.__version__, "skipped": budget.skipped}


def torch_whole(place: Path, batch: int) -> Result:
    """PyTorch's time of a whole network."""
    return gpu_torch.whole(place.name, batch)


def section(name: str, arguments: Sequence[str]) -> Result:
    """Run one here, in this process."""
    first = Path(arguments[0])
    numbers = [float(text) for text in arguments[1:]]
    match name:
        case "rates":
            return rates(first)
        case "verify":
            return verify(first)
        case "network":
            return network(first, numbers[0], int(numbers[1]))
        case "errors":
            return errors(first)
        case "torch-layers":
            return torch_layers(first, int(numbers[0]), numbers[1])
        case "torch-whole":
            return torch_whole(first, int(numbers[0]))
    raise ValueError(f"no section {name!r}")


# ---- all of them


def isolated(name: str, *arguments: object, seconds: float) -> Result:
    """One section in a process of its own; what went wrong, if something did."""
    words = [sys.executable, "-m", "benchmarks.gpu", "section", name, *map(str, arguments)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    }
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    last = done.stdout.strip().rpartition("\n")[2]
    try:
        found: Result = json.loads(last)
    except ValueError:
        said = (done.stderr or done.stdout)[-500:].strip()
        return {"error": f"ended with status {done.returncode}: {said}"}
    return found


def answer(name: str, arguments: Sequence[str]) -> int:
    """The other side of ``isolated``: one line of JSON."""
    try:
        found = section(name, arguments)
    except Exception as error:  # all is told to whom started this process
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))
    return 0


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        seconds: for everything.
        each: of a network's whole runs, and again of its steps.
        together: runs of a step between two looks at the clock.
        opponents: also time PyTorch.
    """

    seconds: float
    each: float = 1.0
    together: int = 20
    opponents: bool = True


def run(folder: Path, effort: Effort, save: Callable[[Result], None]) -> Result:
    """Verify, then measure as much as the time allows.

    Args:
        folder: the unpacked archive.
        effort: limits.
        save: called with all that is known, after every section.
    """
    budget = Budget(time.monotonic() + effort.seconds)
    result: Result = {
        "gpu": driver(), "rates": {}, "verify": {}, "errors": {}, "networks": {}, "layers": {},
        "torch": {}, "skipped": budget.skipped, "seconds": {},
    }  # fmt: skip
    for place in networks(folder):
        result["layers"][place.name] = json.loads((place / "layers.json").read_text("utf-8"))

    def do(
        name: str,
        into: dict[str, Any],
        key: str,
        *arguments: object,
        limit: float,
        expect: float,
        about: str = "",
    ) -> None:
        what = f"{name} {about or key}"
        if not budget.allows(what, expect):
            return
        start = time.monotonic()
        into[key] = isolated(name, *arguments, seconds=min(limit, budget.left))
        took = time.monotonic() - start
        result["seconds"][what] = round(took, 2)
        print(f"{what}: {told(into[key])} ({took:.1f} s)", flush=True)
        save(result)

    do("rates", result, "rates", folder, limit=90, expect=10)
    verified = sorted((folder / "verify").glob("*"))
    for place in verified:
        do("verify", result["verify"], place.name, place, limit=40, expect=4)
    libraries = [place / "model.so" for place in verified]
    libraries += [x for place in networks(folder) for x in sorted(place.glob("*.so"))]
    for library in libraries[:1]:
        do("errors", result, "errors", library, limit=20, expect=3)
    for place in networks(folder):
        for batch in batches(place):
            for library in sorted(place.glob(f"*-{batch}.so")):
                name = f"{place.name} {library.stem}"
                given = (library, effort.each, effort.together)
                do("network", result["networks"], name, *given, limit=40, expect=6)
            if effort.opponents:
                about = f"{place.name} {batch}"
                found = result["torch"].setdefault(about, {})
                do("torch-whole", found, "whole", place, batch, limit=60, expect=12, about=about)
                words = (place, batch, 25)
                do("torch-layers", found, "layers", *words, limit=60, expect=15, about=about)
    return result


def networks(folder: Path) -> list[Path]:
    """Folders of networks; the small ones first."""
    return sorted((folder / "networks").glob("*"), key=lambda place: (len(place.name), place.name))


def batches(place: Path) -> list[int]:
    """That a network was compiled for."""
    return sorted({int(x.stem.rpartition("-")[2]) for x in place.glob("*.so")})


def told(found: Mapping[str, Any]) -> str:
    """One line about a section's result."""
    if "error" in found:
        return f"FAILED: {found['error']}"
    if "steps" in found:
        return f"{1e3 * found['seconds']:.3f} ms on the GPU"
    if "layers" in found:
        return f"{len(found['layers'])} layers"
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in found.items()
    )


def driver() -> Result:
    """What nvidia-smi says, if it is there: a time means nothing without clocks and limits."""
    program = shutil.which("nvidia-smi")
    fields = "name,driver_version,clocks.max.sm,clocks.sm,power.limit,memory.total"
    if program is None:
        return {"error": "no nvidia-smi"}
    words = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    values = done.stdout.strip().partition("\n")[0].split(", ")
    return dict(zip(fields.split(","), values, strict=False))
