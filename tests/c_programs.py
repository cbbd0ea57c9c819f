"""Compile and run small C programs against a built library."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mpqc import lowering
from mpqc.build import Built, build
from mpqc.graph import Graph
from mpqc.model_source import Form
from mpqc.passes.base import run
from mpqc.passes.channels_last import ChannelsLast
from mpqc.passes.drop_dead import DropDead
from mpqc.program import plan_memory
from mpqc.select_kernel import Selector
from mpqc.target import Target, native


def library(
    graph: Graph,
    output: Path,
    form: Form | None = None,
    target: Target | None = None,
    kernel: str = "auto",
) -> Built:
    target = target or native()
    last = run(graph, ChannelsLast(), DropDead())
    program = lowering.lower(last, target, Selector(target, kernel))
    manifest = {"steps": [], "model": {"file": "net.onnx", "sha256": "abc"},
                "versions": {"mpqc": "1.2.3"}}  # fmt: skip
    return build(program, plan_memory(program), target, manifest, output, form)


def needs(tool: str) -> str:
    found = shutil.which(tool)
    if not found:
        pytest.skip(f"{tool} is not installed")
    return found


def compiled(source: Path | str, folder: Path, *arguments: str, language: str = "c") -> Path:
    """A program; warnings are errors."""
    if isinstance(source, str):
        path = folder / ("main.c" if language == "c" else "main.cpp")
        path.write_text(source, encoding="utf-8")
        source = path
    command = [needs("gcc")] if language == "c" else [needs("g++"), "-std=c++17"]
    program = folder / f"{source.stem}.exe"
    call([*command, "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I", str(folder),
          str(source), "-o", str(program), *arguments])  # fmt: skip
    return program


def call(command: list[str], **more: object) -> str:
    """Output of a program that must succeed."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return str(result.stdout)
