"""What docs/train shows runs as it stands there, on the demo model."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

from mpqc.search import precisions
from mpqc.search.ebs import Ebs
from mpqc.search.testing import toy_problem
from mpqc.train.search.ebs import EbsRelaxation
from tests.train.contract import toy_trainer

DOCS = Path(__file__).parents[2] / "docs/train"


def test_the_code_of_the_page_about_modules(
    demo: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = re.findall(r"```python\n(.*?)```", (DOCS / "modules.md").read_text(), re.DOTALL)
    (tmp_path / "model.onnx").write_bytes(demo[0].read_bytes())
    (tmp_path / "train.npz").write_bytes(demo[1].read_bytes())
    monkeypatch.chdir(tmp_path)
    shown = first.replace("conv2", "down").replace("batch_size=64", "batch_size=20")
    assert shown != first
    names: dict[str, Any] = {}
    exec(shown, names)
    exec(f"from mpqc.train import LsqWeights\n{second}", names)
    trainer, plan = names["trainer"], names["trainer"].plan(names["widths"])
    module = trainer.network(plan)
    hook = names["Mixture"](module.weight("down"), module.hooks.find("down").data, (2, 4))
    module.hooks.put("down", hook)
    module({"input": torch.rand(20, 1, 8, 8)})["logits"].square().sum().backward()
    assert hook.strengths.grad.abs().sum() > 0
    assert all(q.log_step.grad is not None for q in hook.quantizers)
    assert module.raw("down.weight").grad is not None


def test_the_code_of_the_page_about_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", (DOCS / "search.md").read_text(), re.DOTALL)
    package = ModuleType("my_package.relaxation")
    package.__dict__["MyRelaxation"] = lambda ground, method: EbsRelaxation(
        ground, Ebs(price=method.price)
    )
    monkeypatch.setitem(sys.modules, "my_package", ModuleType("my_package"))
    monkeypatch.setitem(sys.modules, "my_package.relaxation", package)
    names: dict[str, Any] = {"__name__": "mine"}
    exec(shown, names)
    problem = replace(toy_problem(), trainer=toy_trainer())
    plan = names["Mine"](price=1.0)(problem)
    assert problem.problems(precisions(plan)) == []
    assert plan.search is not None
    assert plan.search.method == "mine"
