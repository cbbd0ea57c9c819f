"""Compile the small C programs that work for us on a board."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from mpqc.errors import ArtifactError
from mpqc.model_source import CSRC
from mpqc.target import Target, native
from mpqc.toolchain import find_compiler

HERE = Path(__file__).parent
# Symbols that even old systems have; newer C libraries bind programs to glibc 2.34.
_OLD_GLIBC = {"x86_64": "GLIBC_2.2.5", "aarch64": "GLIBC_2.17", "armv7": "GLIBC_2.4"}


def compile_measure(target: Target, folder: Path) -> Path:
    """The program that runs and measures models.

    Raises:
        EnvironmentLacks: no compiler for the target.
        ArtifactError: it refused.
    """
    command = find_compiler(target, native().arch)
    asked = subprocess.run(
        [*command, "-print-file-name=libdl.so.2"], capture_output=True, text=True, check=False
    )
    options = ["-I", str(CSRC)]
    if asked.returncode == 0 and asked.stdout.strip().startswith("/"):
        version = _OLD_GLIBC[target.arch]
        options += [f'-DOLD_GLIBC="{version}"', "-Wl,--no-as-needed", "-l:libdl.so.2"]
    else:
        options += ["-ldl"]
    return _compile(command, HERE / "measure.c", folder / "measure", options)


def compile_shell(target: Target, folder: Path, headers: Sequence[str]) -> Path:
    """The library that lets TVM's RPC server run commands.

    Args:
        target: of the board.
        folder: for the library.
        headers: folders with those of TVM's function interface.

    Raises:
        EnvironmentLacks: no compiler for the target.
        ArtifactError: it refused.
    """
    options = ["-shared", "-fPIC", "-fvisibility=hidden"]
    for header in headers:
        options += ["-I", header]
    command = find_compiler(target, native().arch)
    return _compile(command, HERE / "shell.c", folder / "shell.so", options)


def _compile(command: Sequence[str], source: Path, output: Path, options: Sequence[str]) -> Path:
    """Options come after the source: libraries are searched for what stands before them."""
    call = [*command, "-std=gnu11", "-O2", str(source), "-o", str(output), *options]
    result = subprocess.run(call, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ArtifactError(
            f"{command[0]} failed to compile {source.name} for the board:\n{result.stderr[-2000:]}"
        )
    return output
