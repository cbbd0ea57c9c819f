"""Find the C compiler that makes a target's libraries, and check what it made.

A library that was linked with the wrong compiler loads nowhere, or dies on the board; the check
reads the file itself (``elf``), so that a bad build never leaves this machine.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mpqc.elf import Elf, read_elf
from mpqc.errors import ArtifactError, EnvironmentLacks
from mpqc.target import Target, native

OLDEST_GLIBC = (2, 27)  # what a library may ask for: Ubuntu 18.04, Debian 10, JetPack 4


@dataclass(frozen=True)
class Cross:
    """How the tools name an architecture.

    Attributes:
        prefix: of GNU's tools.
        package: Debian package of the GNU compiler.
        libraries: Debian packages that clang needs beside itself and lld.
        triple: as clang and zig write it, without a C library's version.
        machine: e_machine of its ELF files.
        bits: of an address.
        variable: environment variable that names the compiler.
    """

    prefix: str
    package: str
    libraries: str
    triple: str
    machine: int
    bits: int
    variable: str


CROSS: Mapping[str, Cross] = {
    "x86_64": Cross(
        "x86_64-linux-gnu", "gcc-x86-64-linux-gnu",
        "libc6-dev-amd64-cross libgcc-12-dev-amd64-cross", "x86_64-linux-gnu", 62, 64,
        "MPQC_CC_X86_64",
    ),
    "aarch64": Cross(
        "aarch64-linux-gnu", "gcc-aarch64-linux-gnu",
        "libc6-dev-arm64-cross libgcc-12-dev-arm64-cross", "aarch64-linux-gnu", 183, 64,
        "MPQC_CC_AARCH64",
    ),
    "armv7": Cross(
        "arm-linux-gnueabihf", "gcc-arm-linux-gnueabihf",
        "libc6-dev-armhf-cross libgcc-12-dev-armhf-cross", "arm-linux-gnueabihf", 40, 32,
        "MPQC_CC_ARMV7",
    ),
}  # fmt: skip


def find_compiler(target: Target, host_arch: str) -> list[str]:
    """Command of the C compiler for a target: the environment's, GNU's, clang with lld, zig.

    Raises:
        EnvironmentLacks: none is installed; says how to get one.
    """
    cross = CROSS[target.arch]
    own = target.arch == host_arch
    for variable in (cross.variable, *(["CC"] if own else [])):
        if os.environ.get(variable):
            return os.environ[variable].split()
    for name in ("cc", "gcc", "clang") if own else (f"{cross.prefix}-gcc",):
        if shutil.which(name):
            return [name]
    if own:
        return _zig(cross) or _missing_here()
    return _clang(cross) or _zig(cross) or _missing(target.arch, cross)


def _clang(cross: Cross) -> list[str]:
    """Clang is every architecture's compiler, but needs lld and the target's C library."""
    if not (shutil.which("clang") and (shutil.which("ld.lld") or shutil.which("lld"))):
        return []
    command = ["clang", f"--target={cross.triple}", "-fuse-ld=lld"]
    return command if _compiles(tuple(command)) else []


@cache
def _compiles(command: tuple[str, ...]) -> bool:
    """Whether the compiler finds the target's C library."""
    program = "#include <stdlib.h>\nint f(void) { return abs(1); }\n"
    result = subprocess.run(
        [*command, "-shared", "-fPIC", "-x", "c", "-", "-o", os.devnull],
        input=program, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.returncode == 0


def _zig(cross: Cross) -> list[str]:
    """Zig carries every C library's headers and stubs: the one that pip alone can install."""
    options = ["-target", f"{cross.triple}.{'.'.join(map(str, OLDEST_GLIBC))}"]
    if shutil.which("zig"):
        return ["zig", "cc", *options]
    # looked for by file: find_spec would do, but tests run with modules that cannot be imported
    if any((Path(folder) / "ziglang").is_dir() for folder in sys.path if folder):
        return [sys.executable, "-m", "ziglang", "cc", *options]
    return []


def _missing_here() -> list[str]:
    raise EnvironmentLacks(
        "no C compiler found: install gcc or clang, or zig from its wheel (pip install ziglang), "
        "or set CC"
    )


def _missing(arch: str, cross: Cross) -> list[str]:
    raise EnvironmentLacks(
        f"no cross compiler for {arch}: install {cross.prefix}-gcc (Debian: apt install "
        f"{cross.package}), or zig from its wheel (pip install ziglang), or set {cross.variable}"
    )


def find_binutil(name: str, command: Sequence[str], target: Target, host_arch: str) -> str:
    """Path of a program that knows the target's object files: the compiler's, GNU's, LLVM's.

    Args:
        name: "ar" or "objcopy".
        command: the compiler.
        target: machine.
        host_arch: this machine's.

    Raises:
        EnvironmentLacks: there is none; zig brings none that can do what a static library needs.
    """
    asked = subprocess.run(
        [*command, f"-print-prog-name={name}"], capture_output=True, text=True, check=False
    )
    said = asked.stdout.strip()  # the bare name where the compiler has none of its own
    if asked.returncode == 0 and os.path.isabs(said) and Path(said).is_file():
        return said
    cross, own = CROSS[target.arch], target.arch == host_arch
    for candidate in (*([name] if own else []), f"{cross.prefix}-{name}", f"llvm-{name}"):
        if path := shutil.which(candidate):
            return path
    binutils = "binutils" if own else cross.package.replace("gcc", "binutils", 1)
    raise EnvironmentLacks(
        f"a static library for {target.arch} needs {name}: install binutils for it "
        f"(Debian: apt install {binutils}, or llvm)"
    )


# Version of pthread_create and pthread_join before glibc 2.34 moved them into libc.so.6.
_OLD_THREADS = {"x86_64": "GLIBC_2.2.5", "aarch64": "GLIBC_2.17", "armv7": "GLIBC_2.4"}


def old_glibc(command: Sequence[str], target: Target, work: Path) -> list[str]:
    """Options that make a shared library load on systems older than the one that links it.

    Newer C libraries bind threads to symbols of glibc 2.34, which is newer than many boards; the
    old ones are still there and do the same. Zig and other C libraries need nothing.

    Args:
        command: the compiler.
        target: machine.
        work: folder for the header that names the old symbols.
    """
    asked = subprocess.run(
        [*command, "-print-file-name=libpthread.so.0"], capture_output=True, text=True, check=False
    )
    if asked.returncode or not os.path.isabs(asked.stdout.strip()):
        return []
    version = _OLD_THREADS[target.arch]
    lines = "".join(
        f'__asm__(".symver {name},{name}@{version}");\n'
        for name in ("pthread_create", "pthread_join")
    )
    header = work / "old_glibc.h"
    header.write_text(f"#include <stdlib.h>\n#ifdef __GLIBC__\n{lines}#endif\n", "utf-8")
    return ["-include", header.name, "-Wl,--no-as-needed", "-l:libpthread.so.0",
            "-Wl,--as-needed"]  # fmt: skip


# ---------------------------------------------------------------------------- the linked library

# What a library may ask the system for; everything else would be missing on some board.
LIBRARIES = frozenset({
    "libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1", "ld-linux-armhf.so.3",
})  # fmt: skip


# TVM's runtime, and routines of the compiler's own library; glibc's names of that form are few.
_UNKNOWN = re.compile(
    r"_*TVM|tvm|__(?!errno_location$|assert_fail$|stack_chk|tls_get_addr$|getauxval$|cxa_|\w+_chk$|gmon_start)"
)


def check_library(path: Path, target: Target) -> Elf:
    """Read a linked library and refuse it where it would not run on the target.

    Raises:
        ArtifactError: another machine's, an executable stack, text relocations, a library or a
            symbol that the target's system does not have.
    """
    cross = CROSS[target.arch]
    found = read_elf(path.read_bytes())
    problems = []
    if (found.machine, found.bits) != (cross.machine, cross.bits):
        problems.append(
            f"it is for {found.machine_name} with {found.bits}-bit addresses, not {target.arch}"
        )
    if target.arch == "armv7" and found.machine == cross.machine and not found.hard_float:
        problems.append("it passes floats in integer registers (soft float ABI)")
    if not found.shared:
        problems.append("it is no shared library")
    if found.executable_stack:
        problems.append("it asks for an executable stack")
    if found.text_relocations:
        problems.append("its code has relocations (not position independent)")
    loader = {"libdl.so.2"} if target.cuda else set()  # which finds the GPU's driver
    foreign = sorted(set(found.needed) - LIBRARIES - loader)
    if foreign:
        problems.append(f"it needs {', '.join(foreign)}")
    if found.glibc > OLDEST_GLIBC and target.arch != native().arch:
        newest, oldest = (".".join(map(str, version)) for version in (found.glibc, OLDEST_GLIBC))
        problems.append(
            f"it needs glibc {newest}, boards may have {oldest} (set {cross.variable} to zig: "
            f"python -m ziglang cc -target {cross.triple}.{oldest})"
        )
    unknown = sorted(name for name in found.undefined if _UNKNOWN.match(name))
    if unknown:
        problems.append(f"nothing defines {', '.join(unknown)}")
    if problems:
        raise ArtifactError(
            f"the compiler made a library that would not run on {target.name}: "
            + "; ".join(problems)
        )
    return found
