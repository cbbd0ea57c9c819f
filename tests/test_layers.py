"""Foreign libraries are imported only in the modules that are their doors."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Library -> its doors: modules, or folders with a slash at the end. A new door is a decision:
# add it here with the module that needs it.
DOORS: dict[str, tuple[str, ...]] = {
    "onnx": (
        "mpqc/importer.py",
        "mpqc/onnx_export.py",
        "mpqc/onnx_files.py",
        "mpqc/onnx_nodes.py",
        "mpqc/onnx_evaluator.py",
        "mpqc/onnx_parts.py",
        "mpqc/onnx_quantized.py",
    ),
    "onnxruntime": ("mpqc/ort.py", "mpqc/ort_cuda.py"),
    "tvm": (
        "mpqc/boards/rpc.py",
        "mpqc/build.py",
        "mpqc/build_relax.py",
        "mpqc/compute.py",
        "mpqc/compute_winograd.py",
        "mpqc/cuda/",
        "mpqc/float_compute.py",
        "mpqc/float_math.py",
        "mpqc/kernels.py",
        "mpqc/lowering.py",
        "mpqc/onnx_to_tir.py",
        "mpqc/relax_model.py",
        "mpqc/target.py",
        "schedules/",
    ),
    "torch": ("mpqc/train/",),
    "matplotlib": (
        "mpqc/plot.py",
        "mpqc/report.py",
        "mpqc/search/plot.py",
        "mpqc/train/plot.py",
    ),
}
# One library under several names.
ALIASES = {"tvm_ffi": "tvm", "torchvision": "torch"}


def modules() -> list[Path]:
    """Source files of the package, each once: mpqc/passes and mpqc/schedules are links."""
    found = [
        path
        for folder in ("mpqc", "passes", "schedules")
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_relative_to(ROOT / "mpqc/passes")
        and not path.is_relative_to(ROOT / "mpqc/schedules")
    ]
    return sorted(found)


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import, those inside functions too."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name.partition(".")[0]) for name in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module.partition(".")[0]
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module.partition(".")[0]


def is_door(path: str, doors: tuple[str, ...]) -> bool:
    return any(path == door or (door.endswith("/") and path.startswith(door)) for door in doors)


def trespassers(path: str, source: str) -> list[str]:
    return [
        f"{path}:{line} imports {package}: only {', '.join(DOORS[library])} may"
        for line, package in imported(source)
        if (library := ALIASES.get(package, package)) in DOORS and not is_door(path, DOORS[library])
    ]


def test_foreign_libraries_stay_behind_their_doors() -> None:
    found = [
        line
        for path in modules()
        for line in trespassers(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_the_walk_sees_the_package() -> None:
    assert ROOT / "mpqc/graph.py" in modules()


@pytest.mark.parametrize(
    "source",
    [
        "import tvm",
        "import tvm.te as te",
        "from tvm import te",
        "from tvm.script import tirx as T",
        "import numpy, tvm_ffi",
        "def f():\n    import tvm",
        "import importlib\nimportlib.import_module('tvm.te')",
    ],
)
def test_no_form_of_import_slips_through(source: str) -> None:
    assert len(trespassers("mpqc/graph.py", source)) == 1
    assert trespassers("mpqc/build.py", source) == []


@pytest.mark.parametrize("source", ["import tvmlike", "from mpqc import tvm", "import numpy"])
def test_other_imports_are_free(source: str) -> None:
    assert trespassers("mpqc/graph.py", source) == []


@pytest.mark.parametrize("module", ["mpqc", "mpqc.doctor", "mpqc.demo", "mpqc.cli_finetune"])
def test_loads_nothing_heavy(module: str) -> None:
    heavy = {"tvm", "tvm_ffi", "onnx", "onnxruntime", "torch", "matplotlib", "scipy"}
    code = f"import sys, {module}; print(*sorted(sys.modules.keys() & {heavy!r}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
