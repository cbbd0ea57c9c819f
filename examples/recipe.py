"""Search, fine-tune, compile, verify, measure: the commands of a recipe, one after the other.

``cifar10_resnet20.py`` and ``mnist.py`` say what is trained on what; this file calls ``mpqc`` and
shows each command, so that it can be repeated by hand. A step whose command has been run with the
same words is not run again, and an interrupted training goes on: call the same recipe again.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # models and data, where a checkout has them beside it
TRAINED = ("alps", "dnas", "ebs", "fracbits")  # methods that train
OWN_DATA = ("exchange", "hawq", "progressive", "sensitivity")  # methods that measure


@dataclass(frozen=True)
class Task:
    """What a recipe works on.

    Attributes:
        name: of the folder for all files, by default.
        model: float ONNX file.
        train: training data, ``.npz``.
        test: test data with labels.
        preprocess: text of the TOML file for both; empty: none.
        augment: of pictures in training.
        options: words for search and fine-tuning of this network.
    """

    name: str
    model: Path
    train: Path
    test: Path
    preprocess: str = ""
    augment: str = "none"
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """How much is trained.

    Attributes:
        samples: of the training data; None: all.
        batch: samples of a step.
        search: epochs of a search that trains.
        tune: epochs of the fine-tuning.
        options: method -> its options.
    """

    samples: int | None
    batch: int
    search: float
    tune: float
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)


REDUCED_OPTIONS = {
    "alps": ("epochs=0.1", "start=1"),
    "dnas": ("quantizer=lsq", "share_weights=true", "samples=0"),
}


def parser(about: str, folder: str) -> argparse.ArgumentParser:
    """What all recipes can be told."""
    made = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--method", default="ebs", help="as `mpqc methods` lists them [ebs]")
    made.add_argument("--budget", default="bitops=w3a3", help="[bitops=w3a3]")
    made.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                      help="of the method; repeatable")  # fmt: skip
    made.add_argument(
        "--reduced", action="store_true", help="for two CPU cores: less of everything"
    )
    made.add_argument("--epochs", type=float, help="of the fine-tuning")
    made.add_argument("--samples", type=int, help="of the training data")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda [auto]")
    made.add_argument("--model", type=Path, help="float ONNX file")
    made.add_argument("--train", type=Path, help="training data, .npz")
    made.add_argument("--test", type=Path, help="test data with labels, .npz")
    made.add_argument("-o", "--output", type=Path, help=f"folder for all files [{folder}/METHOD]")
    return made


def existing(path: Path, option: str, what: str) -> Path:
    """The path, or the end with what to do."""
    if not path.is_file():
        sys.exit(f"no {what} at {path}: give it with {option} FILE")
    return path


class Steps:
    """Commands that are run once.

    Args:
        folder: of all files; ``steps.json`` says what has been done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "steps.json"
        self._done: dict[str, list[str]] = {}
        if self._file.exists():
            self._done = json.loads(self._file.read_text("utf-8"))
        self._again = False  # a step was run: later ones read what it wrote

    def interrupted(self, step: str, *inputs: object) -> bool:
        """Whether the step was begun with the same inputs before, and noted that it begins."""
        note = self.folder / f"{step}.begun"
        told = sha256(repr([str(word) for word in inputs]).encode()).hexdigest()
        same = note.exists() and note.read_text("utf-8") == told
        note.write_text(told, "utf-8")
        return same

    def call(self, step: str, output: Path, *words: object) -> None:
        """Run ``mpqc``; its report goes to ``STEP.json``."""
        command = [str(word) for word in words]
        known = [word for word in self._done.get(step, ()) if word != "--resume"]
        wanted = [word for word in command if word != "--resume"]
        if not self._again and known == wanted and output.exists():
            print(f"[{step}] done before: {output}", flush=True)
            return
        self._done.pop(step, None)
        self._again = True
        print(f"[{step}] mpqc {shlex.join(command)}", flush=True)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "mpqc", *command, "--json"],
            stdout=subprocess.PIPE, env=environment, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.stdout.buffer.write(done.stdout)
            self._file.write_text(json.dumps(self._done, indent=1), "utf-8")
            sys.exit(done.returncode)  # mpqc has said why
        (self.folder / f"{step}.json").write_bytes(done.stdout)
        self._done[step] = command
        self._file.write_text(json.dumps(self._done, indent=1), "utf-8")
        print(f"[{step}] {time.monotonic() - started:.0f} s", flush=True)


