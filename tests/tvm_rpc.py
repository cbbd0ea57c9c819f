"""TVM's own RPC tracker and servers, as processes of their own on free ports."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest

ROOT = Path(__file__).parents[1]
START_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(ready: Callable[[], object], what: str, seconds: float = START_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            pytest.fail(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.05)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class Farm:
    """A tracker and its boards; use it as a context.

    Attributes:
        folder: for logs.
        port: of the tracker.
    """

    folder: Path
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        pytest.importorskip("tornado", reason="TVM's tracker needs tornado: pip install tornado")
        self._start("tracker", "tvm.exec.rpc_tracker", "--host", "127.0.0.1", *self._at(self.port))
        wait_until(lambda: answers(self.port), "start of the tracker")
        return self

    def add(self, key: str) -> None:
        """A server that registers as ``key``; returns when the tracker knows it."""
        self._start(
            key, "tvm.exec.rpc_server", "--host", "127.0.0.1", *self._at(free_port()),
            "--tracker", self.address, "--key", key,
        )  # fmt: skip
        wait_until(lambda: self.knows(key), f"registration of {key}")

    def add_emulated(self, key: str, program: Sequence[str]) -> None:
        """The same with sessions that a program serves; see emulated_rpc_server.py."""
        self._start(key, "tests.emulated_rpc_server", self.address, key, *program)
        wait_until(lambda: self.knows(key), f"registration of {key}")

    def knows(self, key: str) -> bool:
        """Whether a board has registered with the tracker."""
        from mpqc.boards.rpc import _Tracker

        with _Tracker.connect(self.address) as tracker:
            return key in tracker.keys()  # noqa: SIM118 - a method that asks

    def signal(self, name: str, number: int) -> None:
        """To a process and all that it has started."""
        os.killpg(self.processes[name].pid, number)

    def kill(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)
        self.processes.pop(name).wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _at(self, port: int) -> tuple[str, ...]:
        return "--port", str(port), "--port-end", str(port + 1)

    def _start(self, name: str, module: str, *arguments: str) -> None:
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / f"{name}.log").open("wb"),
            start_new_session=True,  # servers start processes that outlive them
        )

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name)
