"""Boards of TVM's RPC tracker: what only this way knows. Tracker and servers run on loopback.

What it has in common with ssh is tested in test_boards.py.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import tvm_ffi

from mpqc import demo
from mpqc.artifact import Artifact
from mpqc.boards import rpc
from mpqc.boards.board import Board
from mpqc.boards.rpc import Rpc
from mpqc.data import open_data
from mpqc.errors import EnvironmentLacks, UsageError
from mpqc.graph import Precision
from mpqc.latency import LatencyTable, cached_path, cached_table, table_path
from mpqc.pipeline import Options, compile_model
from mpqc.profile_layers import profile
from mpqc.target import TARGETS, native
from tests.arm_emulator import command, cross_compiler
from tests.c_programs import call, needs
from tests.mpqc_program import ROOT, mpqc
from tests.tvm_rpc import Farm, wait_until

MODEL = demo.files().model


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with Farm(tmp_path_factory.mktemp("rpc")) as found:
        found.add("here")
        yield found


@pytest.fixture
def mortal(farm: Farm) -> Iterator[str]:
    """Key of a board that a test may kill."""
    farm.add("mortal")
    yield "mortal"
    if "mortal" in farm.processes:
        farm.kill("mortal")
    wait_until(lambda: not farm.knows("mortal"), "end of the board")


def connect(farm: Farm, key: str = "here", timeout: float = 60.0) -> Rpc:
    return Rpc(farm.address, key, native(), timeout)


def stays_usable(farm: Farm) -> None:
    with connect(farm) as board:
        assert board.run("echo here") == b"here\n"


# Profiles ------------------------------------------------------------------------------------


def test_profile_writes_the_same_table(farm: Farm, tmp_path: Path) -> None:
    """The verb, with its check of whole networks, against a profile of this process."""
    table = tmp_path / "table.csv"
    result = mpqc(
        "profile", str(MODEL), "--widths", "4", "--repeat", "3", "--cache", str(tmp_path),
        "--tracker", farm.address, "--key", "here", "-o", str(table), "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["network"]["checks"].keys() == {"w2a2", "w4a4", "w8a8"}
    assert all(abs(check["error"]) < 10 for check in found["network"]["checks"].values())
    here = profile(MODEL, native(), widths=[4], repeat=1, use_cache=False, checks=[])
    remote = LatencyTable.load(table)
    assert {e.key for e in remote.entries if e.geometry} == {e.key for e in here.table.entries}
    assert remote.conditions == here.table.conditions  # the board has this machine's processor
    assert cached_table(native(), 1, tmp_path) is not None


def test_a_board_that_dies_in_a_profile_loses_nothing(
    farm: Farm, mortal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpqc.profile_layers.KINDS", ("int8",))
    seen: list[str] = []

    def kill_at_third(label: str, _done: int, _total: int) -> None:
        seen.append(label)
        if len(seen) == 3:
            farm.kill(mortal)

    def attempt(progress: Callable[[str, int, int], None]) -> tuple[int, int]:
        with Board(connect(farm, mortal), native()) as board:
            made = profile(
                MODEL, native(), widths=[2, 4], repeat=1, cache=tmp_path, checks=[], runner=board,
                progress=progress,
            )  # fmt: skip
        return made.measured, made.cached

    with pytest.raises(EnvironmentLacks, match=r"mortal .* is gone.*what was measured is kept"):
        attempt(kill_at_third)
    path = cached_path(native(), 1, tmp_path)
    assert path is not None
    kept = LatencyTable.load(path)
    assert {(e.weight_bits, e.activation_bits) for e in kept.entries} == {(2, 2), (2, 4)}
    farm.add(mortal)
    assert attempt(lambda *_: None) == (len(kept.entries), len(kept.entries))


def test_the_table_of_a_board_serves_its_target(farm: Farm, tmp_path: Path) -> None:
    """What profile leaves for a board, compile and search find by the target's name alone."""
    found = LatencyTable.load(_table_of("x86-64-v3", farm, tmp_path))
    other = TARGETS["rpi4"]
    assert cached_path(other, 1, tmp_path) is None
    for index, cpu in enumerate(["Raspberry Pi 4", "Rock 4"]):
        path = table_path(other, 1, tmp_path, cpu)
        found.save(path)
        os.utime(path, (index, index))
    assert cached_path(other, 1, tmp_path) == table_path(other, 1, tmp_path, "Rock 4")


def _table_of(target: str, farm: Farm, cache: Path) -> Path:
    with Board(connect(farm), TARGETS[target]) as board:
        made = profile(
            MODEL, TARGETS[target], widths=[4], repeat=1, cache=cache, checks=[], runner=board
        )
    assert made.path is not None
    return made.path