def run(given: argparse.Namespace, task: Task, full: Size, reduced: Size) -> None:
    """All steps, then what came out."""
    size = reduced if given.reduced else full
    kind = f"{given.method}-reduced" if given.reduced else given.method
    folder = given.output or Path("build", task.name, kind)
    steps = Steps(folder)
    prepared = []
    if task.preprocess:
        (folder / "preprocess.toml").write_text(task.preprocess, "utf-8")
        prepared = ["--preprocess", folder / "preprocess.toml"]
    samples = given.samples or size.samples
    training = [
        "--train", task.train, "--batch-size", size.batch, "--augment", task.augment,
        "--device", given.device, *(["--max-samples", samples] if samples else []),
    ]  # fmt: skip
    plan, tuned, build = folder / "plan.json", folder / "tuned.onnx", folder / "build"

    words: list[object] = ["--method", given.method, "--budget", given.budget, *task.options]
    for option in (*size.options.get(given.method, ()), *given.option):
        words += ["--option", option]
    if given.method in TRAINED:
        words += [*training, "--epochs", size.search, *prepared]
    elif given.method in OWN_DATA:
        words += ["--data", task.train, *prepared]
    steps.call("search", plan, "search", task.model, *words, "-o", plan, "--overwrite")
    tuning = [
        "--plan", plan, *training, *prepared, "--epochs", given.epochs or size.tune, "-o", tuned,
        "--overwrite",
    ]  # fmt: skip
    resume = steps.interrupted("finetune", task.model, *tuning, plan.read_text("utf-8"))
    if resume and (folder / "tuned.training/checkpoint.pt").exists():
        tuning.append("--resume")
    steps.call("finetune", tuned, "finetune", task.model, *tuning)
    steps.call("compile", build / "model.so", "compile", tuned, "-o", build, "--overwrite")
    steps.call("verify", folder / "verify.json", "verify", build, "--data", task.test, *prepared)
    outputs = folder / "outputs.npz"
    steps.call("run", outputs, "run", build, "--input", task.test, *prepared, "-o", outputs,
               "--overwrite")  # fmt: skip
    report(folder, task, given)


def report(folder: Path, task: Task, given: argparse.Namespace) -> None:
    """Accuracy of the compiled network, its widths, its files."""
    with np.load(folder / "outputs.npz") as made, np.load(task.test) as test:
        logits = made[made.files[0]]
        labels = test["labels" if "labels" in test.files else "y"]
    accuracy = float((logits.argmax(1) == labels[: len(logits)]).mean())
    tuned = json.loads((folder / "finetune.json").read_text("utf-8"))
    layers = json.loads((folder / "plan.json").read_text("utf-8"))["layers"]
    result = {
        "method": given.method, "budget": given.budget, "reduced": given.reduced,
        "accuracy": accuracy, "pictures": len(logits),
        "held_out": {key: tuned[key] for key in ("reference", "before", "after")},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    widths = " ".join(f"w{row['weight_bits']}a{row['activation_bits']}" for row in layers.values())
    print(f"\n{given.method} at {given.budget}{', REDUCED' if given.reduced else ''}: {widths}")
    shares = [
        f"{name} {tuned[key]:.2%}"
        for key, name in (("reference", "float"), ("before", "rounded"), ("after", "fine-tuned"))
        if tuned[key] is not None
    ]
    print(f"held-out part of the training data: {', '.join(shares)}")
    print(f"compiled library, {len(logits)} test pictures: {accuracy:.2%}")
    for name in ("plan.json", "tuned.onnx", "tuned.training/curves.png", "build/model.so",
                 "result.json"):  # fmt: skip
        if (folder / name).exists():
            print(f"  {folder / name}")
