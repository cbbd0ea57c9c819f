"""What every way to a board has in common: commands, and files in a folder of ours."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from mpqc.errors import ArtifactError, EnvironmentLacks

_SIGNALS = {
    132: "an illegal instruction: it was compiled for another processor",
    134: "an abort",
    135: "a bus error",
    137: "being killed: perhaps the board is out of memory",
    139: "a segmentation fault",
}


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    Attributes:
        status: as a shell gives it: 128 and the signal's number where a signal ended it.
        output: what it wrote.
        errors: what it complained of.
    """

    status: int
    output: bytes
    errors: bytes


class Connection(ABC):
    """A way to a board; use it as a context.

    Attributes:
        host: the board's name in messages.
        timeout: of a single command [s].
        folder: of ours on the board; it goes when the context ends.
    """

    host: str
    timeout: float
    folder: str

    @abstractmethod
    def call(self, command: str, given: bytes) -> Ended:
        """Run a command of the board's shell with some standard input.

        Raises:
            EnvironmentLacks: the board is gone, or did not answer in time.
        """

    @abstractmethod
    def close(self) -> None:
        """Remove our folder and hang up; a board that is gone is no error."""

    def run(self, command: str, given: bytes = b"") -> bytes:
        """Output of a shell command.

        Args:
            command: for the board's shell.
            given: its standard input.

        Raises:
            EnvironmentLacks: the board is gone, did not answer in time, or lacks the command.
            ArtifactError: the command failed there.
        """
        ended = self.call(command, given)
        if not ended.status:
            return ended.output
        said = ended.errors.decode("utf-8", "replace").strip()
        last = said.splitlines()[-1] if said else "no message"
        if ended.status in (126, 127):
            raise EnvironmentLacks(f"{self.host} cannot run the measuring program: {last}")
        if ended.status in _SIGNALS:
            raise ArtifactError(f"the model ended on {self.host} with {_SIGNALS[ended.status]}")
        raise ArtifactError(f"on {self.host}: {last}")

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

    def hangs(self) -> EnvironmentLacks:
        """Error of a command that does not end."""
        return EnvironmentLacks(
            f"{self.host} did not finish within {self.timeout:g} s: it hangs, or needs more time "
            "(--timeout)"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
