"""The command line as its own process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def mpqc(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "mpqc", *arguments],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
