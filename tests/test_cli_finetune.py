"""The verb without PyTorch: the error names the extra, and nothing else needs it."""

import os
import subprocess
import sys
from pathlib import Path

import mpqc.demo

ROOT = Path(__file__).parents[1]
BLOCKED = "import sys; sys.modules['torch'] = None; from mpqc.cli import main; main()"


def run(*words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *map(str, words)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600,
    )  # fmt: skip


def test_without_torch_the_error_names_the_extra(tmp_path: Path) -> None:
    model, train, _ = mpqc.demo.files()
    output = tmp_path / "t.onnx"
    result = run("finetune", model, "--bits", "w2a2", "--train", train, "-o", output)
    assert result.returncode == 3
    assert 'pip install "mpqc[train]"' in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_torch_the_help_is_there_and_other_verbs_work() -> None:
    shown = run("finetune", "--help")
    assert shown.returncode == 0
    assert "Example: mpqc finetune" in shown.stdout
    assert run("methods").returncode == 0
