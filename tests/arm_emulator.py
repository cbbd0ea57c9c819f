"""Run ARM code on this machine under qemu-user: single kernels, and whole compiled models.

This machine's own code runs in the same harness, without the emulator.
"""

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from mpqc import build
from mpqc.errors import EnvironmentLacks
from mpqc.graph import Array
from mpqc.kernels import Kernel
from mpqc.program import SLACK
from mpqc.target import Target, llvm_target, native
from mpqc.toolchain import find_compiler

# The oldest core that a target's code must run on, as qemu names it.
CPUS = {
    "aarch64": "cortex-a53", "rpi3": "cortex-a53", "rpi4": "cortex-a72", "rpi5": "cortex-a76",
    "jetson-orin-cpu": "cortex-a76", "armv7": "cortex-a9",
}  # fmt: skip
_QEMU = {"aarch64": "qemu-aarch64", "armv7": "qemu-arm"}
_ROOT = {"aarch64": "/usr/aarch64-linux-gnu", "armv7": "/usr/arm-linux-gnueabihf"}
SIGILL = 4

_HARNESS = """
#include <stdio.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
int kernel({voids});
typedef struct {{ void* sync; int32_t tasks; }} group;
typedef int (*task)(int, group*, void*);
static int launch(task run, void* data, int n) {{
  group g = {{0, 1}};
  (void)n;
  return run(0, &g, data);
}}
/* As much memory as the arena has at least, and no byte more. */
static void* room(size_t bytes) {{
  size_t page = 1 << 16, need = (bytes + 63) / 64 * 64 + {slack};
  size_t whole = (need + page - 1) / page * page;
  char* p = mmap(0, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED || mprotect(p + whole, page, PROT_NONE)) exit(4);
  return p + whole - need;
}}
/* Working memory is held to the same; kept for the next of its size, as loops take it often. */
static struct {{ void* place; uint64_t bytes; int taken; }} rooms[256];
static void* take(int t, int d, uint64_t n, int c, int b) {{
  (void)t, (void)d, (void)c, (void)b;
  int i = 0;
  while (i < 255 && rooms[i].place && (rooms[i].taken || rooms[i].bytes != n)) i++;
  if (!rooms[i].place) rooms[i].place = room(rooms[i].bytes = n);
  if (rooms[i].taken || rooms[i].bytes != n) exit(5);
  rooms[i].taken = 1;
  return rooms[i].place;
}}
static int give(int t, int d, void* p) {{
  (void)t, (void)d;
  for (int i = 0; i < 256; i++) if (rooms[i].place == p) rooms[i].taken = 0;
  return 0;
}}
int (*__TVMBackendParallelLaunch)(task, void*, int) = launch;
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = take;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = give;
static void* data[{count}];
static const size_t sizes[] = {{{sizes}}};
int main(int n, char** path) {{
  for (int i = 0; i < {count}; i++) data[i] = room(sizes[i]);
  FILE* f = fopen(path[n - 2], "rb");
  for (int i = 0; i < {count}; i++) if (fread(data[i], 1, sizes[i], f) != sizes[i]) return 2;
  fclose(f);
  if (kernel({args})) return 3;
  f = fopen(path[n - 1], "wb");
  for (int i = {inputs}; i < {count}; i++) fwrite(data[i], 1, sizes[i], f);
  return fclose(f) != 0;
}}
"""


@cache
def emulator(arch: str) -> str:
    """Path of qemu-user for an architecture; skips the test where there is none."""
    for name in (f"{_QEMU[arch]}-static", _QEMU[arch]):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip(f"no {_QEMU[arch]}: apt install qemu-user-static")


@cache
def cross_compiler(target: Target) -> tuple[str, ...]:
    """Command of the C compiler for the target; skips the test where there is none."""
    try:
        return tuple(find_compiler(target, native().arch))
    except EnvironmentLacks as error:
        pytest.skip(str(error))


def command(target: Target, *arguments: str, cpu: str = "") -> list[str]:
    """Command line that runs a program of the target on its own, or the named, CPU model."""
    if target.arch == native().arch:
        return list(arguments)
    model = cpu or CPUS[target.name]
    return [emulator(target.arch), "-cpu", model, "-L", _ROOT[target.arch], *arguments]


class Library:
    """One kernel as a program, under qemu where needed; it is called as TVM's libraries are."""

    def __init__(self, kernel: Kernel, target: Target) -> None:
        if target.arch != native().arch:
            emulator(target.arch)
        self._folder = tempfile.TemporaryDirectory(prefix="mpqc-kernel-")
        work = Path(self._folder.name)
        module = tvm.IRModule({"kernel": kernel.func.with_attr("global_symbol", "kernel")})
        with build._raw_interface():
            self.mod = tvm.compile(module, target=llvm_target(target)).mod
        self.mod.write_to_file(str(work / "kernel.o"), "o")
        self._inputs, self._target = len(kernel.inputs), target
        sizes = [kind.nbytes for kind in (*kernel.inputs, *kernel.outputs)]
        source = _HARNESS.format(
            voids=", ".join(["void*"] * len(sizes)),
            args=", ".join(f"data[{i}]" for i in range(len(sizes))),
            sizes=", ".join(map(str, sizes)), slack=SLACK, count=len(sizes), inputs=self._inputs,
        )  # fmt: skip
        (work / "main.c").write_text(source, "utf-8")
        self._program = work / "program"
        link = [*cross_compiler(target), "-O1", "-static", "-o", str(self._program)]
        link += [str(work / "main.c"), str(work / "kernel.o"), "-lm"]
        subprocess.run(link, check=True)

    def __getitem__(self, _name: str) -> Any:
        return self.run

    def run(self, *tensors: Any, cpu: str = "") -> None:
        work = self._program.parent
        (work / "in").write_bytes(b"".join(tensor.numpy().tobytes() for tensor in tensors))
        arguments = [str(self._program), str(work / "in"), str(work / "out")]
        subprocess.run(command(self._target, *arguments, cpu=cpu), check=True)
        results = (work / "out").read_bytes()
        for tensor in tensors[self._inputs :]:
            like: Array = tensor.numpy()
            values = np.frombuffer(results[: like.nbytes], like.dtype)
            tensor.copyfrom(values.reshape(like.shape))
            results = results[like.nbytes :]