def test_verify_and_bench_by_their_verbs(farm: Farm, tmp_path: Path) -> None:
    artifact = compile_model(
        MODEL, tmp_path / "w4a4", Options(native(), latencies=None), bits=Precision(4, 4),
        data=lambda graph: open_data(str(demo.files().calibration), graph),
    )  # fmt: skip
    where = ["--tracker", farm.address, "--key", "here"]
    verified = mpqc("verify", str(artifact.folder), *where, "--max-samples", "2", "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["passed"]
    timed = mpqc("bench", str(artifact.folder), *where, "--repeat", "3", "--json")
    assert timed.returncode == 0, timed.stderr
    assert json.loads(timed.stdout)["machine"]["host"] == f"here (tracker {farm.address})"


# An emulated board ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rpi4(farm: Farm, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Key of a Cortex-A72 of qemu's that runs TVM's own runtime for aarch64, from its wheels."""
    target, work = TARGETS["rpi4"], tmp_path_factory.mktemp("rpi4")
    compiler = cross_compiler(target)
    libraries = work / "tvm/lib", work / "tvm_ffi/lib"
    versions = [f"{name}=={version(name)}" for name in ("apache-tvm", "apache-tvm-ffi")]
    fetched = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
         "--platform=manylinux_2_28_aarch64", "--python-version=3.11", "--dest", str(work),
         *versions],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if fetched.returncode:
        pytest.skip(f"TVM's wheels for aarch64 cannot be had: {fetched.stderr[-300:]}")
    for wheel in work.glob("*.whl"):
        with zipfile.ZipFile(wheel) as opened:
            wanted = ("libtvm_runtime.so", "libtvm_ffi.so")
            opened.extractall(work, [n for n in opened.namelist() if n.endswith(wanted)])
        wheel.unlink()
    program = work / "session"
    headers = (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())
    call(
        [*compiler, "-O1", "-Wall", "-Wextra", "-Werror", str(ROOT / "tests/rpc_session.c"),
         *(f"-I{folder}" for folder in headers), *(f"-L{folder}" for folder in libraries),
         "-Wl,--no-as-needed", "-l:libtvm_runtime.so", "-l:libtvm_ffi.so",
         "-Wl,--allow-shlib-undefined", "-o", str(program)]
    )  # fmt: skip
    paths = ":".join(map(str, libraries))
    farm.add_emulated("rpi4", [*command(target), "-E", f"LD_LIBRARY_PATH={paths}", str(program)])
    return "rpi4"


@pytest.mark.slow
def test_an_emulated_board(farm: Farm, rpi4: str, tmp_path: Path) -> None:
    """Everything that runs there is aarch64's: the server's session, its helper, the model."""
    target = TARGETS["rpi4"]
    artifact = compile_model(
        MODEL, tmp_path / "w2a2", Options(target, latencies=None), bits=Precision(2, 2),
        data=lambda graph: open_data(str(demo.files().calibration), graph),
    )  # fmt: skip
    where = ["--tracker", farm.address, "--key", rpi4, "--via", " ".join(command(target))]
    verified = mpqc(
        "verify", str(artifact.folder), *where, "--layers", "--max-samples", "2", "--json"
    )
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["passed"]
    timed = mpqc("bench", str(artifact.folder), *where, "--repeat", "3", "--json")
    assert timed.returncode == 0, timed.stderr
    table = tmp_path / "table.csv"
    profiled = mpqc(
        "profile", str(MODEL), "--target", "rpi4", "--widths", "2", "--repeat", "1", "--no-check",
        *where, "--cache", str(tmp_path), "-o", str(table), "--json",
    )  # fmt: skip
    assert profiled.returncode == 0, profiled.stderr
    assert {row.kernel for row in LatencyTable.load(table).entries} >= {"bitplane", "int8"}


# What goes wrong -----------------------------------------------------------------------------


def test_no_tracker(tmp_path: Path) -> None:
    result = mpqc("profile", str(MODEL), "--tracker", "127.0.0.1:9", "--key", "rpi4",
                  "--cache", str(tmp_path))  # fmt: skip
    assert result.returncode == 3
    assert "the tracker at 127.0.0.1:9 cannot be reached" in result.stderr
    assert "tvm.exec.rpc_tracker" in result.stderr


def test_an_unknown_key_names_the_known_ones(farm: Farm) -> None:
    with pytest.raises(EnvironmentLacks, match=r"knows no board 'rpi9', only: here.* --key rpi9"):
        connect(farm, "rpi9")


