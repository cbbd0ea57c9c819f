"""Everything about GPUs that needs one: verification and all measurements in one call.

On any machine with nvcc, compile ahead (no GPU needed):

    python -m benchmarks.gpu build --target cuda:sm_90 --models ../shared/models -o gpu.tar.xz

On the GPU machine, with this checkout, numpy and, to compare, PyTorch; under 8 minutes:

    python3 -m benchmarks.gpu run gpu.tar.xz -o gpu.json

The result holds: each model beside its integer reference, bit for bit; multiply-accumulates a
cycle of the instructions that kernels are made of, beside what ``mpqc.cuda.select`` assumes;
ResNet-18 and ResNet-50 at batch 1, 8, 32 and 128, whole and step by step; the same layers and
networks in PyTorch fp16. Exit status 1: something computed wrong numbers.
"""

import argparse
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gpu_run import run

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
    """Verify and measure here."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mpqc-gpu-") as folder:
        with tarfile.open(arguments.archive) as archive:
            archive.extractall(folder, filter="data")
        left = arguments.seconds - (time.monotonic() - start)
        result = run(Path(folder), left, not arguments.alone)
    result["wall_seconds"] = time.monotonic() - start
    report.save(arguments.output, result)
    print(summary(result))
    return 1 if wrong(result) else 0


def wrong(result: dict[str, Any]) -> list[str]:
    """Models that failed, or whose outputs differ beyond what float operators explain."""
    return [
        name
        for name, found in result["verify"].items()
        if "error" in found or any(str(value).startswith("WRONG") for value in found.values())
    ]


def summary(result: dict[str, Any]) -> str:
    """What people read."""
    rows = []
    for name, found in result["networks"].items():
        network, _, batch = name.partition(" ")[0], "", name.rpartition("-")[2]
        torch = result["torch"].get(network, {}).get("fp16", {}).get(batch)
        own = found.get("seconds")
        rows.append([
            name, "failed" if own is None else f"{1e3 * own:.3f}",
            "" if torch is None else f"{1e3 * torch:.3f}",
            "" if torch is None or own is None else f"{torch / own:.2f}",
        ])  # fmt: skip
    checked, failed = result["verify"], wrong(result)
    lines = [
        f"verified {len(checked) - len(failed)} of {len(checked)} models"
        + (f"; WRONG: {', '.join(failed)}" if failed else ""),
        f"instruction rates: {result.get('rates')}",
        report.table(["network", "ms", "PyTorch fp16 ms", "times faster"], rows),
    ]
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
    here.add_argument("--alone", action="store_true", help="without PyTorch")
    here.add_argument("-o", "--output", type=Path, default=Path("gpu.json"))
    here.set_defaults(go=measure)
    arguments = parser.parse_args()
    sys.exit(arguments.go(arguments))


if __name__ == "__main__":
    main()
