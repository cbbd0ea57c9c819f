"""Calibration and sensitivity stream: a thousand pictures need no more memory than a hundred."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RUN = """
import resource, sys
from mpqc.passes.find_layers import find_layers
from mpqc.pipeline import import_model
from mpqc.search import search_plan
from mpqc.search.constraints import Constraints

model, data, preprocess = sys.argv[1:]
free = ("conv_9", "conv_18", "conv_164")  # early, large; middle; late, many weights
pins = {l.name: "w8a8" for l in find_layers(import_model(model)) if l.name not in free}
search_plan(
    model, method="sensitivity", budgets="bitops=0.99*w8a8", data=data, preprocess=preprocess,
    widths=(4, 8), options={"samples": "1000"}, constraints=Constraints(pin=pins),
)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_mobilenet_v2_with_1000_pictures_stays_under_2_gb(
    shared_models: Path, tmp_path: Path
) -> None:
    """Calibrates all layers, and measures three of them, on all pictures."""
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (1000, 224, 224, 3), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", x=pictures)
    (tmp_path / "p.toml").write_text("scale = 0.00784\nmean = [1.0, 1.0, 1.0]\n")
    done = subprocess.run(
        [sys.executable, "-c", RUN, shared_models / "mobilenet_v2_1.0_224.onnx",
         tmp_path / "pictures.npz", tmp_path / "p.toml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 2e9
