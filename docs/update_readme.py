"""Write the generated parts of README.md: the support table, and with --demo the demo's output.

    python docs/update_readme.py [--demo] [--check]

``--check`` writes nothing and exits with 1 when the support table is not what the code says.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import onnx.defs

from mpqc.onnx_to_tir import supported_operators
from mpqc.passes.find_layers import MATRIX_OPS
from mpqc.select_kernel import KERNELS
from mpqc.target import TARGETS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def main() -> int:
    """Parse the arguments and do it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", action="store_true", help="run the demo and paste its output")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args()
    old = README.read_text("utf-8")
    new = replaced(old, "support table", support_table())
    if options.check:
        if new != old:
            print("README.md: the support table is outdated; run make readme", file=sys.stderr)
        return int(new != old)
    if options.demo:
        new = replaced(new, "demo output", f"```console\n$ mpqc demo\n{demo_output()}```\n")
    README.write_text(new, "utf-8")
    return 0


def replaced(text: str, name: str, body: str) -> str:
    """``text`` with ``body`` between the markers ``<!-- name -->`` and ``<!-- /name -->``."""
    block = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
    if not block.search(text):
        raise SystemExit(f"README.md lacks the markers of {name!r}")
    return block.sub(lambda _: body, text, count=1)


def support_table() -> str:
    """What the code supports, as Markdown."""
    quantized = sorted(MATRIX_OPS & {"Conv", "Gemm", "MatMul"})
    floats = float_operators()
    rows = [
        ("weights", "1 to 8 bits, two's complement or odd levels; one scale a channel"),
        ("activations", "1 to 8 bits, one scale a tensor; layers that read a tensor share it"),
        (
            "quantized operators",
            f"{', '.join(quantized[:-1])} and {quantized[-1]} with constant weights; convolutions "
            "of one and two dimensions with groups, depthwise, stride, dilation, any padding",
        ),
        ("float operators", f"{len(floats)} have a conversion, listed below"),
        ("kernels", ", ".join(f"`{name}`" for name in KERNELS if name != "auto")),
    ]
    lines = ["| | |", "|---|---|", *(f"| {what} | {how} |" for what, how in rows), ""]
    lines += ["| target | what it is |", "|---|---|"]
    lines += ["| `native` | the best of these that this machine runs |"]
    lines += [f"| `{target.name}` | {target.about} |" for target in TARGETS.values()]
    lines += ["", "<details><summary>Float operators</summary>", ""]
    lines += [*textwrap.wrap(f"{', '.join(floats)}.", 100), ""]
    lines += ["Whether one compiles may depend on its attributes: `mpqc inspect` tries each node."]
    lines += ["", "</details>", ""]
    return "\n".join(lines)


def float_operators() -> list[str]:
    """Standard ONNX operators, those of foreign domains left out, that have a conversion."""
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    return [name for name in supported_operators() if name in standard]


def demo_output() -> str:
    """What ``mpqc demo`` prints on a pipe, without colours."""
    with tempfile.TemporaryDirectory() as folder:
        found = subprocess.run(
            [sys.executable, "-m", "mpqc", "demo"],
            cwd=folder,
            env={**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", found.stdout)
    return "".join(f"{line.rstrip()}\n" for line in plain.splitlines())


if __name__ == "__main__":
    sys.exit(main())
