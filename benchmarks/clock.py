"""The clock that the core runs at while a benchmark runs: what /proc says is a guess.

python -m benchmarks.clock
"""

import ctypes

from benchmarks import c_code

TURNS = 100_000  # of 16 cycles: half a millisecond
WARM_UP = 20  # windows, for a core that was asleep


class Clock:
    """Watches the clock: the fastest of short windows, since a disturbance only slows them.

    Raises:
        EnvironmentLacks: no C compiler.
    """

    def __init__(self) -> None:
        library = c_code.load("clock")
        self._hertz = library.clock_hertz
        self._hertz.argtypes, self._hertz.restype = [ctypes.c_int64], ctypes.c_double
        self.seen: list[float] = []
        for _ in range(WARM_UP):
            self._hertz(TURNS)

    def look(self) -> None:
        """Take a few windows more."""
        self.seen += [self._hertz(TURNS) for _ in range(3)]

    @property
    def hertz(self) -> float:
        """Cycles a second: the median of what the fastest of each three windows said."""
        if not self.seen:
            self.look()
        best = sorted(max(self.seen[i : i + 3]) for i in range(0, len(self.seen), 3))
        return best[len(best) // 2]


if __name__ == "__main__":
    print(f"{Clock().hertz / 1e9:.3f} GHz")
