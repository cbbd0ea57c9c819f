"""Commands and files on another machine, by the user's own ``ssh``."""

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile

from mpqc.boards.connection import Connection, Ended
from mpqc.errors import ArtifactError, EnvironmentLacks, UsageError

CONNECT_SECONDS = 10
COMMAND = "MPQC_SSH"  # environment variable: the ssh command with options of the user's


class Ssh(Connection):
    """A connection by the user's ssh.

    Args:
        host: as ssh takes it: ``user@host``, a name of the user's configuration, ``ssh://...``.
        timeout: of a single command [s].

    Raises:
        UsageError: not a host.
        EnvironmentLacks: no ssh here, or the board cannot be reached.
    """

    def __init__(self, host: str, timeout: float = 600.0) -> None:
        if not host or host.startswith("-") or any(c.isspace() for c in host):
            raise UsageError(f"--ssh wants user@host, got {host!r}")
        self.host = host
        self.timeout = timeout
        command = shlex.split(os.environ.get(COMMAND, "")) or ["ssh"]
        if shutil.which(command[0]) is None:
            raise EnvironmentLacks(
                f"no {command[0]} on this machine: install it (Debian: apt install openssh-client)"
            )
        self._control = tempfile.mkdtemp(prefix="mpqc-ssh-")
        self._command = [
            *command,
            "-o", "BatchMode=yes",
            "-o", f"ConnectTimeout={CONNECT_SECONDS}",
            "-o", "ServerAliveInterval=5",
            "-o", "ServerAliveCountMax=3",
            "-o", "ControlMaster=auto",
            "-o", f"ControlPath={self._control}/%C",
            "-o", "ControlPersist=60",
        ]  # fmt: skip
        self.folder = ""
        try:
            made = self.run('mktemp -d "${TMPDIR:-/tmp}/mpqc-XXXXXXXX"').decode().strip()
        except BaseException:
            self._hang_up()
            raise
        self.folder = made

    def call(self, command: str, given: bytes) -> Ended:
        # a shell that stays tells which signal ended the program; ssh alone says 255
        whole = f"{command}; exit $?"
        try:
            result = subprocess.run(
                [*self._command, "--", self.host, whole],
                input=given, capture_output=True, timeout=self.timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise self.hangs() from error
        if result.returncode == 255:
            said = result.stderr.decode("utf-8", "replace").strip() or "no message"
            raise EnvironmentLacks(
                f"{self.host} cannot be reached over ssh: {said.splitlines()[-1]}"
            )
        return Ended(result.returncode, result.stdout, result.stderr)

    def close(self) -> None:
        if self.folder:
            # what stays on a board that is gone, its own cleaning of temporary files takes
            with contextlib.suppress(EnvironmentLacks, ArtifactError):
                self.run(f"rm -rf {shlex.quote(self.folder)}")
            self.folder = ""
        self._hang_up()

    def _hang_up(self) -> None:
        subprocess.run(
            [*self._command, "-O", "exit", "--", self.host], capture_output=True, check=False
        )
        shutil.rmtree(self._control, ignore_errors=True)
