"""Losses by layer and precision: the table that a solver reads and a user inspects."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mpqc.errors import OutputError
from mpqc.graph import Precision


@dataclass(frozen=True, eq=False)
class Scores:
    """What each layer loses at each of its widths; smaller is better, losses add up.

    Attributes:
        losses: layer -> precision -> loss. A precision that is missing is not allowed.
        unit: of a loss, in words.
    """

    losses: Mapping[str, Mapping[Precision, float]]
    unit: str

    def __post_init__(self) -> None:
        frozen = {name: MappingProxyType(dict(row)) for name, row in self.losses.items()}
        object.__setattr__(self, "losses", MappingProxyType(frozen))

    def gain(self, layer: str, precision: Precision) -> float:
        """Loss that the precision saves against the worst candidate of the layer."""
        row = self.losses[layer]
        if precision not in row:  # a uniform plan may mix widths that no score was made for
            return math.nan
        return max(row.values()) - row[precision]

    def save_csv(self, path: str | Path) -> None:
        """Write one row a layer and precision.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            with Path(path).open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["layer", "weight_bits", "activation_bits", self.unit])
                for name, row in self.losses.items():
                    for precision, loss in sorted(row.items(), key=lambda item: str(item[0])):
                        writer.writerow([name, precision.weight, precision.activation, repr(loss)])
        except OSError as error:
            raise OutputError(f"cannot write the table {path}: {error}") from error

    def save_png(self, path: str | Path) -> None:
        """Draw losses on a grid of layers by precisions, on a logarithmic scale of colours.

        Raises:
            EnvironmentLacks: matplotlib is missing.
            OutputError: the file cannot be written.
        """
        from mpqc.search.plot import heat_map

        columns = sorted({p for row in self.losses.values() for p in row}, key=_order)
        grid = [[row.get(p, float("nan")) for p in columns] for row in self.losses.values()]
        heat_map(grid, list(self.losses), list(map(str, columns)), self.unit, Path(path))


def _order(precision: Precision) -> tuple[int, int]:
    return precision.weight, precision.activation
