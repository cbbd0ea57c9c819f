import numpy as np
import pytest

from mpqc.errors import DataError, ModelError
from mpqc.graph import Array, Graph
from mpqc.onnx_export import to_onnx
from mpqc.ort import Session

MODEL = to_onnx(
    Graph.parse(
        "%x = Input() : f32[2]\n%y = Relu(%x) : f32[2]\n%z = Exp(%y) : f32[2]\nreturn %z, %y"
    )
)


@pytest.mark.parametrize("optimise", [False, True])
def test_runs(optimise: bool) -> None:
    session = Session(MODEL, threads=2, optimise=optimise)
    assert (session.inputs, session.outputs) == (("x",), ("z", "y"))
    got = session.run({"x": np.array([-1, 3], np.float32)}, ["y"])
    np.testing.assert_array_equal(got["y"], [0, 3])


@pytest.mark.parametrize(
    ("feeds", "outputs", "message"),
    [
        ({}, None, "no array for input 'x'"),
        ({"x": np.zeros(3, np.float32)}, None, "cannot run these inputs"),
        ({"x": np.zeros(2)}, None, "cannot run these inputs"),
        ({"x": np.zeros(2, np.float32)}, ["q"], "no output 'q'; the model has: z, y"),
    ],
)
def test_names_what_does_not_fit(
    feeds: dict[str, Array], outputs: list[str] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Session(MODEL).run(feeds, outputs)


def test_refuses_what_is_no_model() -> None:
    with pytest.raises(ModelError, match="ONNX Runtime refuses the model"):
        Session(b"no model")
