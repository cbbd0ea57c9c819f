"""What docs/train shows runs as it stands there, on the demo model."""

import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

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
