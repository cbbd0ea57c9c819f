"""Handwritten digits, end to end: search, fine-tune, compile, verify, accuracy of the library.

    pip install "mpqc[train,report]"
    python examples/mnist.py --method ebs              # minutes on a GPU
    python examples/mnist.py --method ebs --reduced    # about a minute on two CPU cores

Any method that `mpqc methods` lists: uniform, sensitivity, hawq, eagl, progressive, exchange,
alps, dnas, ebs, fracbits. Call it again after an interruption: it goes on. Model and data are
MNIST's of ../shared, or --model, --train and --test, which hold what the model takes. Where there
are none, or with --digits, a small network is trained first, on the 8x8 digits of scikit-learn
(examples/train_digits.py).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.recipe import REDUCED_OPTIONS, SHARED, Size, Task, existing, parser, run

PREPROCESS = 'layout = "NHW"\n'  # 0 to 255, as the model takes them
FULL = Size(samples=None, batch=64, search=10, tune=20)
REDUCED = Size(samples=2000, batch=32, search=1, tune=2, options=REDUCED_OPTIONS)
ALL_LAYERS = ("--first-last", "search")  # one layer alone is neither the first nor the last


def trained_digits(folder: Path) -> Task:
    """The network of `mpqc demo`, trained here, with its training data."""
    task = Task("digits", folder / "digits.onnx", folder / "train.npz", folder / "test.npz")
    if not all(file.exists() for file in (task.model, task.train, task.test)):
        try:
            from examples import train_digits
        except ImportError as error:
            sys.exit(
                f"no model and data of MNIST in {SHARED}: give --model, --train and --test, or "
                f'for scikit-learn\'s digits: pip install "mpqc[train]" scikit-learn ({error})'
            )
        import numpy as np
        import onnx

        print(f"[train] scikit-learn's digits: {task.model}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        sets = train_digits.data()
        for name in ("train", "test"):
            images, labels = sets[name]
            np.savez(folder / f"{name}.npz", input=images, labels=labels)
        onnx.save(train_digits.to_onnx(train_digits.train(*sets["train"])), task.model)
    return task


def main() -> None:
    """Find the files, or make them; run."""
    arguments = parser(str(__doc__), "build/mnist")
    arguments.add_argument("--digits", action="store_true", help="train on scikit-learn's digits")
    given = arguments.parse_args()
    own = (given.model, given.train, given.test)
    model, data = SHARED / "models/mnist_cnn.onnx", SHARED / "data"
    if any(own):
        if not all(own):
            sys.exit("give --model, --train and --test, all three or none")
        task = Task(
            "mnist",
            existing(given.model, "--model", "float model"),
            existing(given.train, "--train", "training data"),
            existing(given.test, "--test", "test data"),
        )
    elif given.digits or not model.exists():
        task = trained_digits(Path("build/digits"))
    else:
        train, test = data / "mnist_train20k.npz", data / "mnist_test_a.npz"
        task = Task(
            "mnist", model, existing(train, "--train", "training data"),
            existing(test, "--test", "test data"), PREPROCESS, "none", ALL_LAYERS,
        )  # fmt: skip
    run(given, task, FULL, REDUCED)


if __name__ == "__main__":
    main()
