import time
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.clock import Clock
from benchmarks.turns import take_turns
from mpqc.errors import UsageError
from tests.c_programs import needs


def test_tables_are_aligned() -> None:
    text = report.table(["", "ms"], [["a", "1.5"], ["longer", "10.25"]])
    assert text.splitlines() == [
        "|        |    ms |",
        "|--------|------:|",
        "| a      |   1.5 |",
        "| longer | 10.25 |",
    ]


def test_a_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- x -->\nold\n<!-- end x -->\nb\n<!-- y -->\n<!-- end y -->\n")
    report.replace_section(document, "x", r"new \1")
    report.replace_section(document, "y", "more")
    assert document.read_text() == (
        "a\n<!-- x -->\nnew \\1\n<!-- end x -->\nb\n<!-- y -->\nmore\n<!-- end y -->\n"
    )
    with pytest.raises(UsageError, match="lacks the lines <!-- z -->"):
        report.replace_section(document, "z", "")


def test_bars_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "folder" / "bars.png"
    report.bars(path, ["a", "b"], {"x": [1, 2], "y": [3, 4]}, "times", {"x": [1.5, float("nan")]})
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_contestants_take_turns_and_their_first_runs_do_not_count() -> None:
    needs("cc")
    order = []

    def run(name: str, times: list[float], repeat: int) -> list[float]:
        order.append(name)
        assert repeat == 4
        return [9.0, *times]

    clock = Clock()
    found = take_turns(
        {"a": lambda n: run("a", [3, 1, 2], n), "b": lambda n: run("b", [5, 5, 8], n)}, 2, clock
    )
    assert order == ["a", "b", "a", "b"]
    assert (found["a"].best, found["a"].median, found["a"].runs) == (1, 2, 6)
    assert (found["b"].best, found["b"].median) == (5, 5)
    assert len(clock.seen) == 6


def test_cpu_time_is_what_the_thread_computes() -> None:
    needs("cc")
    runs: dict[str, int] = {"sleeps": 0, "computes": 0}

    def sleeps(repeat: int) -> list[float]:
        runs["sleeps"] += repeat
        time.sleep(0.02)
        return [0.02] * repeat

    def computes(repeat: int) -> list[float]:
        runs["computes"] += repeat
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass
        return [0.0] * repeat

    found = take_turns({"sleeps": sleeps, "computes": computes}, 1, Clock(), 2, timer="cpu")
    assert runs == {"sleeps": 3, "computes": 3}
    assert found["sleeps"].best < 0.015
    assert found["computes"].best >= 0.02


def test_the_clock_is_one_of_a_processor() -> None:
    needs("cc")
    assert 3e8 < Clock().hertz < 8e9
