"""Searches that train: options here, without PyTorch; what they do is in ``mpqc.train.search``."""

from abc import abstractmethod
from dataclasses import dataclass

from mpqc.errors import UsageError
from mpqc.plan import Plan
from mpqc.search.base import ScoreSearch
from mpqc.search.problem import Problem
from mpqc.search.repair import repair
from mpqc.search.scores import Scores


@dataclass(frozen=True)
class TrainedSearch(ScoreSearch):
    """A search that learns widths together with weights, for one budget.

    Scores come from training towards the problem's budgets, so another budget is another search.
    """

    needs = frozenset({"trainer"})

    def scores(self, problem: Problem) -> Scores:
        if problem.trainer is None:
            raise UsageError(
                f"method {self.name()!r} trains: give --train data; "
                'it needs pip install "mpqc[train]"'
            )
        from mpqc.search.solve import solve

        even = {name: dict.fromkeys(row, 0.0) for name, row in problem.choices.items()}
        solve(problem, even)  # a budget that cannot be met is said before hours of training
        return self.learned(problem)

    @abstractmethod
    def learned(self, problem: Problem) -> Scores:
        """Train; the budgets can be met and the trainer is there.

        Raises:
            EnvironmentLacks: PyTorch is missing.
        """

    def plan(self, problem: Problem, scores: Scores) -> Plan:
        return problem.plan(repair(problem, scores.losses), self.name())
