import json
from pathlib import Path

import pytest

from mpqc.errors import OutputError, PlanError
from mpqc.graph import Graph, Precision
from mpqc.plan import LayerPlan, Plan, SearchRecord, TensorPlan

SHA = "ab" * 32
NET = Graph.parse(
    """
    %x = Input() : f32[1,4]
    %w = Constant() : f32[4,4]
    %u = Input() : f32[4,4]
    %a = MatMul(%x, %w) : f32[1,4]
    %r = Relu(%a) : f32[1,4]
    %b = MatMul(%r, %w) : f32[1,4]
    %c = MatMul(%r, %w) : f32[1,4]
    %s = Add(%b, %c) : f32[1,4]
    %y = MatMul(%s, %w) : f32[1,4]
    %z = MatMul(%y, %u) : f32[1,4]
    return %z
    """
)


def minimal(**changes: object) -> str:
    layer = {"weight_bits": 2, "activation_bits": 4, "kernel": "auto"}
    return json.dumps({"mpqc_plan": 1, "model_sha256": SHA, "layers": {"a": layer}} | changes)


def test_reads_what_it_wrote(tmp_path: Path) -> None:
    plan = Plan(
        model_sha256=SHA,
        layers={
            "a": LayerPlan(weight_bits=2, activation_bits=4),
            "b": LayerPlan(weight_bits=(1, 2, 3, 4), activation_bits=8, kernel="bitplane"),
        },
        tensors={"s": TensorPlan(bits=8)},
        search=SearchRecord(method="eagl", budget={"bitops": 3.5e10}, seed=7, version="0.1"),
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_the_documented_example_is_a_plan() -> None:
    plan = Plan.parse(
        minimal(
            search={
                "method": "eagl",
                "budget": {"bitops": 3.47e10},
                "cost": {"size": 6100000, "bitops": 3.4e10},
                "seed": 0,
                "version": "0.1.0",
            }
        )
    )
    assert plan.layers["a"] == LayerPlan(weight_bits=2, activation_bits=4)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (minimal(colour="red"), "colour"),
        (minimal(layers={"a": {"weight_bits": 2, "activation_bits": 4, "bits": 3}}), "bits"),
        (minimal(layers={"a": {"weight_bits": 9, "activation_bits": 4}}), "weight_bits"),
        (minimal(layers={"a": {"weight_bits": 0, "activation_bits": 4}}), "weight_bits"),
        (minimal(layers={"a": {"weight_bits": "2", "activation_bits": 4}}), "weight_bits"),
        (minimal(layers={"a": {"weight_bits": True, "activation_bits": 4}}), "weight_bits"),
        (minimal(layers={"a": {"weight_bits": 2}}), "activation_bits"),
        (
            minimal(layers={"a": {"weight_bits": 2, "activation_bits": 2, "kernel": "fast"}}),
            "kernel",
        ),
        (minimal(mpqc_plan=2), "mpqc_plan"),
        (minimal(model_sha256="abc"), "model_sha256"),
        ('{"mpqc_plan": 1', "JSON"),
        ('{"mpqc_plan": 1, "mpqc_plan": 1, "model_sha256": "' + SHA + '", "layers": {}}', "twice"),
    ],
)
def test_refuses_what_is_no_plan(text: str, complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        Plan.parse(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.json"):
        Plan.load(tmp_path / "nowhere.json")
    with pytest.raises(OutputError, match="cannot write"):
        Plan.parse(minimal()).save(tmp_path / "no" / "plan.json")


def test_uniform_keeps_the_ends_at_eight_bits() -> None:
    plan = Plan.uniform(NET, Precision(2, 3))
    widths = {name: (p.weight_bits, p.activation_bits) for name, p in plan.layers.items()}
    assert widths == {"a": (8, 8), "b": (2, 3), "c": (2, 3), "y": (8, 8)}


def test_uniform_may_treat_the_ends_as_the_body() -> None:
    plan = Plan.uniform(NET, Precision(2, 3), None)
    assert {p.weight_bits for p in plan.layers.values()} == {2}


def test_tied_layers_take_the_widest_activation() -> None:
    plan = Plan.of(NET, {"b": Precision(2, 2), "c": Precision(4, 6)})
    assert plan.layers["b"] == LayerPlan(weight_bits=2, activation_bits=6)
    plan.check(NET, None)


def test_a_plan_binds_to_its_model() -> None:
    plan = Plan.parse(minimal())
    plan.check(NET, SHA)
    plan.check(NET, "cd" * 32, force=True)
    with pytest.raises(PlanError, match="--force"):
        plan.check(NET, "cd" * 32)


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ({"q": LayerPlan(weight_bits=2, activation_bits=2)}, "'q' is not a layer"),
        (
            {"z": LayerPlan(weight_bits=2, activation_bits=2)},
            "'z' cannot be quantized: the weights",
        ),
        ({"a": LayerPlan(weight_bits=(2, 2), activation_bits=2)}, "2 weight widths for 4"),
        (
            {
                "b": LayerPlan(weight_bits=2, activation_bits=2),
                "c": LayerPlan(weight_bits=2, activation_bits=3),
            },
            "share the input 'r'",
        ),
    ],
)
def test_a_misfit_is_named_even_under_force(layers: dict[str, LayerPlan], complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        Plan(model_sha256=SHA, layers=layers).check(NET, SHA, force=True)


def test_unknown_tensors_are_named() -> None:
    plan = Plan(model_sha256=SHA, layers={}, tensors={"t": TensorPlan(bits=8)})
    with pytest.raises(PlanError, match="'t'"):
        plan.check(NET, SHA)


def test_the_schema_forbids_unknown_keys() -> None:
    schema = Plan.json_schema()
    assert schema["additionalProperties"] is False
    assert {"mpqc_plan", "model_sha256", "layers", "tensors", "search"} == set(schema["properties"])


def test_channels_of_their_own_widths() -> None:
    """One width a channel, 0 for a pruned one; people read the range and the counts."""
    mixed = LayerPlan(weight_bits=(0, 2, 4, 2), activation_bits=3)
    assert mixed.text == "w0-4a3"
    assert mixed.counts == {0: 1, 2: 2, 4: 1}
    assert mixed.widest == 4
    plain = LayerPlan(weight_bits=2, activation_bits=4)
    assert (plain.text, plain.counts) == ("w2a4", {})

    def parsed(bits: list[int]) -> Plan:
        return Plan.parse(minimal(layers={"a": {"weight_bits": bits, "activation_bits": 2}}))

    assert Plan.parse(parsed([0, 1]).text()) == parsed([0, 1])
    with pytest.raises(PlanError, match="cannot lose all its channels"):
        parsed([0, 0])
    with pytest.raises(PlanError, match="weight_bits"):
        parsed([9])
