"""C sources beside the benchmarks, compiled when they are needed."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from mpqc.errors import EnvironmentLacks


@cache
def load(name: str) -> ctypes.CDLL:
    """``NAME.c`` of this folder as a loaded library.

    Raises:
        EnvironmentLacks: no C compiler, or it refuses the source.
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise EnvironmentLacks(f"{name}.c needs a C compiler: apt install gcc")
    source = Path(__file__).with_name(f"{name}.c")
    with tempfile.TemporaryDirectory(prefix="mpqc-") as folder:
        library = Path(folder, f"{name}.so")
        command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise EnvironmentLacks(f"{compiler} refuses {source.name}: {result.stderr.strip()}")
        return ctypes.CDLL(str(library))
