"""Commands and files on another machine, by the user's own ``ssh``."""

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from mpqc.errors import ArtifactError, EnvironmentLacks, UsageError

CONNECT_SECONDS = 10
COMMAND = "MPQC_SSH"  # environment variable: the ssh command with options of the user's

_SIGNALS = {
    132: "an illegal instruction: it was compiled for another processor",
    134: "an abort",
    135: "a bus error",
    137: "being killed: perhaps the board is out of memory",
    139: "a segmentation fault",
}


class Ssh:
    """A connection to a board and a folder of ours on it, which goes when the block ends.

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

    def run(self, command: str, given: bytes = b"") -> bytes:
        """Output of a shell command.

        Args:
            command: for the board's shell.
            given: its standard input.

        Raises:
            EnvironmentLacks: the board cannot be reached, or did not answer in time.
            ArtifactError: the command failed there.
        """
        # a shell that stays tells which signal ended the program; ssh alone says 255
        whole = f"{command}; exit $?"
        try:
            result = subprocess.run(
                [*self._command, "--", self.host, whole],
                input=given, capture_output=True, timeout=self.timeout, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise EnvironmentLacks(
                f"{self.host} did not finish within {self.timeout:g} s: it hangs, or needs more "
                "time (--timeout)"
            ) from error
        if result.returncode:
            raise self._error(result.returncode, result.stderr.decode("utf-8", "replace").strip())
        return result.stdout

    def _error(self, status: int, said: str) -> EnvironmentLacks | ArtifactError:
        last = said.splitlines()[-1] if said else "no message"
        if status == 255:
            return EnvironmentLacks(f"{self.host} cannot be reached over ssh: {last}")
        if status in (126, 127):
            return EnvironmentLacks(f"{self.host} cannot run the measuring program: {last}")
        if status in _SIGNALS:
            return ArtifactError(f"the model ended on {self.host} with {_SIGNALS[status]}")
        return ArtifactError(f"on {self.host}: {last}")

    def upload(self, files: Mapping[str, Path]) -> None:
        """Copy files into our folder, executable.

        Raises:
            EnvironmentLacks: the connection broke, or the board's disk is full.
        """
        for name, path in files.items():
            place = f"{self.folder}/{name}"
            content = path.read_bytes()
            try:
                size = self.run(
                    f"cat > {place}.part && chmod 755 {place}.part && mv {place}.part {place} "
                    f"&& wc -c < {place}",
                    content,
                )
            except ArtifactError as error:
                raise EnvironmentLacks(f"cannot copy {path.name}: {error}") from error
            if int(size) != len(content):
                raise EnvironmentLacks(
                    f"{self.host} holds {int(size)} of {len(content)} bytes of {path.name}: "
                    "is its disk full?"
                )

    def close(self) -> None:
        """Remove our folder and hang up; a board that is gone is no error."""
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
