"""A server of TVM's RPC whose sessions another program serves: TRACKER KEY PROGRAM...

TVM's own server waits for clients here; each session, with its socket, goes to PROGRAM: an
emulator and the board's program under it (rpc_session.c).
"""

import os
import socket
import subprocess
import sys
from typing import Any

from tvm.rpc import server


def main() -> None:
    tracker, key, *program = sys.argv[1:]

    def session(connection: socket.socket, _load_library: str, folder: Any) -> None:
        number = connection.fileno()
        os.set_inheritable(number, True)
        call = [*program, str(number), folder.path]
        sys.exit(subprocess.run(call, pass_fds=[number], check=False).returncode)

    server._serve_loop = session
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(1)
    host, _, port = tracker.rpartition(":")
    server._listen_loop(
        listening, listening.getsockname()[1], key, (host, int(port)), "", "127.0.0.1"
    )


if __name__ == "__main__":
    main()