def test_something_else_than_a_tracker() -> None:
    with socket.socket() as web:
        web.bind(("127.0.0.1", 0))
        web.listen(1)

        def answer() -> None:
            client, _ = web.accept()
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            client.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(EnvironmentLacks, match=r"is no tracker of TVM's RPC"):
            Rpc(f"127.0.0.1:{web.getsockname()[1]}", "rpi4", native())


def test_a_tracker_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "CONNECT_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        with pytest.raises(EnvironmentLacks, match=r"is no tracker of TVM's RPC: timed out"):
            Rpc(f"127.0.0.1:{silent.getsockname()[1]}", "rpi4", native())


@pytest.mark.parametrize("address", ["", "localhost", "localhost:", ":9190", "h:0", "h:70000"])
def test_addresses_are_checked(address: str) -> None:
    with pytest.raises(UsageError, match="--tracker wants HOST:PORT"):
        Rpc(address, "rpi4", native())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tracker", "h:1"], "--tracker and --key go together"),
        (["--key", "rpi4"], "--tracker and --key go together"),
        (["--ssh", "pi", "--tracker", "h:1", "--key", "k"], "exclude each other"),
        (["--via", "taskset -c 3"], "--via is for boards"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str) -> None:
    result = mpqc("profile", str(MODEL), *options)
    assert result.returncode == 2
    assert message in result.stderr


def test_a_board_in_use_is_waited_for(farm: Farm) -> None:
    told: list[str] = []
    with connect(farm) as first:
        with pytest.raises(EnvironmentLacks, match=r"here was not free within 0\.5 s: others use"):
            Rpc(farm.address, "here", native(), 0.5, told.append)
        assert told == ["here is busy: waiting for it, 0.5 s at most (--timeout)"]

        def make_free(line: str) -> None:
            told.append(line)
            threading.Thread(target=first.close).start()

        with Rpc(farm.address, "here", native(), 60, make_free) as second:
            assert second.run("echo mine") == b"mine\n"
    assert len(told) == 2


def test_a_board_that_dies_in_a_run(farm: Farm, mortal: str) -> None:
    board = connect(farm, mortal)
    threading.Timer(0.3, lambda: farm.kill(mortal)).start()
    start = time.monotonic()
    with pytest.raises(EnvironmentLacks, match=r"mortal .* is gone: the connection to its RPC"):
        board.run("sleep 30")
    with pytest.raises(EnvironmentLacks, match="is gone"):  # and stays so
        board.run("true")
    board.close()
    assert time.monotonic() - start < 25  # did not wait for the sleep


def test_a_board_that_falls_silent(
    farm: Farm, mortal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc.Rpc._ask, "__defaults__", (1.5,))
    board = connect(farm, mortal)
    threading.Timer(0.3, lambda: farm.signal(mortal, signal.SIGSTOP)).start()
    with pytest.raises(EnvironmentLacks, match=r"gave no sign of life for 1\.5 s"):
        board.run("sleep 30")
    board.close()


def test_an_interrupted_client_leaves_the_board_in_order(farm: Farm) -> None:
    with connect(farm) as board:
        marker = Path(board.folder) / "started"

        def interrupt() -> None:
            wait_until(marker.exists, "start of the command")
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            board.run(f"touch {marker}; sleep 30; touch {marker}.end")
        assert marker.exists()
    start = time.monotonic()
    stays_usable(farm)
    assert time.monotonic() - start < 25  # did not wait for the sleep


def test_a_board_of_another_processor_is_named(farm: Farm) -> None:
    needs("aarch64-linux-gnu-gcc")
    with pytest.raises(EnvironmentLacks, match="cannot load a library for rpi4: is this its"):
        Rpc(farm.address, "here", TARGETS["rpi4"])
    stays_usable(farm)


def test_one_command_at_a_time(farm: Farm) -> None:
    """The helper on the board answers what it cannot do by an error number."""
    with connect(farm) as board:
        assert board._function("start", "sleep 30") == 0
        with pytest.raises(EnvironmentLacks, match="cannot start a command: error 16"):
            board.run("true")
        assert board._function("stop") == 0
        assert board._function("wait", 10) == 127  # nothing to wait for
        assert board.run("echo on") == b"on\n"


def test_artifacts_of_other_machines_are_refused(farm: Farm, tmp_path: Path) -> None:
    needs("aarch64-linux-gnu-gcc")
    artifact: Artifact = compile_model(
        MODEL, tmp_path / "rpi4", Options(TARGETS["rpi4"], latencies=None)
    )
    result = mpqc("bench", str(artifact.folder), "--tracker", farm.address, "--key", "here")
    assert result.returncode == 3
    assert "is this its processor?" in result.stderr
