"""For tests of jobs: a TCP proxy that can be cut like a cable, and the command as a process whose lines are awaited."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from conftest import COMMAND, REPOSITORY

DEADLINE_S = 240.0


class Cable:
    """A TCP proxy on a port of its own; `cut` breaks every connection and takes no new one until `mend`."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._ends: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.port = 0
        self.mend()

    def mend(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        self._listener, self.port = listener, listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        listener, self._listener = self._listener, None
        for end in (*([listener] if listener is not None else ()), *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)


@dataclass
class Going:
    """A `weaver-rl` command that goes on."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    _arriving: queue.Queue[str | None] = field(default_factory=queue.Queue)

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._arriving.put(line.rstrip("\n"))
        self._arriving.put(None)

    def until(self, seen: Callable[[str], bool]) -> str:
        """The next line that satisfies `seen`; fails when the command ends before, or goes on for too long."""
        end = time.monotonic() + DEADLINE_S
        with contextlib.suppress(queue.Empty):
            while (line := self._arriving.get(timeout=max(0.0, end - time.monotonic()))) is not None:
                self.lines.append(line)
                if seen(line):
                    return line
        raise AssertionError("\n".join(self.lines))

    def ends(self) -> int:
        """Its exit status; all its lines are in `lines` then."""
        while (line := self._arriving.get(timeout=DEADLINE_S)) is not None:
            self.lines.append(line)
        return self.process.wait(DEADLINE_S)


@contextlib.contextmanager
def going(*arguments: str, env: Mapping[str, str]) -> Iterator[Going]:
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | dict(env),
        start_new_session=True,
    )
    it = Going(process)
    threading.Thread(target=it.read, daemon=True).start()
    try:
        yield it
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
