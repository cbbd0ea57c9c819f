"""What the wheel must hold. `.ci/run` builds one and uses it; this says early what it lacks."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import mpqc.demo

ROOT = Path(__file__).parents[1]


def setting(*keys: str) -> Any:
    value: Any = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for key in keys:
        value = value[key]
    return value


def folders_of_code() -> set[str]:
    """Dotted names of the folders that hold Python files."""
    links = (ROOT / "mpqc/passes", ROOT / "mpqc/schedules")
    inside = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in (ROOT / "mpqc").rglob("*.py")
        if not any(path.is_relative_to(link) for link in links)
    }
    beside = {
        f"mpqc.{path.parent.relative_to(ROOT).as_posix().replace('/', '.')}"
        for folder in ("passes", "schedules")
        for path in (ROOT / folder).rglob("*.py")
    }
    return inside | beside


def test_every_folder_of_code_is_packaged() -> None:
    assert folders_of_code() <= set(setting("tool", "setuptools", "packages"))


def test_every_package_exists() -> None:
    mapped = setting("tool", "setuptools", "package-dir")
    for package in setting("tool", "setuptools", "packages"):
        folder = ROOT / mapped.get(package, package.replace(".", "/"))
        assert (folder / "__init__.py").is_file(), f"{package}: no {folder}/__init__.py"


def test_constraints_meet_the_requirements() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = setting("project", "optional-dependencies").values()
    for text in [*setting("project", "dependencies"), *(r for extra in extras for r in extra)]:
        requirement = packaging.Requirement(text)
        if requirement.name != "mpqc":
            assert exact[requirement.name] in requirement.specifier, text


def test_data_files_match_the_patterns_of_the_wheel() -> None:
    data = setting("tool", "setuptools", "package-data")
    for path in mpqc.demo.files():
        assert any(path.match(pattern) for pattern in data["mpqc.demo"]), path
    sources = [path for path in (ROOT / "mpqc/csrc").rglob("*") if path.is_file()]
    for path in sources:
        assert any(path.match(f"mpqc/{pattern}") for pattern in data["mpqc"]), path


def test_the_demo_model_is_as_good_as_its_docstring_says() -> None:
    model, calibration, test = mpqc.demo.files()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    with np.load(test) as arrays:
        images, labels = arrays["input"], arrays["labels"]
    (logits,) = session.run(["logits"], {"input": images})
    assert (images.dtype, images.shape) == (np.float32, (597, 1, 8, 8))
    assert f"{(logits.argmax(1) == labels).mean():.2%}" == "98.99%"
    with np.load(calibration) as arrays:
        assert arrays["input"].shape == (200, 1, 8, 8)
        assert set(arrays["labels"].tolist()) == set(range(10))


def test_calibration_and_test_share_no_picture() -> None:
    _, calibration, test = mpqc.demo.files()
    with np.load(calibration) as a, np.load(test) as b:
        known = {picture.tobytes() for picture in a["input"]}
        assert not any(picture.tobytes() in known for picture in b["input"])
