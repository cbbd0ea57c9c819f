"""The contract of search plugins, for those that train: the toy network with a real trainer."""

from dataclasses import replace
from functools import cache

from mpqc.plan import Plan
from mpqc.search.problem import Problem
from mpqc.search.testing import SearchContract, ToyTrainer, toy_data, toy_graph
from mpqc.train.batches import SetData, TrainingSet
from mpqc.train.loop import Recipe
from mpqc.train.objective import Objective
from mpqc.train.trainer import PlanTrainer

BATCH = 4


@cache
def toy_trainer() -> PlanTrainer:
    """Of the network and the data of ``toy_problem``."""
    flat, data = toy_graph(BATCH), toy_data()
    training, held = TrainingSet.read(data, flat).split(0.1, 1000, 0)
    objective = Objective.of(flat, labelled=True)
    recipe = Recipe(epochs=1, batch_size=BATCH)
    made = PlanTrainer(
        toy_graph(), flat, SetData(training, BATCH), training, held, objective, recipe, device="cpu"
    )
    made.calibration()
    return made


class TrainedContract(SearchContract):
    """As ``SearchContract``; inherit, and name the method."""

    def solved(self, problem: Problem) -> Plan:
        if isinstance(problem.trainer, ToyTrainer):
            problem = replace(problem, trainer=toy_trainer())
        return super().solved(problem)
