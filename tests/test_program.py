from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpqc.graph import TensorType
from mpqc.program import ALIGNMENT, SLACK, MemoryPlan, Program, Step, plan_memory


def lives(program: Program) -> dict[str, tuple[int, int]]:
    """First and last step that touches each buffer."""
    found: dict[str, tuple[int, int]] = {}
    for index, step in enumerate(program.steps):
        for name in (*step.inputs, *step.outputs):
            root = program.root(name)
            found[root] = (found.get(root, (index, index))[0], index)
    return found


def check(program: Program, plan: MemoryPlan) -> None:
    """No two buffers that live at the same time share a byte, and all lie in the arena."""
    alive = lives(program)
    for name, offset in plan.offsets.items():
        assert offset % ALIGNMENT == 0
        assert offset + program.buffers[name].nbytes <= plan.size - SLACK
    for a, b in combinations(plan.offsets, 2):
        if alive[a][0] <= alive[b][1] and alive[b][0] <= alive[a][1]:
            first, second = sorted((a, b), key=plan.offsets.__getitem__)
            end = plan.offsets[first] + program.buffers[first].nbytes
            assert end <= plan.offsets[second], f"{first} overlaps {second}"
    assert plan.size - SLACK >= plan.lower_bound


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Steps that each read some earlier values and write one or two."""
    program = Program(inputs={"x": TensorType("uint8", (64,))})
    program.buffers["x"] = program.inputs["x"]
    program.constants["w"] = None  # type: ignore[assignment]
    program.buffers["w"] = TensorType("uint8", (10**6,))
    values = ["x"]
    for index in range(draw(st.integers(1, 14))):
        reads = draw(st.lists(st.sampled_from([*values, "w"]), max_size=3, unique=True))
        writes = [f"v{index}.{k}" for k in range(draw(st.integers(1, 2)))]
        for name in writes:
            program.buffers[name] = TensorType("uint8", (draw(st.integers(0, 2000)),))
        program.steps.append(Step("k", tuple(reads), tuple(writes), f"s{index}", "float"))
        values += writes
        if draw(st.booleans()):
            program.aliases[f"a{index}"] = draw(st.sampled_from(values))
            values.append(f"a{index}")
    last = program.steps[-1].outputs[0]
    program.outputs["y"] = program.buffers[last]
    program.results["y"] = last
    return program


@given(programs())
@settings(max_examples=150)
def test_buffers_that_live_together_do_not_overlap(program: Program) -> None:
    plan = plan_memory(program)
    check(program, plan)
    assert not {"x", "w", program.results["y"]} & plan.offsets.keys()
    assert plan.offsets.keys() | {"x", "w", program.results["y"]} >= lives(program).keys()


def test_a_chain_needs_two_buffers() -> None:
    program = Program()
    for index in range(9):
        program.buffers[f"v{index}"] = TensorType("uint8", (1000,))
        reads = (f"v{index - 1}",) if index else ()
        program.steps.append(Step("k", reads, (f"v{index}",), "", "float"))
    plan = plan_memory(program)
    check(program, plan)
    assert plan.size - SLACK == plan.lower_bound == 2 * 1024


def test_an_alias_keeps_its_buffer_alive() -> None:
    program = Program(aliases={"view": "a"})
    program.buffers |= {name: TensorType("float32", (100,)) for name in "abc"}
    program.steps = [
        Step("k", (), ("a",), "", "float"),
        Step("k", (), ("b",), "", "float"),
        Step("k", ("view", "b"), ("c",), "", "float"),
    ]
    plan = plan_memory(program)
    check(program, plan)
    assert len(set(plan.offsets.values())) == 3


def test_a_program_without_steps_needs_slack_alone() -> None:
    assert plan_memory(Program()) == MemoryPlan({}, SLACK, 0)


@pytest.mark.parametrize("chain", [["a"], ["b", "a"], ["c", "b", "a"]])
def test_aliases_of_aliases_have_one_root(chain: list[str]) -> None:
    program = Program(aliases={"b": "a", "c": "b"})
    assert program.root(chain[0]) == "a"
