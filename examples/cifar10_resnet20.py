"""ResNet-20 on CIFAR-10, end to end: search, fine-tune, compile, verify, accuracy of the library.

    pip install "mpqc[train,report]"
    python examples/cifar10_resnet20.py --method ebs              # minutes on a GPU
    python examples/cifar10_resnet20.py --method ebs --reduced    # minutes on two CPU cores

Any method that `mpqc methods` lists: uniform, sensitivity, hawq, eagl, progressive, exchange,
alps, dnas, ebs, fracbits. Call it again after an interruption: it goes on. Model and data are those
of ../shared, or --model, --train and --test: pictures `x` uint8 [n, 32, 32, 3], labels `y`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.recipe import REDUCED_OPTIONS, SHARED, Size, Task, existing, parser, run

PREPROCESS = """\
layout = "NHWC"
scale = 0.00392156862745098
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
"""
FULL = Size(samples=None, batch=64, search=10, tune=30)
REDUCED = Size(samples=1600, batch=32, search=1, tune=2, options=REDUCED_OPTIONS)


def main() -> None:
    """Find the files, run."""
    given = parser(str(__doc__), "build/cifar10_resnet20").parse_args()
    data = SHARED / "data"
    task = Task(
        "cifar10_resnet20",
        existing(given.model or SHARED / "models/cifar10_resnet20.onnx", "--model", "float model"),
        existing(given.train or data / "cifar10_train15k.npz", "--train", "training data"),
        existing(given.test or data / "cifar10_test_a.npz", "--test", "test data"),
        PREPROCESS,
        "flip" if given.reduced else "flip,crop=4",
    )
    run(given, task, FULL, REDUCED)


if __name__ == "__main__":
    main()
