"""What can go wrong, by whose fault. The CLI prints these without a traceback.

Exit codes (documented in the README): 1 a check failed, 2 bad input or usage,
3 the environment lacks something, 4 a budget cannot be met.
"""

from typing import ClassVar


class MpqcError(Exception):
    """Base of every error that mpqc raises on purpose: names the thing and the cure."""

    exit_code: ClassVar[int] = 2


class CheckFailed(MpqcError):  # noqa: N818 - reads as the sentence it is
    """A check that the user asked for ran, and its answer is no."""

    exit_code = 1


class GraphError(MpqcError):
    """The graph breaks an invariant of the IR."""


class PassError(MpqcError):
    """A pass was given a graph outside its precondition, or left one broken."""


class ModelError(MpqcError):
    """The model file is corrupt, hostile, or holds something that cannot be compiled."""


class DataError(MpqcError):
    """Calibration or input data that does not fit the model: names, shapes, dtypes, NaN."""


class PlanError(MpqcError):
    """The plan is malformed, or was made for another model."""


class OutputError(MpqcError):
    """The result cannot be written where the user asked."""


class ArtifactError(MpqcError):
    """The artifact is incomplete, damaged, or was built for another machine."""


class UsageError(MpqcError):
    """The options contradict each other or name something that does not exist."""


class EnvironmentLacks(MpqcError):  # noqa: N818
    """A compiler, a package or a device is missing: says what to install."""

    exit_code = 3


class BudgetError(MpqcError):
    """No assignment of bitwidths meets the budget."""

    exit_code = 4
