"""Everything about GPUs that needs one: verification and all measurements in one call.

On any machine with nvcc, compile ahead (no GPU needed):

    python -m benchmarks.gpu build --target cuda:sm_90 --models ../shared/models -o gpu.tar.xz

On the GPU machine, with this checkout, numpy and, to compare, PyTorch; under 8 minutes:

    python3 -m benchmarks.gpu run gpu.tar.xz -o gpu.json

The result, which is written after every section, holds: multiply-accumulates a cycle of the
instructions that kernels are made of, beside what ``mpqc.cuda.select`` assumes; each model beside
its integer reference, bit for bit, with and without CUDA graphs; ResNet-18 and ResNet-50 at batch
1, 8, 32 and 128, whole and step by step; for each of their layers the floors that memory and
arithmetic set, and PyTorch's fp16 and int8. Every section runs in a process of its own with a limit
of its own: one that fails is reported, the others go on. Exit status 1: something computed wrong
numbers, or could not run.
"""

import argparse
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gpu_floor import ASSUMED, KINDS, floor
from benchmarks.gpu_run import Effort, answer, run

SECONDS = 420.0
BATCHES = (1, 8, 32, 128)
WIDTHS = (("w1a1", "bitplane"), ("w2a2", "bitplane"), ("w8a8", "int8"))
# Real models: bits (none: quantized already) and kernel.
VERIFIED = (
    ("cifar10_resnet8", "w2a2", "auto"), ("cifar10_resnet8", "w1a1", "bitplane"),
    ("cifar10_resnet8", "w2a2", "int8"), ("cifar10_resnet8", "w8a8", "bitplane"),
    ("cifar10_resnet20", "w2a2", "bitplane"), ("cifar10_resnet8_int8_qdq", "", "auto"),
    ("mobilenet_v2_1.0_224", "w4a4", "auto"), ("mobilenet_v2_1.0_224_uint8_qdq", "", "auto"),
    ("squeezenet1.0_sparse", "w4a4", "bitplane"), ("ultraface_rfb320", "w4a4", "auto"),
    ("espcn_x2_qonnx", "", "auto"), ("TFC_1W1A", "", "auto"), ("TFC_2W2A", "", "bitplane"),
    ("jettagging_qkeras", "", "auto"), ("magika_standard_v3_3", "w4a4", "auto"),
    ("mnist_cnn", "w2a2", "bitplane"), ("ad01_autoencoder", "w4a4", "bitplane"),
    ("mobilenet_v1_0.25_224", "w4a4", "auto"), ("espcn_x2_float", "w2a2", "bitplane"),
    ("ultraface_rfb320_simplified", "w8a8", "auto"), ("ppocr_v2_angle_cls", "w4a4", "auto"),
)  # fmt: skip


def build(arguments: argparse.Namespace) -> int:
    """Compile ahead."""
    from benchmarks import gpu_build, models
    from mpqc.target import find_target

    real = [
        (arguments.models / f"{name}.onnx", bits, kernel)
        for name, bits, kernel in VERIFIED
        if arguments.models is not None and (arguments.models / f"{name}.onnx").is_file()
    ]
    with tempfile.TemporaryDirectory(prefix="mpqc-gpu-") as folder:
        networks = {
            name: gpu_build.timed_model(models.MODELS[name](0), Path(folder) / f"{name}.onnx")
            for name in arguments.networks.split(",")
            if name
        }
        batches = [int(batch) for batch in arguments.batches.split(",")]
        gpu_build.build(
            arguments.output, find_target(arguments.target), real, networks, WIDTHS, batches
        )
    return 0


def measure(arguments: argparse.Namespace) -> int:
    """Verify and measure here; the file grows section by section."""
    start = time.monotonic()

    def save(result: dict[str, Any]) -> None:
        result["wall_seconds"] = time.monotonic() - start
        report.save(arguments.output, result | {"table": rows(result)})

    with tempfile.TemporaryDirectory(prefix="mpqc-gpu-") as folder:
        with tarfile.open(arguments.archive) as archive:
            archive.extractall(folder, filter="data")
        left = arguments.seconds - (time.monotonic() - start)
        effort = Effort(left, arguments.each, arguments.together, not arguments.alone)
        result = run(Path(folder), effort, save)
    save(result)
    print(summary(result))
    return 1 if wrong(result) else 0


def wrong(result: dict[str, Any]) -> list[str]:
    """Models that failed, or whose outputs differ beyond what float operators explain."""
    return [
        name
        for name, found in (*result["verify"].items(), ("errors", result["errors"]))
        if "error" in found or any(str(value).startswith("WRONG") for value in found.values())
    ]


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each layer of each timed network: our time, its floors, the opponents' [s]."""
    found = []
    for name, timed in result["networks"].items():
        network, _, form = name.partition(" ")
        batch = int(form.rpartition("-")[2])
        known = {layer["name"]: layer for layer in result["layers"].get(network, ())}
        torch = result["torch"].get(f"{network} {batch}", {}).get("layers", {}).get("layers", {})
        own: dict[str, dict[str, Any]] = {}
        for step in timed.get("steps", ()):
            if step["label"] in known and step["kind"] in KINDS:
                own.setdefault(step["label"], step | {"seconds": 0.0})["seconds"] += step["seconds"]
        for label, step in own.items():
            least = floor(known[label], batch, step["widths"], step["kind"], result["rates"])
            found.append({
                "network": network, "form": form, "batch": batch, "layer": label,
                "widths": step["widths"], "variant": step["variant"], "seconds": step["seconds"],
                "memory_floor": None if least is None else least.memory,
                "arithmetic_floor": None if least is None else least.arithmetic,
                "torch_fp16": torch.get(label, {}).get("fp16"),
                "torch_int_mm": torch.get(label, {}).get("int_mm"),
                "torch_cudnn_int8": torch.get(label, {}).get("cudnn_int8"),
            })  # fmt: skip
    return found


