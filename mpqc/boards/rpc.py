"""A board with TVM's RPC server, found by TVM's tracker: commands and files through a session.

The server knows how to take a file and how to load a library with functions of TVM's interface.
So it gets one whose functions run commands (``shell.c``), and then serves as ssh does: a model
that crashes ends a program of its own, never the server. RPC trusts its network: whoever reaches
the server can run anything there.
"""

import contextlib
import queue
import socket
import struct
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar

import tvm_ffi
from tvm import rpc
from tvm.rpc import base

from mpqc.boards.connection import Connection, Ended
from mpqc.boards.programs import compile_shell
from mpqc.errors import EnvironmentLacks, UsageError
from mpqc.target import Target

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 15.0  # that a call of the session may take; a board that is gone never answers
SLOWEST = 100_000  # bytes per second of a file that travels
WAIT_SECONDS = 1.0  # for a command, in one call
ATTEMPTS = 3  # to take a board that the tracker gives: it may have gone meanwhile

Answer = TypeVar("Answer")
Notify = Callable[[str], None]


class Rpc(Connection):
    """A session with a board's server.

    Args:
        tracker: "host:port" of the tracker.
        key: that the board's server has registered with.
        target: of the board.
        timeout: of a single command, and of the wait for a board that others use [s].
        notify: told that the board is busy.

    Raises:
        UsageError: not an address, or no key.
        EnvironmentLacks: no tracker there, no board with this key, or it stays busy or silent.
    """

    def __init__(
        self,
        tracker: str,
        key: str,
        target: Target,
        timeout: float = 600.0,
        notify: Notify = lambda _: None,
    ) -> None:
        if not key:
            raise UsageError("--tracker needs --key: the name that the board has registered with")
        self.host = f"{key} (tracker {tracker})"
        self.timeout = timeout
        self._calls = _Calls(self.host)
        self._session: Any = None
        self._shell: Any = None
        try:
            with _Tracker.connect(tracker) as known:
                self._session = self._connect(known, key, notify)
            self._shell = self._send_shell(target)
            place = self._session.get_function("tvm.rpc.server.workpath")
            self.folder = str(self._ask(lambda: place(""))).rstrip("/")
        except BaseException:
            self.close()
            raise

    def _connect(self, tracker: "_Tracker", key: str, notify: Notify) -> Any:
        for attempt in range(ATTEMPTS):
            host, port, match = tracker.request(key, self.timeout, notify)
            try:
                return self._ask(lambda: rpc.connect(host, port, match), CONNECT_SECONDS)  # noqa: B023
            except EnvironmentLacks:
                if attempt + 1 == ATTEMPTS:
                    raise
        raise AssertionError

    def _send_shell(self, target: Target) -> Any:
        headers = (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())
        with tempfile.TemporaryDirectory(prefix="mpqc-") as folder:
            library = compile_shell(target, Path(folder), [str(header) for header in headers])
            self._send(library.name, library.read_bytes())
        try:
            return self._ask(lambda: self._session.load_module(library.name))
        except EnvironmentLacks as error:
            raise EnvironmentLacks(
                f"{error} (it cannot load a library for {target.name}: is this its processor?)"
            ) from error

    def call(self, command: str, given: bytes) -> Ended:
        self._send("given", given)
        started = self._function("start", f"cd {self.folder} && ( {command} ) <given >said 2>why")
        if started:
            raise EnvironmentLacks(f"{self.host} cannot start a command: error {started}")
        end = time.monotonic() + self.timeout
        status = -1
        while status < 0:
            left = end - time.monotonic()
            if left <= 0:
                self._function("stop")
                raise self.hangs()
            status = self._function("wait", round(min(left, WAIT_SECONDS) * 1000))
        return Ended(status, self._fetch("said"), self._fetch("why"))

    def _function(self, name: str, *arguments: Any) -> int:
        return int(self._ask(lambda: self._shell[name](*arguments)))

    def _send(self, name: str, content: bytes) -> None:
        patience = ANSWER_SECONDS + len(content) / SLOWEST
        self._ask(lambda: self._session.upload(bytearray(content), name), patience)

    def _fetch(self, name: str) -> bytes:
        return self._ask(lambda: bytes(self._session.download(name)), self.timeout)

    def _ask(self, call: Callable[[], Answer], seconds: float = ANSWER_SECONDS) -> Answer:
        return self._calls(call, seconds)

    def close(self) -> None:
        """Stop what runs and end the session: the server then removes our folder."""
        with contextlib.suppress(EnvironmentLacks):
            if self._shell is not None:
                self._function("stop")
            self._ask(self._forget)
        self._calls.end()

    def _forget(self) -> None:
        self._shell = self._session = None


