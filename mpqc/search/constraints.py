"""What the user knows better: a TOML file that pins, excludes, ties and bounds layers by glob.

exclude = ["head.*"]                 # stay in float
tie = [["conv_10", "conv_13"]]       # equal weight and activation widths

[pin]                                # both widths, or one of them
conv_1 = "w8a8"
"gemm_*" = "w4"

[min]
"layer3.*" = "w3a3"

[max]
"*" = "a4"
"""

import difflib
import fnmatch
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mpqc.errors import UsageError
from mpqc.graph import Precision

_WIDTHS = re.compile(r"(?:w(\d))?(?:a(\d))?", re.IGNORECASE)
_Text = Annotated[str, Field(pattern=r"(?i)^(w[1-8])?(a[1-8])?$", min_length=2)]
_Names = Annotated[tuple[str, ...], Field(min_length=1)]


class Constraints(BaseModel):
    """Globs of layer names, and what holds for the layers that they match.

    Attributes:
        pin: these widths; the default of the first layers and the classifier gives way.
        min: at least these widths.
        max: at most these widths.
        exclude: the plan leaves them in float.
        tie: lists of globs; the layers of each list get equal widths.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pin: dict[str, _Text] = {}
    min: dict[str, _Text] = {}
    max: dict[str, _Text] = {}
    exclude: tuple[str, ...] = ()
    tie: tuple[_Names, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the TOML file.

        Raises:
            UsageError: missing, not TOML, an unknown key, a width that is none.
        """
        try:
            return cls.model_validate(tomllib.loads(Path(path).read_text("utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"cannot read the constraints {path}: {error}") from error
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UsageError(
                f"constraints {path}: {where}: {problem['msg']}; keys are "
                f"{', '.join(cls.model_fields)}, widths are written w2a4, w2 or a4"
            ) from error

    def matched(self, names: Iterable[str]) -> "Matched":
        """Resolve the globs.

        Args:
            names: of all quantizable layers.

        Raises:
            UsageError: a glob that matches nothing, with the names that are near; a layer that
                is pinned twice, or pinned and excluded.
        """
        known = tuple(names)
        pins: dict[str, tuple[int | None, int | None]] = {}
        for glob, text in self.pin.items():
            for name in _match(glob, known):
                if pins.setdefault(name, _parse(text)) != _parse(text):
                    raise UsageError(f"constraints: layer {name!r} is pinned to two widths")
        excluded = frozenset(name for glob in self.exclude for name in _match(glob, known))
        if both := sorted(excluded & pins.keys()):
            raise UsageError(f"constraints: layer {both[0]!r} is both pinned and excluded")
        ties = tuple(
            tuple(dict.fromkeys(name for glob in globs for name in _match(glob, known)))
            for globs in self.tie
        )
        for tie in ties:
            if out := sorted(excluded & set(tie)):
                raise UsageError(f"constraints: layer {out[0]!r} is both tied and excluded")
        return Matched(
            pins, _bounds(self.min, known, max), _bounds(self.max, known, min), excluded, ties
        )


class Matched:
    """Constraints by layer name.

    Attributes:
        pins: layer -> weight and activation width, None where it is free.
        excluded: layers that stay in float.
        ties: layers of equal widths.
    """

    def __init__(
        self,
        pins: dict[str, tuple[int | None, int | None]],
        low: dict[str, tuple[int, int]],
        high: dict[str, tuple[int, int]],
        excluded: frozenset[str],
        ties: tuple[tuple[str, ...], ...],
    ) -> None:
        self.pins, self._low, self._high = pins, low, high
        self.excluded, self.ties = excluded, ties

    def choices(self, name: str, candidates: Iterable[Precision]) -> tuple[Precision, ...]:
        """The candidates that the constraints leave to a layer.

        Raises:
            UsageError: none.
        """
        weight, activation = self.pins.get(name, (None, None))
        low, high = self._low.get(name, (1, 1)), self._high.get(name, (8, 8))
        left = dict.fromkeys(
            Precision(weight or candidate.weight, activation or candidate.activation)
            for candidate in candidates
            if (weight or low[0] <= candidate.weight <= high[0])
            and (activation or low[1] <= candidate.activation <= high[1])
        )
        if not left:
            raise UsageError(
                f"constraints leave layer {name!r} no width: at least w{low[0]}a{low[1]}, "
                f"at most w{high[0]}a{high[1]}; widen them or give more --widths"
            )
        return tuple(left)


def _match(glob: str, names: tuple[str, ...]) -> list[str]:
    if glob in names:  # names may hold brackets
        return [glob]
    if found := fnmatch.filter(names, glob):
        return found
    near = difflib.get_close_matches(glob.replace("*", ""), names, n=4, cutoff=0.4) or names[:4]
    raise UsageError(
        f"constraints: no quantizable layer is named {glob!r}; near names: {', '.join(near)}"
    )


def _parse(text: str) -> tuple[int | None, int | None]:
    match: Any = _WIDTHS.fullmatch(text)
    return tuple(None if bits is None else int(bits) for bits in match.groups())  # type: ignore[return-value]


def _bounds(
    globs: dict[str, str], names: tuple[str, ...], narrower: Callable[[int, int], int]
) -> dict[str, tuple[int, int]]:
    """The narrowest of the bounds that match each layer."""
    free = 1 if narrower is max else 8
    bounds: dict[str, tuple[int, int]] = {}
    for glob, text in globs.items():
        weight, activation = _parse(text)
        for name in _match(glob, names):
            old = bounds.get(name, (free, free))
            bounds[name] = (narrower(old[0], weight or free), narrower(old[1], activation or free))
    return bounds
