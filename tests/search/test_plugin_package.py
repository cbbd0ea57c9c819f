"""A third party's package, really installed: found, described, run, and tested by the contract."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("setuptools", reason="builds the package of a third party")

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tests" / "plugins" / "thrifty"


def python(*arguments: str | Path, path: list[Path]) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Search path with the plugin's package, installed by pip without network."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PACKAGE, folder / "source")  # building writes beside the source
    target = folder / "site"
    done = python(
        "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--no-index", "--no-build-isolation", "--target", target, source, path=[],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [target, ROOT]


def methods(path: list[Path]) -> dict[str, Any]:
    code = (
        "import json; from mpqc.search import methods, report;"
        "print(json.dumps(report.methods_json(methods())))"
    )
    done = python("-c", code, path=path)
    assert done.returncode == 0, done.stderr
    return {method["name"]: method for method in json.loads(done.stdout)["methods"]}


def test_is_listed_with_its_origin(installed: list[Path]) -> None:
    found = methods(installed)["thrifty"]
    assert found["origin"] == "mpqc-thrifty 1.0"
    assert found["class"] == "mpqc_thrifty:Thrifty"
    assert found["needs"] == []
    assert found["summary"].startswith("Greedy:")
    assert "thrifty" not in methods([ROOT])


def test_passes_the_contract_on_its_own(installed: list[Path]) -> None:
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull,
        PACKAGE / "check_contract.py", path=installed,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_searches_a_real_model(installed: list[Path], shared_models: Path) -> None:
    code = """
import sys
from mpqc.search import search_plan
found = search_plan(sys.argv[1], method="thrifty", budgets="bitops=w4a4", options={"trust": "4"})
assert found.plan.search.cost["bitops"] <= found.problem.budgets["bitops"]
print(found.plan.search.method, len(found.plan.layers))
"""
    done = python("-c", code, shared_models / "cifar10_resnet8.onnx", path=installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["thrifty", "10"]


def test_the_page_of_the_documentation_shows_this_package() -> None:
    page = (ROOT / "docs" / "search" / "write-your-own.md").read_text("utf-8")
    for name in ("mpqc_thrifty.py", "pyproject.toml", "check_contract.py"):
        assert (PACKAGE / name).read_text("utf-8").strip() in page, f"{name} differs from the page"


def fake(folder: Path, name: str, entry: str, code: str = "") -> Path:
    """A distribution that is nothing but metadata and one module."""
    info = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[mpqc.search]\n{entry}\n")
    (folder / "fake_plugin.py").write_text(code)
    return folder


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('half installed')", "RuntimeError: half installed"),
        ("", "AttributeError"),
        ("Broken = 3", "not a callable class"),
        ("class Broken: pass", "not a callable class"),
    ],
)
def test_a_plugin_that_does_not_load_harms_no_other(code: str, said: str, tmp_path: Path) -> None:
    found = methods([fake(tmp_path, "half-done", "broken = fake_plugin:Broken", code), ROOT])
    assert said in found["broken"]["problem"]
    assert "half-done 0.1" in found["broken"]["problem"]
    assert found["eagl"]["problem"] is None


def test_two_plugins_of_one_name_are_refused(tmp_path: Path) -> None:
    path = [fake(tmp_path, "copycat", "eagl = fake_plugin:Eagl"), ROOT]
    done = python("-c", "from mpqc.search import methods; methods()", path=path)
    assert "two search methods are named 'eagl': from mpqc and from copycat 0.1" in done.stderr


def test_what_breaks_the_rules_is_refused(tmp_path: Path, shared_models: Path) -> None:
    code = """
from mpqc.plan import LayerPlan, Plan
class Greedy:
    "Everything at eight bits."
    def __call__(self, problem):
        return Plan(model_sha256="0" * 64, layers={
            name: LayerPlan(weight_bits=8, activation_bits=8) for name in problem.choices})
"""
    path = [fake(tmp_path, "greedy", "all8 = fake_plugin:Greedy", code), ROOT]
    model = shared_models / "cifar10_resnet8.onnx"
    for widths, said in (([2, 4], "not one of its candidates"), ([4, 8], "the budget is 39.22 kB")):
        call = f"search_plan({str(model)!r}, method='all8', budgets='size=w4a4', widths={widths})"
        done = python("-c", f"from mpqc.search import search_plan; {call}", path=path)
        assert "method 'all8' broke the rules" in done.stderr
        assert said in done.stderr
