"""From fine-tuning to a library: the compiler computes what the trainer measured."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='training needs "mpqc[train]"')

import mpqc
from mpqc.graph import Precision
from mpqc.inspect_model import inspect_model
from mpqc.pipeline import Options as Compile
from mpqc.pipeline import compile_model
from mpqc.target import find_target
from mpqc.train.finetune import Options, finetune
from mpqc.train.loop import Recipe
from mpqc.train.quantized_layer import Quantizers

Files = tuple[Path, Path, Path]


@pytest.mark.parametrize(
    ("bits", "quantizers"),
    [
        ("w2a2", Quantizers()),
        ("w3a3", Quantizers("lsq-odd")),
        pytest.param("w4a4", Quantizers("dorefa", "pact"), marks=pytest.mark.slow),
        pytest.param("w1a2", Quantizers(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_library_reaches_the_accuracy_that_was_reported(
    demo: Files, tmp_path: Path, bits: str, quantizers: Quantizers
) -> None:
    model, train, test = demo
    recipe = Recipe(epochs=1, batch_size=20, lr=0.002, step_lr=0.002)
    tuned = finetune(
        model, tmp_path / "tuned.onnx", train, Options(recipe=recipe, quantizers=quantizers),
        bits=Precision.parse(bits), validate=test,
    )  # fmt: skip
    told = {row.name: row.widths for row in inspect_model(tuned.model).layers}
    assert {told[name] for name in ("down", "pointwise")} == {bits}
    compiled = compile_model(tuned.model, tmp_path / "compiled", Compile(find_target("native")))
    layers = {layer["name"]: layer for layer in compiled.manifest["layers"]}
    assert {layers[name]["run"] for name in ("down", "pointwise")} == {bits}
    library = mpqc.load(compiled.library)
    with np.load(test) as arrays:
        pictures, labels = arrays["input"], arrays["labels"]
    found = [int(library.run({"input": x[None]})["logits"].argmax()) for x in pictures]
    accuracy = float((np.array(found) == labels).mean())
    assert accuracy == tuned.after
