"""Boards: a server of our own on this machine's loopback stands for one.

What both ways to a board must do is tested over ssh and over TVM's RPC; what only ssh knows is
tested below, what only RPC knows in test_rpc.py.
"""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mpqc import demo
from mpqc.artifact import Artifact
from mpqc.boards.board import Board, target_of
from mpqc.boards.connection import Connection
from mpqc.boards.rpc import Rpc
from mpqc.boards.ssh import COMMAND, Ssh
from mpqc.data import open_data
from mpqc.errors import ArtifactError, EnvironmentLacks, UsageError
from mpqc.graph import Precision
from mpqc.latency import LatencyTable, cached_table
from mpqc.pipeline import Options, compile_model
from mpqc.profile_layers import Runner
from mpqc.runtime import CompiledModel
from mpqc.target import native
from tests.mpqc_program import mpqc
from tests.ssh_server import Server, start_server
from tests.tvm_rpc import Farm, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = start_server(tmp_path_factory.mktemp("ssh"))
    yield found
    found.process.terminate()
    found.process.wait()


@pytest.fixture
def _own_ssh(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with a server reaches it by the keys of its own."""
    monkeypatch.setenv(COMMAND, server.command)


@dataclass
class Way:
    """To a board.

    Attributes:
        options: of the command line.
        host: the board's name in results and messages.
        connect: with a time-out.
    """

    options: tuple[str, ...]
    host: str
    connect: Callable[[float], Connection]

    def board(self, timeout: float = 60.0) -> Board:
        return Board(self.connect(timeout), native())


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with Farm(tmp_path_factory.mktemp("rpc")) as found:
        found.add("here")
        yield found


@pytest.fixture(params=["ssh", "rpc"])
def way(request: pytest.FixtureRequest) -> Way:
    if request.param == "ssh":
        request.getfixturevalue("_own_ssh")
        host = request.getfixturevalue("server").host
        return Way(("--ssh", host), host, lambda timeout: Ssh(host, timeout))
    tracker = request.getfixturevalue("farm").address
    return Way(
        ("--tracker", tracker, "--key", "here"), f"here (tracker {tracker})",
        lambda timeout: Rpc(tracker, "here", native(), timeout),
    )  # fmt: skip


def compile_demo(folder: Path, bits: str) -> Artifact:
    model, calibration, _ = demo.files()
    return compile_model(
        model, folder, Options(native(), max_samples=50, latencies=None),
        bits=Precision.parse(bits), data=lambda graph: open_data(str(calibration), graph),
    )  # fmt: skip


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compile_demo(tmp_path_factory.mktemp("digits") / "w4a4", "w4a4")


# Running --------------------------------------------------------------------------------------


def test_a_board_computes_the_same(way: Way, artifact: Artifact) -> None:
    with np.load(demo.files()[2]) as arrays:
        feeds = {"input": arrays["input"][:1]}
    with way.board() as board, CompiledModel(artifact.library) as here:
        remote = board.load(artifact)
        assert (remote.inputs, remote.outputs) == (here.inputs, here.outputs)
        np.testing.assert_array_equal(remote.run(feeds)["logits"], here.run(feeds)["logits"])


def test_verify_compares_every_value_on_the_board(way: Way, artifact: Artifact) -> None:
    result = mpqc("verify", str(artifact.folder), *way.options, "--layers",
                  "--data", str(demo.files()[2]), "--max-samples", "3", "--json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["passed"]
    assert found["samples"] == 3
    assert {row["value"] for row in found["layers"]} >= artifact.manifest["taps"].keys()


def test_verify_sees_a_wrong_library_on_the_board(
    way: Way, artifact: Artifact, tmp_path: Path
) -> None:
    """Another width's library under this artifact's name."""
    other = compile_demo(tmp_path / "w2a2", "w2a2")
    shutil.copytree(artifact.folder, tmp_path / "mixed")
    shutil.copy(other.library, tmp_path / "mixed/model.so")
    result = mpqc("verify", str(tmp_path / "mixed"), *way.options)
    assert result.returncode == 1
    assert "FAILED" in result.stdout + result.stderr


def test_bench_measures_on_the_board(way: Way, artifact: Artifact) -> None:
    result = mpqc("bench", str(artifact.folder), *way.options, "--per-layer",
                  "--threads", "2", "--repeat", "7", "--json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    (timing,) = found["timings"]
    assert (timing["name"], timing["runs"]) == ("mpqc", 7)
    assert 0 < timing["best"] <= timing["median"] < 1
    assert len(found["layers"]) == len(artifact.manifest["steps"])
    assert all(layer["best"] > 0 for layer in found["layers"])
    assert found["machine"]["host"] == way.host
    assert found["machine"]["cores"] == os.cpu_count()


def test_opponents_stay_here(way: Way, artifact: Artifact) -> None:
    result = mpqc("bench", str(artifact.folder), *way.options, "--against", "ort-int8")
    assert result.returncode == 2
    assert "a board measures the artifact alone" in result.stderr


def test_a_board_is_a_runner_of_profiles(way: Way, artifact: Artifact) -> None:
    with way.board() as board:
        runner: Runner = board
        times = runner.measure([artifact.library, artifact.library], 3)
        assert len(times) == 2
        for found in times:
            assert len(found.steps) == len(artifact.manifest["steps"])
            assert all(0 < best <= median for best, median in (*found.steps, found.whole))
            assert sum(best for best, _ in found.steps) < 3 * found.whole[0] + 1e-3
        assert runner.machine()


def test_profile_measures_on_the_board(way: Way, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    result = mpqc("profile", str(demo.files().model), *way.options, "--widths", "2",
                  "--repeat", "1", "--no-check", "--cache", str(tmp_path),
                  "-o", str(table), "--json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert {row.kernel for row in LatencyTable.load(table).entries} >= {"bitplane", "int8"}
    assert cached_table(native(), 1, tmp_path) is not None


def test_tune_measures_on_the_board(way: Way, tmp_path: Path) -> None:
    words = ("tune", str(demo.files().model), *way.options, "--bits", "w2a2", "--repeat", "1")
    result = mpqc(*words, "--trials", "1", "--db", str(tmp_path / "tuned.csv"), "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["trials"], found["complete"]) == (1, False)
    assert found["before"] > 0
    assert (tmp_path / "tuned.csv").exists()


def test_clients_do_not_disturb_each_other(way: Way, artifact: Artifact) -> None:
    """Two at once: own folders, measurements one after the other, both answered."""
    found: list[float] = []

    def client() -> None:
        with way.board() as board:
            for _ in range(3):
                found.extend(times.whole[0] for times in board.measure([artifact.library], 5))

    threads = [threading.Thread(target=client) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6


def test_nothing_stays_on_the_board(way: Way, artifact: Artifact) -> None:
    with way.board() as board:
        folder = Path(board.connection.folder)
        board.send(artifact.library)
        assert {path.name for path in folder.iterdir()} >= {"measure", "model0.so"}
    wait_until(lambda: not folder.exists(), "removal of our folder", 5)


def test_libraries_that_were_measured_do_not_pile_up(way: Way, artifact: Artifact) -> None:
    with way.board() as board:
        board.measure([artifact.library, artifact.library], 1)
        assert not list(Path(board.connection.folder).glob("model*"))


def test_a_board_runs_programs_as_it_is_told(way: Way, artifact: Artifact) -> None:
    """--via: here it counts the runs."""
    connection = way.connect(60)
    counter = Path(connection.folder) / "count"
    counter.write_text('#!/bin/sh\necho run >> "$0.log"\nexec "$@"\n', "ascii")
    counter.chmod(0o755)
    with Board(connection, native(), via=str(counter)) as board:
        board.measure([artifact.library], 1)
        assert counter.with_suffix(".log").read_text() == "run\n"
    connection.close()  # once more does no harm


def test_an_artifact_knows_its_machine(artifact: Artifact) -> None:
    target = target_of(artifact)
    assert (target.arch, target.features) == (native().arch, native().features)


# What goes wrong -----------------------------------------------------------------------------


def test_a_wrong_key_is_named(
    server: Server, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = server.command.replace("/user", "/stranger")
    monkeypatch.setenv(COMMAND, stranger)
    result = mpqc("bench", str(artifact.folder), "--ssh", server.host)
    assert result.returncode == 3
    assert "cannot be reached over ssh" in result.stderr
    assert "Permission denied" in result.stderr


@pytest.mark.usefixtures("_own_ssh")
def test_an_unreachable_board_is_named(artifact: Artifact) -> None:
    result = mpqc("verify", str(artifact.folder), "--ssh", "ssh://nobody@127.0.0.1:9")
    assert result.returncode == 3
    assert "127.0.0.1:9 cannot be reached over ssh" in result.stderr
    assert "refused" in result.stderr


def test_a_changed_host_key_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port = server.host.rpartition(":")[2]
    key = (server.folder / "stranger.pub").read_text(encoding="ascii")
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {key}", encoding="ascii")
    command = server.command.replace(f"{server.folder}/known", f"{tmp_path}/known")
    monkeypatch.setenv(COMMAND, command)
    with pytest.raises(EnvironmentLacks, match="Host key verification failed"):
        Ssh(server.host)


def test_a_board_that_goes_away_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = start_server(tmp_path)
    monkeypatch.setenv(COMMAND, own.command)
    with Ssh(own.host) as ssh:
        session = ssh.run("echo $PPID").decode().strip()  # the server's process for us
        killer = threading.Timer(0.5, lambda: subprocess.run(["kill", "-9", session], check=False))
        killer.start()
        own.process.kill()
        with pytest.raises(EnvironmentLacks, match="cannot be reached over ssh"):
            ssh.run("sleep 20")
    own.process.wait()


def test_a_board_that_hangs(way: Way) -> None:
    with way.connect(5) as board:
        board.timeout = 0.5
        with pytest.raises(EnvironmentLacks, match=r"did not finish within 0\.5 s"):
            board.run("sleep 20")
        board.timeout = 5


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        ("sh -c 'kill -ILL $$'", ArtifactError, "illegal instruction: it was compiled for another"),
        ("sh -c 'kill -SEGV $$'", ArtifactError, "segmentation fault"),
        ("sh -c 'kill -KILL $$'", ArtifactError, "out of memory"),
        ("/nowhere/measure", EnvironmentLacks, "cannot run the measuring program"),
        ("sh -c 'echo measure: create: out of memory >&2; exit 4'", ArtifactError,
         "measure: create: out of memory"),
    ],
)  # fmt: skip
def test_ends_of_programs_are_explained(
    way: Way, command: str, error: type[Exception], message: str
) -> None:
    with way.connect(60) as board, pytest.raises(error, match=message):
        board.run(command)


def test_a_full_disk_is_named(way: Way, artifact: Artifact) -> None:
    with way.connect(60) as board:
        (Path(board.folder) / "model.so.part").symlink_to("/dev/full")
        with pytest.raises(EnvironmentLacks, match=r"cannot copy model\.so: .*No space left"):
            board.upload({"model.so": artifact.library})


def test_the_measuring_program_explains_itself(way: Way, artifact: Artifact) -> None:
    with way.board() as board:
        place = board.send(artifact.library)
        for arguments, message in (
            ("", "usage: measure run"),
            (f"run {place} 1 1", "reads: too short"),
            (f"run {place} 65 1", "invalid argument"),
            ("run /etc/hostname 1 1", "cannot load the model"),
            ("time 1 3 0 /lib/no.so", "cannot load the model"),
        ):
            with pytest.raises(ArtifactError, match=message):
                board.run(arguments)


@pytest.mark.parametrize("host", ["", "-oProxyCommand=true", "user@host name"])
def test_hosts_cannot_be_options(host: str) -> None:
    with pytest.raises(UsageError, match="--ssh wants user@host"):
        Ssh(host)


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMAND, "no-such-ssh -v")
    with pytest.raises(EnvironmentLacks, match="no no-such-ssh on this machine"):
        Ssh("user@host")
