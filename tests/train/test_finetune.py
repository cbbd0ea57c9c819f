"""The verb: from a plan to an accurate quantized model, and everything that can go wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from typer.testing import CliRunner

from mpqc import importer
from mpqc.cli import app
from mpqc.cli_finetune import parse_augment
from mpqc.data import open_data
from mpqc.errors import UsageError
from mpqc.graph import Precision
from mpqc.ort import Session
from mpqc.plan import Plan
from mpqc.train import folded, load_graph
from mpqc.train.batches import Augment
from mpqc.train.finetune import Options, finetune, suited
from mpqc.train.loop import Recipe, Status
from mpqc.train.objective import Objective

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(epochs=2, batch_size=25, lr=0.002, step_lr=0.002)
Files = tuple[Path, Path, Path]


def call(*words: object) -> Any:
    return CliRunner().invoke(app, ["finetune", *map(str, words)])


def refused(result: Any, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    for part in parts:
        assert part in " ".join(result.stderr.split()), result.stderr


def test_a_plan_becomes_a_quantized_model(demo: Files, tmp_path: Path) -> None:
    model, train, test = demo
    output = tmp_path / "tuned.onnx"
    seen: list[Status] = []
    result = finetune(
        model, output, train, Options(recipe=RECIPE), bits=Precision(2, 2), validate=test,
        report=seen.append,
    )  # fmt: skip
    assert (result.metric, result.device) == ("accuracy", "cpu")
    assert result.reference == pytest.approx(0.9899, abs=1e-3)
    assert result.after is not None
    assert result.after > 0.95
    assert len(seen) == 16
    assert {path.name for path in tmp_path.iterdir()} == {
        "tuned.onnx", "tuned.plan.json", "tuned.training",
    }  # fmt: skip
    assert (tmp_path / "tuned.training/curves.png").read_bytes()[:4] == b"\x89PNG"
    history = json.loads((tmp_path / "tuned.training/history.json").read_text())
    assert [row["epoch"] for row in history["epochs"]] == [1, 2]
    plan = Plan.load(result.plan)
    assert plan.model_sha256 == importer.sha256(output)
    assert plan.layers["down"].weight_bits == 2
    session = Session(output)
    with np.load(test) as arrays:
        logits = session.run({"input": arrays["input"]})["logits"]  # the batch stays open
        accuracy = (logits.argmax(1) == arrays["labels"]).mean()
    assert accuracy == pytest.approx(result.after, abs=0.005)


def test_labels_are_not_needed(demo: Files, tmp_path: Path) -> None:
    with np.load(demo[1]) as arrays:
        images = arrays["input"]
    np.savez(tmp_path / "unlabelled.npz", input=images)
    result = finetune(
        demo[0], tmp_path / "t.onnx", tmp_path / "unlabelled.npz", Options(recipe=RECIPE),
        bits=Precision(4, 4),
    )  # fmt: skip
    assert result.reference is None
    assert result.after is not None
    assert result.after >= 0.9


def tune(demo: Files, output: Path, **options: Any) -> bytes:
    finetune(
        demo[0], output, demo[1], Options(recipe=RECIPE, every=0.0), bits=Precision(2, 2),
        validate=demo[2], **options,
    )  # fmt: skip
    return output.read_bytes()


def test_interrupted_and_resumed_is_uninterrupted(demo: Files, tmp_path: Path) -> None:
    whole = tune(demo, tmp_path / "whole.onnx")
    output = tmp_path / "parts.onnx"

    def interrupt(status: Status) -> None:
        if status.step == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(demo, output, report=interrupt)
    assert not output.exists()
    assert tune(demo, output, resume=True) == whole
    assert not (tmp_path / "parts.training/checkpoint.pt").exists()


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_file(demo: Files, tmp_path: Path) -> None:
    words: list[str | Path] = [
        sys.executable, "-m", "mpqc", "finetune", demo[0], "--bits", "w2a2", "--train", demo[1],
        "--validate", demo[2], "--epochs", "20", "--batch-size", "20", "--checkpoint-every", "0",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*words, "-o", tmp_path / "whole.onnx"], check=True, env=environment)
    output, saved = tmp_path / "parts.onnx", tmp_path / "parts.training/checkpoint.pt"
    for sent in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen([*words, "-o", output, "--resume"], env=environment)
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        while process.poll() is None:
            if saved.exists() and saved.stat().st_mtime_ns != before:
                time.sleep(0.1)
                process.send_signal(sent)
                break
            time.sleep(0.01)
        assert process.wait() != 0
        assert saved.exists()
    subprocess.run([*words, "-o", output, "--resume"], check=True, env=environment)
    assert output.read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_the_command_line(demo: Files, tmp_path: Path) -> None:
    model, train, test = demo
    plan = Plan.uniform(
        folded(load_graph(model)), Precision(3, 3),
        model_sha256=importer.sha256(model),
    )  # fmt: skip
    plan.save(tmp_path / "plan.json")
    words = [
        model, "--plan", tmp_path / "plan.json", "--train", train, "--validate", test,
        "--epochs", 1, "--batch-size", 25, "--lr", 0.002, "--device", "cpu", "-v",
        "-o", tmp_path / "t.onnx",
    ]  # fmt: skip
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["metric"] == "accuracy"
    assert found["after"] > 0.95
    assert [row["epoch"] for row in found["history"]] == [1]
    assert "epoch 1: loss" in result.stderr
    refused(call(*words), 2, "t.onnx exists already", "--overwrite")
    again = call(*words, "--overwrite")
    assert again.exit_code == 0, again.output
    assert "accuracy, fine-tuned" in again.stdout


def test_what_cannot_work_is_said_before_the_work(demo: Files, tmp_path: Path) -> None:
    model, train, _ = demo
    output = tmp_path / "t.onnx"
    base = [model, "--train", train, "-o", output, "--epochs", 1]
    refused(call(*base), 2, "--plan P, or --bits w2a2")
    refused(call(*base, "--bits", "w2a2", "--batch-size", 500), 2,
            "180 training samples do not fill a batch of 500")  # fmt: skip
    refused(call(*base, "--bits", "w2a2", "--augment", "spin"), 2, "--augment wants")
    refused(call(*base, "--bits", "w2a2", "--device", "cuda:77"), 3, "--device cpu")
    refused(call(*base, "--bits", "w9a2"), 2, "1 to 8")
    with np.load(train) as arrays:
        np.savez(tmp_path / "bad.npz", input=arrays["input"], labels=arrays["labels"] + 1)
    refused(call(model, "--train", tmp_path / "bad.npz", "-o", output, "--bits", "w2a2"), 2,
            "label 10 of sample", "10 classes")  # fmt: skip
    with np.load(train) as arrays:
        np.savez(tmp_path / "bare.npz", input=arrays["input"])
    refused(
        call(model, "--train", tmp_path / "bare.npz", "-o", output, "--bits", "w2a2",
             "--label-weight", 0.5, "--batch-size", 20),
        2, "the training data have none",
    )  # fmt: skip
    stranger = Plan.uniform(folded(load_graph(model)), Precision(3, 3))
    stranger.save(tmp_path / "p.json")
    refused(call(*base, "--plan", tmp_path / "p.json"), 2, "was made for the model", "--force")
    assert not output.exists()
    assert not (tmp_path / "t.training").exists()


def test_a_lost_checkpoint_is_not_overwritten(demo: Files, tmp_path: Path) -> None:
    folder = tmp_path / "t.training"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"precious")
    words = [demo[0], "--train", demo[1], "-o", tmp_path / "t.onnx", "--bits", "w2a2",
             "--epochs", 1]  # fmt: skip
    refused(call(*words), 2, "interrupted run", "--resume", "--overwrite")
    refused(call(*words, "--resume"), 2, "cannot resume from")
    assert (folder / "checkpoint.pt").read_bytes() == b"precious"


def test_divergence_leaves_the_last_good_state(
    demo: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [demo[0], "--train", demo[1], "-o", tmp_path / "t.onnx", "--bits", "w2a2",
             "--epochs", 1, "--batch-size", 20, "--checkpoint-every", 0]  # fmt: skip
    exact = Objective.loss
    calls: list[int] = []

    def loss(self: Objective, *given: Any) -> Any:
        calls.append(1)
        return exact(self, *given) * (torch.nan if len(calls) == 4 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "loss", loss)
        refused(call(*words), 2, "diverged at step 3 of 9", "last good state", "lower --lr")
    assert not (tmp_path / "t.onnx").exists()
    resumed = call(*words, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert (tmp_path / "t.onnx").exists()


@pytest.mark.filterwarnings("ignore:overflow")
def test_weights_beyond_all_bounds_are_divergence_too(demo: Files, tmp_path: Path) -> None:
    words = [demo[0], "--train", demo[1], "-o", tmp_path / "t.onnx", "--bits", "w2a2",
             "--epochs", 1, "--batch-size", 20, "--lr", 1e37]  # fmt: skip
    refused(call(*words), 2, "training diverged", "lower --lr")
    assert not (tmp_path / "t.onnx").exists()


def test_resuming_with_other_options_is_refused(demo: Files, tmp_path: Path) -> None:
    output = tmp_path / "t.onnx"

    def interrupt(status: Status) -> None:
        if status.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(demo, output, report=interrupt)
    with pytest.raises(UsageError, match="the recipe was"):
        finetune(
            demo[0], output, demo[1], Options(recipe=Recipe(epochs=3, batch_size=25)),
            bits=Precision(2, 2), validate=demo[2], resume=True,
        )  # fmt: skip


def test_augmentation_in_words() -> None:
    assert parse_augment("none") == Augment()
    assert parse_augment("flip, crop=4") == Augment(True, 4)
    with pytest.raises(UsageError, match="crop=PIXELS"):
        parse_augment("crop")


def test_without_matplotlib_there_are_no_curves(
    demo: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = finetune(
        demo[0], tmp_path / "t.onnx", demo[1],
        Options(recipe=Recipe(epochs=0.2, batch_size=20)), bits=Precision(8, 8),
    )  # fmt: skip
    assert "mpqc[report]" in result.notes[0]
    assert not (tmp_path / "t.training/curves.png").exists()
    assert result.model.exists()
    assert open_data(demo[2], importer.load(result.model))


def test_feeds_of_a_function(demo: Files, tmp_path: Path) -> None:
    (tmp_path / "feeds.py").write_text(
        "import numpy as np\n"
        f"arrays = np.load({str(demo[1])!r})\n"
        "def feeds():\n"
        "    for picture in arrays['input'][:60]:\n"
        "        yield {'input': picture[None]}\n"
    )
    result = finetune(
        demo[0], tmp_path / "t.onnx", f"{tmp_path / 'feeds.py'}:feeds",
        Options(recipe=Recipe(epochs=1, batch_size=20, lr=0.001)), bits=Precision(4, 4),
    )  # fmt: skip
    assert result.after is not None
    assert len(result.history) == 1


def test_a_start_that_no_epoch_reaches_is_delivered(demo: Files, tmp_path: Path) -> None:
    """With --validate the best of all is in the file, and the report says which that was."""
    words = [demo[0], "--train", demo[1], "--validate", demo[2], "--bits", "w4a4",
             "--batch-size", 20, "-o", tmp_path / "t.onnx"]  # fmt: skip
    result = call(*words, "--epochs", 2, "--lr", 2, "--step-lr", 2, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    epochs = [row["validation"] for row in found["history"]]
    assert max(epochs) < found["before"]  # these rates are absurd
    assert found["delivered"] == 0
    assert found["after"] == found["before"]
    with np.load(demo[2]) as arrays:
        logits = Session(tmp_path / "t.onnx").run({"input": arrays["input"]})["logits"]
        accuracy = (logits.argmax(1) == arrays["labels"]).mean()
    assert accuracy == pytest.approx(found["before"], abs=0.005)
    table = call(*words, "--epochs", 2, "--lr", 2, "--step-lr", 2, "--overwrite")
    assert "the rounded start" in " ".join(table.stdout.split())


def test_the_best_epoch_survives_an_interruption(demo: Files, tmp_path: Path) -> None:
    """Epochs that get worse: the first or the start is what both runs deliver."""
    recipe = Recipe(epochs=3, batch_size=25, lr=0.5, step_lr=0.5)

    def tuned(output: Path, **given: Any) -> Any:
        return finetune(
            demo[0], output, demo[1], Options(recipe=recipe, every=0.0), bits=Precision(3, 3),
            validate=demo[2], **given,
        )  # fmt: skip

    def interrupt(status: Status) -> None:
        if status.step == 19:
            raise KeyboardInterrupt

    whole = tuned(tmp_path / "whole.onnx")
    assert whole.delivered < 3
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "parts.onnx", report=interrupt)
    parts = tuned(tmp_path / "parts.onnx", resume=True)
    assert (parts.delivered, parts.after) == (whole.delivered, whole.after)
    assert (tmp_path / "parts.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_rates_that_nobody_gave_grow_with_the_number_of_steps() -> None:
    recipe = Recipe(epochs=2, batch_size=10, lr=0.001, step_lr=0.001)
    both = frozenset({"lr", "step_lr"})
    assert suited(recipe, frozenset(), 10_000) == recipe
    few, some, many = (suited(recipe, both, samples) for samples in (100, 1000, 10_000))
    assert (few.lr, few.step_lr) == (Recipe.lr, Recipe.step_lr)
    assert (some.lr, some.step_lr) == pytest.approx((2 * few.lr, 2**0.5 * few.step_lr))
    assert (many.lr, many.step_lr) == pytest.approx((4 * few.lr, 2 * few.step_lr))
    assert suited(recipe, frozenset({"lr"}), 10_000).step_lr == 0.001
