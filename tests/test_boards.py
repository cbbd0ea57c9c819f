"""Boards over ssh: a server of our own on this machine's loopback stands for one."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mpqc import demo
from mpqc.artifact import Artifact
from mpqc.boards.board import Board, target_of
from mpqc.boards.ssh import COMMAND, Ssh
from mpqc.data import open_data
from mpqc.errors import ArtifactError, EnvironmentLacks, UsageError
from mpqc.graph import Precision
from mpqc.pipeline import Options, compile_model
from mpqc.profile_layers import Runner
from mpqc.runtime import CompiledModel
from mpqc.target import native
from tests.c_programs import call, needs

ROOT = Path(__file__).parents[1]


@dataclass
class Server:
    """A running ssh server.

    Attributes:
        host: how to reach it.
        command: ssh with the options that it needs.
        folder: of keys.
    """

    host: str
    command: str
    folder: Path
    process: subprocess.Popen[bytes]


def start_server(folder: Path) -> Server:
    for tool in ("ssh", "ssh-keygen"):
        needs(tool)
    sshd = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    if sshd is None:
        pytest.skip("sshd is not installed (Debian: apt install openssh-server)")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "user", "stranger"):
        call(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)])
    shutil.copy(folder / "user.pub", folder / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd.conf").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n",
        encoding="ascii",
    )
    key = (folder / "host.pub").read_text(encoding="ascii")
    (folder / "known").write_text(f"[127.0.0.1]:{port} {key}", encoding="ascii")
    process = subprocess.Popen(
        [sshd, "-D", "-e", "-f", str(folder / "sshd.conf")],
        stderr=(folder / "log").open("wb"),
    )
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    command = (
        f"ssh -F none -o UserKnownHostsFile={folder}/known -o IdentitiesOnly=yes -i {folder}/user"
    )
    host = f"ssh://{getpass.getuser()}@127.0.0.1:{port}"
    probe_ = subprocess.run(
        [*command.split(), "-o", "BatchMode=yes", host, "true"], capture_output=True, check=False
    )
    if probe_.returncode:
        process.terminate()
        log = (folder / "log").read_text(errors="replace")
        pytest.skip(f"this system does not let us in by ssh: {probe_.stderr!r} {log[-300:]}")
    return Server(host, command, folder, process)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = start_server(tmp_path_factory.mktemp("ssh"))
    yield found
    found.process.terminate()
    found.process.wait()


@pytest.fixture(autouse=True)
def _own_ssh(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "server" in request.fixturenames:
        monkeypatch.setenv(COMMAND, request.getfixturevalue("server").command)


def compile_demo(folder: Path, bits: str) -> Artifact:
    model, calibration, _ = demo.files()
    return compile_model(
        model, folder, Options(native(), max_samples=50, latencies=None),
        bits=Precision.parse(bits), data=lambda graph: open_data(str(calibration), graph),
    )  # fmt: skip


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compile_demo(tmp_path_factory.mktemp("digits") / "w4a4", "w4a4")


def mpqc(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "mpqc", *arguments],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip


# Running --------------------------------------------------------------------------------------


def test_a_board_computes_the_same(server: Server, artifact: Artifact) -> None:
    with np.load(demo.files()[2]) as arrays:
        feeds = {"input": arrays["input"][:1]}
    with Board(Ssh(server.host), native()) as board, CompiledModel(artifact.library) as here:
        remote = board.load(artifact)
        assert (remote.inputs, remote.outputs) == (here.inputs, here.outputs)
        np.testing.assert_array_equal(remote.run(feeds)["logits"], here.run(feeds)["logits"])


def test_verify_compares_every_value_on_the_board(server: Server, artifact: Artifact) -> None:
    result = mpqc("verify", str(artifact.folder), "--ssh", server.host, "--layers",
                  "--data", str(demo.files()[2]), "--max-samples", "3", "--json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["passed"]
    assert found["samples"] == 3
    assert {row["value"] for row in found["layers"]} >= artifact.manifest["taps"].keys()


def test_verify_sees_a_wrong_library_on_the_board(
    server: Server, artifact: Artifact, tmp_path: Path
) -> None:
    """Another width's library under this artifact's name."""
    other = compile_demo(tmp_path / "w2a2", "w2a2")
    shutil.copytree(artifact.folder, tmp_path / "mixed")
    shutil.copy(other.library, tmp_path / "mixed/model.so")
    result = mpqc("verify", str(tmp_path / "mixed"), "--ssh", server.host)
    assert result.returncode == 1
    assert "FAILED" in result.stdout + result.stderr


def test_bench_measures_on_the_board(server: Server, artifact: Artifact) -> None:
    result = mpqc("bench", str(artifact.folder), "--ssh", server.host, "--per-layer",
                  "--threads", "2", "--repeat", "7", "--json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    (timing,) = found["timings"]
    assert (timing["name"], timing["runs"]) == ("mpqc", 7)
    assert 0 < timing["best"] <= timing["median"] < 1
    assert len(found["layers"]) == len(artifact.manifest["steps"])
    assert all(layer["best"] > 0 for layer in found["layers"])
    assert found["machine"]["host"] == server.host
    assert found["machine"]["cores"] == os.cpu_count()


def test_opponents_stay_here(server: Server, artifact: Artifact) -> None:
    result = mpqc("bench", str(artifact.folder), "--ssh", server.host, "--against", "ort-int8")
    assert result.returncode == 2
    assert "a board measures the artifact alone" in result.stderr


def test_a_board_is_a_runner_of_profiles(server: Server, artifact: Artifact) -> None:
    with Board(Ssh(server.host), native()) as board:
        runner: Runner = board
        times = runner.measure([artifact.library, artifact.library], 3)
        assert len(times) == 2
        for found in times:
            assert len(found.steps) == len(artifact.manifest["steps"])
            assert all(0 < best <= median for best, median in (*found.steps, found.whole))
            assert sum(best for best, _ in found.steps) < 3 * found.whole[0] + 1e-3
        assert runner.machine()


def test_clients_do_not_disturb_each_other(server: Server, artifact: Artifact) -> None:
    """Two at once: own folders, measurements one after the other, both answered."""
    found: list[float] = []

    def client() -> None:
        with Board(Ssh(server.host), native()) as board:
            for _ in range(3):
                found.extend(times.whole[0] for times in board.measure([artifact.library], 5))

    threads = [threading.Thread(target=client) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6


def test_nothing_stays_on_the_board(server: Server, artifact: Artifact) -> None:
    with Board(Ssh(server.host), native()) as board:
        folder = Path(board.connection.folder)
        board.send(artifact.library)
        assert sorted(path.name for path in folder.iterdir()) == ["measure", "model0.so"]
    assert not folder.exists()


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


def test_an_unreachable_board_is_named(server: Server, artifact: Artifact) -> None:
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


def test_a_board_that_hangs(server: Server) -> None:
    with Ssh(server.host, timeout=5) as ssh:
        ssh.timeout = 0.5
        with pytest.raises(EnvironmentLacks, match=r"did not finish within 0\.5 s"):
            ssh.run("sleep 20")
        ssh.timeout = 5


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
    server: Server, command: str, error: type[Exception], message: str
) -> None:
    with Ssh(server.host) as ssh, pytest.raises(error, match=message):
        ssh.run(command)


def test_a_full_disk_is_named(server: Server, artifact: Artifact) -> None:
    with Ssh(server.host) as ssh:
        (Path(ssh.folder) / "model.so.part").symlink_to("/dev/full")
        with pytest.raises(EnvironmentLacks, match=r"cannot copy model\.so: .*No space left"):
            ssh.upload({"model.so": artifact.library})


def test_the_measuring_program_explains_itself(server: Server, artifact: Artifact) -> None:
    with Board(Ssh(server.host), native()) as board:
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
