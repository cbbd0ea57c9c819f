"""The embedded demo: a small residual network for 8x8 digits, and pictures of both sets.

Trained by `examples/train_digits.py` on the digits of scikit-learn (BSD-3-Clause; originally UCI
"Optical Recognition of Handwritten Digits", CC BY 4.0): 42 thousand weights, 1.57 million
multiply-adds, 98.99 % on the test pictures.
"""

from pathlib import Path
from typing import NamedTuple


class DemoFiles(NamedTuple):
    """Where the demo's files lie on disk.

    Attributes:
        model: float ONNX, opset 17: `input` float32 [N, 1, 8, 8] in 0..1 to `logits` [N, 10].
        calibration: npz of 200 training pictures: `input` as the model takes it, `labels` int64.
        test: npz of 597 pictures that training never saw, same arrays.
    """

    model: Path
    calibration: Path
    test: Path


def files() -> DemoFiles:
    """The files as installed with the package; read them, do not write there."""
    folder = Path(__file__).parent
    return DemoFiles(folder / "digits.onnx", folder / "calibration.npz", folder / "test.npz")
