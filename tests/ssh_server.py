"""An ssh server of our own on this machine's loopback, with keys of its own."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.c_programs import call, needs


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
    for _ in range(1200):  # a minute
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
