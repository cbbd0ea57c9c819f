"""Contestants that run in turn, in one process, so that what disturbs one disturbs all."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.clock import Clock

TIMERS = ("wall", "cpu")
# ONNX Runtime's threads spin for a while after a run; the next contestant waits until they sleep.
REST = 0.03  # seconds


@dataclass(frozen=True)
class Time:
    """Seconds of one run.

    Attributes:
        best, median: of all runs.
        runs: measured.
    """

    best: float
    median: float
    runs: int


def take_turns(
    runs: Mapping[str, Callable[[int], list[float]]],
    rounds: int,
    clock: Clock,
    repeat: int = 3,
    rest: float = 0.0,
    timer: str = "wall",
) -> dict[str, Time]:
    """Time contestants: in each round each of them runs once unmeasured, then ``repeat`` times.

    Args:
        runs: name -> what runs so many times and returns the seconds of each.
        rounds: turns of each.
        clock: looks at the clock once a round.
        repeat: measured runs of a turn.
        rest: seconds between turns.
        timer: "wall", or "cpu" for the time that this thread computes, feeding included: what
            counts on a machine that is busy, of contestants on one thread.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        clock.look()
        for name, run in runs.items():
            time.sleep(rest)
            if timer == "wall":
                times[name] += run(repeat + 1)[1:]
                continue
            run(1)
            for _ in range(repeat):
                start = time.thread_time()
                run(1)
                times[name].append(time.thread_time() - start)
    return {
        name: Time(min(found), statistics.median(found), len(found))
        for name, found in times.items()
    }
