"""The recipes of examples/, end to end on the smallest model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

Files = tuple[Path, Path, Path]
EXAMPLES = Path(__file__).parents[2] / "examples"


def recipe(name: str, *words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, words)], cwd=folder, text=True,
        capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


def words_of(demo: Files, *more: object) -> list[object]:
    model, train, test = demo
    return ["--model", model, "--train", train, "--test", test, "--reduced", "-o", "out", *more]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["uniform", "ebs"])
def test_a_recipe_goes_from_the_float_model_to_the_librarys_accuracy(
    demo: Files, tmp_path: Path, method: str
) -> None:
    words = words_of(demo, "--method", method, "--epochs", 4)
    first = recipe("mnist", *words, folder=tmp_path)
    assert first.returncode == 0, first.stderr
    found = json.loads((tmp_path / "out/result.json").read_text())
    assert (found["method"], found["pictures"]) == (method, 597)
    assert found["accuracy"] > 0.93
    assert "out/build/model.so" in first.stdout
    again = recipe("mnist", *words, folder=tmp_path)
    assert again.stdout.count("done before") == 5
    other = recipe("mnist", *words[:-1], 3, folder=tmp_path)
    assert other.stdout.count("done before") == 1  # the search: only the epochs differ


@pytest.mark.slow
def test_a_killed_recipe_goes_on(demo: Files, tmp_path: Path) -> None:
    words = words_of(demo, "--method", "uniform", "--epochs", 40)
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "mnist.py", *map(str, words)], cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    saved = tmp_path / "out/tuned.training/checkpoint.pt"
    while process.poll() is None and not saved.exists():
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    after = recipe("mnist", *words, folder=tmp_path)
    assert after.returncode == 0, after.stderr
    assert "[search] done before" in after.stdout
    assert "--resume" in after.stdout
    assert (tmp_path / "out/result.json").exists()


def test_missing_files_are_named_with_the_option_that_gives_them(tmp_path: Path) -> None:
    made = recipe("cifar10_resnet20", "--model", tmp_path / "none.onnx", folder=tmp_path)
    assert made.returncode == 1
    assert f"no float model at {tmp_path / 'none.onnx'}: give it with --model FILE" in made.stderr
    made = recipe("mnist", "--train", tmp_path / "x.npz", folder=tmp_path)
    assert "all three or none" in made.stderr
