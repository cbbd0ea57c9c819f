"""Documentation of boards and of the C library does what it says: its commands and programs."""

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mpqc.demo import files
from mpqc.ort import Session
from mpqc.target import TARGETS
from tests.arm_emulator import cross_compiler, emulator
from tests.c_programs import call, needs

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: str, name: str) -> list[str]:
    """Lines that the user types, under ``<!-- name -->``."""
    text = (DOCS / page).read_text("utf-8")
    block = re.search(rf"<!-- {name} -->\n```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert block, name
    return [line.removeprefix("$ ") for line in block[1].splitlines() if line.startswith("$ ")]


def program(page: str) -> str:
    (found,) = [block for block in blocks(page, "c") if "int main" in block]
    return found


def typed(line: str, folder: Path) -> str:
    """Run a line in a shell, where ``mpqc`` is that of this checkout."""
    tools = folder / "bin"
    if not tools.exists():
        tools.mkdir()
        (tools / "mpqc").write_text(f'#!/bin/sh\nexec {sys.executable} -m mpqc "$@"\n', "utf-8")
        (tools / "mpqc").chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}",
           "PYTHONPATH": str(DOCS.parent)}  # fmt: skip
    return call(["/bin/sh", "-c", line], cwd=folder, env=env)


def test_from_onnx_to_a_board(tmp_path: Path) -> None:
    """Every line of the page; the board is an emulator, and installs are taken as done."""
    emulator("aarch64")
    cross_compiler(TARGETS["rpi4"])
    shutil.copyfile(files().model, tmp_path / "model.onnx")
    shutil.copyfile(files().calibration, tmp_path / "calibration.npz")
    (tmp_path / "main.c").write_text(program("arm.md"), "utf-8")
    install, compile_ = commands("arm.md", "compile")
    assert install.startswith("sudo apt install ")
    typed(compile_, tmp_path)
    install, link, run = commands("arm.md", "emulated")
    assert install.startswith("sudo apt install ")
    typed(f"{link} -Wall -Wextra -Werror", tmp_path)
    scores = [float(line) for line in typed(run, tmp_path).split()]
    reference = Session((tmp_path / "build/reference.onnx").read_bytes())
    (wanted,) = reference.run({"input": np.zeros((1, 1, 8, 8), np.float32)}).values()
    np.testing.assert_allclose(scores, wanted.reshape(-1), rtol=1e-5)

    copy, remote = commands("arm.md", "board")
    words = copy.split()
    assert (words[0], words[-1]) == ("scp", "pi@raspberrypi:")
    board = tmp_path / "board"
    board.mkdir()
    for name in words[1:-1]:
        shutil.copy(tmp_path / name, board)
    quoted = re.fullmatch(r'ssh pi@raspberrypi "(.*)"', remote)
    assert quoted
    there = quoted[1].replace("gcc ", "aarch64-linux-gnu-gcc ", 1)
    there = there.replace("&& ./main", f"&& {run}")
    assert [float(line) for line in typed(there, board).split()] == scores


@pytest.mark.parametrize("form", ["", "--bare"])
def test_programs_of_the_c_library_page(tmp_path: Path, form: str) -> None:
    """The page's program, by the page's own line; and its memory that is laid out in advance."""
    needs("cc")
    typed(f"mpqc compile {files().model} --bits w4a4 --data {files().calibration} -o build {form}",
          tmp_path)  # fmt: skip
    source = program("c-library.md")
    if form == "--bare":
        (memory,) = [
            block for block in blocks("c-library.md", "c") if "MPQC_SCRATCH_BYTES" in block
        ]
        static, create = memory.strip().splitlines()
        source = re.sub(r"int status = mpqc_create\(.*?\);.*", f"int status = {create}", source)
        source = source.replace("int main", f"{static}\n\nint main", 1)
    (tmp_path / "program.c").write_text(source, "utf-8")
    text = (DOCS / "c-library.md").read_text("utf-8")
    (line,) = re.findall(r"^    (cc program\.c -I build .*)$", text, re.MULTILINE)
    typed(f"{line} -Wall -Wextra -Werror", tmp_path)
    typed("./program", tmp_path)