def goals(table: list[dict[str, Any]]) -> list[str]:
    """What the goals say of the table: against fp16 at batch 32 and up, and our own int8."""
    said = []
    int8 = {
        (row["network"], row["batch"], row["layer"]): row["seconds"]
        for row in table
        if row["form"].partition("-")[0] == "w8a8"
    }
    for form in sorted({row["form"].rpartition("-")[0] for row in table}):
        rows_ = [row for row in table if row["form"].rpartition("-")[0] == form]
        large = [r for r in rows_ if r["batch"] >= 32 and r["torch_fp16"] is not None]
        if large:
            faster = sum(row["seconds"] < row["torch_fp16"] for row in large)
            said.append(f"{form}: {faster} of {len(large)} layers at batch >= 32 beat cuDNN fp16")
        pairs = [(row, int8.get((row["network"], row["batch"], row["layer"]))) for row in rows_]
        both = [(row["seconds"], own) for row, own in pairs if own is not None]
        if both and not form.startswith("w8a8"):
            slower = sum(mine > 1.02 * own for mine, own in both)
            said.append(f"{form}: {slower} of {len(both)} layers are slower than our int8")
    return said


def instructions(rates: dict[str, Any]) -> str:
    """Measured rates beside those that the selection assumes."""
    assumed = ASSUMED.get(str(rates.get("capability")), {})
    lines = [
        [name, f"{rates[name]:.0f}", f"{assumed.get(name, 0):.0f}"]
        for kinds in KINDS.values()
        for name in kinds
        if name in rates
    ]
    if not lines:
        return f"instruction rates: {rates.get('error', 'not measured')}"
    head = ["multiply-accumulates a cycle and multiprocessor", "measured", "mpqc.cuda.select"]
    text = report.table(head, lines)
    if rates.get("mma-b1") and rates.get("mma-s8"):
        ratio = rates["mma-b1"] / rates["mma-s8"]
        text += f"\nbinary tensor-core products run at {ratio:.2f} times the rate of bytes: "
        text += "at speed" if ratio > 2 else "too slow to pay for two planes, or emulated"
    return text


def summary(result: dict[str, Any]) -> str:
    """What people read."""
    lines_ = []
    for name, found in result["networks"].items():
        network, _, form = name.partition(" ")
        batch = form.rpartition("-")[2]
        torch = result["torch"].get(f"{network} {batch}", {}).get("whole", {}).get("fp16")
        own = found.get("seconds")
        lines_.append([
            name, "failed" if own is None else f"{1e3 * own:.3f}",
            "" if torch is None else f"{1e3 * torch:.3f}",
            "" if torch is None or own is None else f"{torch / own:.2f}",
        ])  # fmt: skip
    checked, failed = result["verify"], wrong(result)
    lines = [
        f"verified {len(checked) - len(failed)} of {len(checked)} models"
        + (f"; failed or WRONG: {', '.join(failed)}" if failed else ""),
        instructions(result["rates"]),
        report.table(["network", "ms", "PyTorch fp16 ms", "times faster"], lines_),
    ]
    table = rows(result)
    if table:
        head = ["layer", "us", "memory", "arithmetic", "fp16", "int_mm", "cuDNN int8"]
        columns = (
            "seconds", "memory_floor", "arithmetic_floor", "torch_fp16", "torch_int_mm",
            "torch_cudnn_int8",
        )  # fmt: skip
        lines.append(report.table(head, [
            [f"{row['network']} {row['form']} {row['layer']} ({row['widths']} {row['variant']})",
             *("" if row[c] is None else f"{1e6 * row[c]:.1f}" for c in columns)]
            for row in table
        ]))  # fmt: skip
    lines += goals(table)
    if result["skipped"]:
        lines.append(f"no time for: {', '.join(result['skipped'])}")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)
    ahead = verbs.add_parser("build", help="compile ahead, without a GPU")
    ahead.add_argument("--target", default="cuda:sm_90")
    ahead.add_argument("--models", type=Path, help="folder of real models to verify")
    ahead.add_argument("--networks", default="resnet18,resnet50")
    ahead.add_argument("--batches", default=",".join(map(str, BATCHES)))
    ahead.add_argument("-o", "--output", type=Path, default=Path("gpu.tar.xz"))
    ahead.set_defaults(go=build)
    here = verbs.add_parser("run", help="verify and measure on this machine's GPU")
    here.add_argument("archive", type=Path)
    here.add_argument("--seconds", type=float, default=SECONDS)
    here.add_argument("--each", type=float, default=1.0, help="seconds for every network")
    here.add_argument("--together", type=int, default=20, help="runs of a step that start together")
    here.add_argument("--alone", action="store_true", help="without PyTorch")
    here.add_argument("-o", "--output", type=Path, default=Path("gpu.json"))
    here.set_defaults(go=measure)
    inner = verbs.add_parser("section", help="one part of it, for run itself")
    inner.add_argument("name")
    inner.add_argument("arguments", nargs="+")
    inner.set_defaults(go=lambda given: answer(given.name, given.arguments))
    arguments = parser.parse_args()
    sys.exit(arguments.go(arguments))


if __name__ == "__main__":
    main()
