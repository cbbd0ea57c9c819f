"""Latency of an artifact on a board."""

import statistics

from mpqc.artifact import Artifact
from mpqc.bench import Benchmark, Timing, layer_timings
from mpqc.boards.board import Board, check_freestanding
from mpqc.errors import UsageError


def bench_board(artifact: Artifact, board: Board, repeat: int, per_layer: bool) -> Benchmark:
    """Measure on a board.

    Args:
        artifact: built for the board.
        board: its number of threads holds for every run.
        repeat: measured runs.
        per_layer: also a row for each kernel.

    Raises:
        EnvironmentLacks: the board is gone.
        ArtifactError: the model does not run there.
    """
    if repeat < 1:
        raise UsageError(f"repeat starts at 1, got {repeat}")
    check_freestanding(artifact)
    (found,) = board.samples([artifact.library], repeat, 0.0)
    manifest = artifact.manifest
    facts = board.facts() | {"compiled_with": manifest["versions"]}
    own = Timing("mpqc", min(found.whole), statistics.median(found.whole), len(found.whole))
    shapes = [kind["shape"] for kind in manifest["inputs"].values()]
    batch = max((shape[0] for shape in shapes if shape), default=1)
    layers = layer_timings(manifest, found.steps) if per_layer else ()
    return Benchmark((own,), layers, facts, board.threads, batch)