class _Calls:
    """Calls in a thread of their own, one after another: TVM's wait for answers without end."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._lost: EnvironmentLacks | None = None
        self._waiting: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._work, name="mpqc-rpc", daemon=True).start()

    def _work(self) -> None:
        while (asked := self._waiting.get()) is not None:
            call, future = asked
            try:
                future.set_result(call())
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)
                future.set_exception(error)
            del asked, call, future  # they and the frames hold the session

    def __call__(self, call: Callable[[], Answer], seconds: float) -> Answer:
        """Answer of a call.

        Raises:
            EnvironmentLacks: it failed, there or on the way, or no answer came in time.
        """
        if self._lost is not None:
            raise self._lost
        future: Future[Answer] = Future()
        self._waiting.put((call, future))
        try:
            return future.result(seconds)
        except TimeoutError:
            self._lost = EnvironmentLacks(
                f"{self._host} gave no sign of life for {seconds:g} s: the board or the network "
                "is gone"
            )
            raise self._lost from None
        except (RuntimeError, OSError, ValueError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> EnvironmentLacks:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        if type(error).__name__ == "RPCError":  # the server's own answer
            return EnvironmentLacks(f"{self._host}: {lines[-1]}")
        why = "" if lines[-1].startswith("Check failed") else f" ({lines[-1]})"
        self._lost = EnvironmentLacks(
            f"{self._host} is gone: the connection to its RPC server broke{why}"
        )
        return self._lost

    def end(self) -> None:
        self._lost = self._lost or EnvironmentLacks(f"the session with {self._host} has ended")
        self._waiting.put(None)


class _Tracker:
    """A client of TVM's tracker that does not wait without end; use it as a context."""

    def __init__(self, address: str, connection: socket.socket) -> None:
        self._address = address
        self._connection = connection

    @classmethod
    def connect(cls, address: str) -> "_Tracker":
        """Reach a tracker.

        Raises:
            UsageError: not "host:port".
            EnvironmentLacks: nobody answers there, or no tracker.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UsageError(f"--tracker wants HOST:PORT, got {address!r}")
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS)
        except OSError as error:
            raise EnvironmentLacks(
                f"the tracker at {address} cannot be reached: {error} (is it running? python -m "
                f"tvm.exec.rpc_tracker --port {port})"
            ) from error
        try:
            magic = struct.pack("<i", base.RPC_TRACKER_MAGIC)
            connection.sendall(magic)
            if base.recvall(connection, len(magic)) != magic:
                raise ValueError("its answer is another protocol's")
        except (OSError, ValueError) as error:
            connection.close()
            raise EnvironmentLacks(f"{address} is no tracker of TVM's RPC: {error}") from error
        return cls(address, connection)

    def request(self, key: str, seconds: float, notify: Notify) -> tuple[str, int, str]:
        """Take a board; waits for one that others use.

        Returns:
            Host, port and password of its server.

        Raises:
            EnvironmentLacks: there is none with this key, or none became free in time.
        """
        keys = self.keys()
        if key not in keys:
            raise EnvironmentLacks(
                f"the tracker at {self._address} knows no board {key!r}, only: "
                f"{', '.join(sorted(keys)) or 'none at all'} (on the board: python -m "
                f"tvm.exec.rpc_server --tracker {self._address} --key {key})"
            )
        if not keys[key]:
            notify(f"{key} is busy: waiting for it, {seconds:g} s at most (--timeout)")
        try:
            found = self._ask([base.TrackerCode.REQUEST, key, "", 1], seconds)
        except TimeoutError:
            raise EnvironmentLacks(
                f"{key} was not free within {seconds:g} s: others use it (--timeout)"
            ) from None
        host, port, password = found
        return str(host), int(port), str(password)

    def keys(self) -> dict[str, int]:
        """Key of every registered board -> how many are free."""
        found = self._ask([base.TrackerCode.SUMMARY], CONNECT_SECONDS)
        keys = {str(info["key"]).partition(":")[2] for info in found["server_info"]}
        return {key: int(found["queue_info"].get(key, {}).get("free", 0)) for key in keys}

    def _ask(self, message: list[Any], seconds: float) -> Any:
        self._connection.settimeout(seconds)
        try:
            base.sendjson(self._connection, message)
            status, *answer = base.recvjson(self._connection)
        except TimeoutError:
            raise
        except (OSError, ValueError, TypeError) as error:
            raise EnvironmentLacks(f"the tracker at {self._address} is gone: {error}") from error
        if status != base.TrackerCode.SUCCESS:
            raise EnvironmentLacks(f"the tracker at {self._address} refuses: {status}")
        return answer[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
