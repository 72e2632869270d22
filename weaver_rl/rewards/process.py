"""One reward worker process seen from its parent: start, talk, kill. It knows no rollouts and never retries.

Everything here blocks and belongs to one thread, but for `kill`. That thread must live as long as the process: the
kernel kills a child with PR_SET_PDEATHSIG when the *thread* that started it ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from weaver_rl.rewards.messages import FromWorker, ToWorker
from weaver_rl.rewards.values import one_line

STALLED_CHANNEL_S = 5.0
KEPT_OUTPUT_BYTES = 8192
# numpy's and sympy's thread pools and malloc's arenas would count as address space that the plugin "added".
CHILD_ENV = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}

OnOutput = Callable[[bytes], None]


class WorkerDiedError(Exception):
    """The process ended, or its channel broke; the message says how, with its last output."""


class OverdueError(Exception):
    """No message came before the deadline."""


class WorkerProcess:
    """A child program with its own session and process group, a message channel and a drained output pipe."""

    def __init__(self, on_output: OnOutput | None = None) -> None:
        self._on_output = on_output
        self._recent = bytearray()
        self._reaping = threading.Lock()
        self._reaped = False
        ours, theirs = socket.socketpair()
        with theirs:
            # A plugin can stop its process in the middle of a message; a read or write on the channel must end anyway.
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(STALLED_CHANNEL_S), 0))
            self._channel: Connection[Any, Any] = Connection(ours.detach())
            try:
                self._popen = _spawn(theirs.fileno())
            except OSError:
                self._channel.close()
                raise
        assert self._popen.stdout is not None
        self._output_fd = self._popen.stdout.fileno()
        os.set_blocking(self._output_fd, False)
        self._output_open = True
        # Forked grandchildren hold the channel open, so its end alone would not tell that the worker died.
        self._pidfd = os.pidfd_open(self._popen.pid)

    @property
    def pid(self) -> int:
        """Process id, which is also the id of its group and session."""
        return self._popen.pid

    def send(self, message: ToWorker) -> None:
        """Raises WorkerDiedError when the process does not take it."""
        try:
            self._channel.send(message)
        except (OSError, ValueError) as error:
            raise WorkerDiedError(self._end(f"its channel broke while sending ({type(error).__name__})")) from None

    def receive(self, deadline: float) -> FromWorker:
        """The next message; raises OverdueError at `deadline` (time.monotonic), WorkerDiedError if none can come."""
        while True:
            sources: list[Connection[Any, Any] | int] = [self._channel, self._pidfd]
            if self._output_open:
                sources.append(self._output_fd)
            remaining_s = deadline - time.monotonic()
            ready = wait(sources, timeout=max(0.0, remaining_s))
            if self._output_fd in ready:
                self._drain()
            if self._channel in ready:
                return self._read()
            if self._pidfd in ready:
                raise WorkerDiedError(self._end("its channel closed"))
            if remaining_s <= 0:
                raise OverdueError

    def forget_output(self) -> None:
        """Called when a rollout is answered: what was printed until then explains no later death."""
        self._recent.clear()

    def kill(self) -> None:
        """Kills the group now, from any thread; the owning thread still has to call `close`."""
        with self._reaping:
            if not self._reaped:
                self._kill_group()

    def close(self) -> None:
        """Kills the process with everything it started, waits for its end and frees every descriptor. Idempotent."""
        with self._reaping:
            if self._reaped:
                return
            self._kill_group()
            # Until here the dead leader is kept unreaped, so that the group's number cannot be somebody else's.
            self._popen.wait()
            self._reaped = True
        self._drain()
        self._channel.close()
        os.close(self._pidfd)
        if self._popen.stdout is not None:
            self._popen.stdout.close()

    def _read(self) -> FromWorker:
        try:
            return self._channel.recv()  # type: ignore[no-any-return]
        except EOFError:
            raise WorkerDiedError(self._end("it closed its channel")) from None
        except (OSError, ValueError, pickle.UnpicklingError, AttributeError, ImportError, IndexError) as error:
            raise WorkerDiedError(self._end(f"its channel broke ({type(error).__name__})")) from None

    def _end(self, otherwise: str) -> str:
        """Closes, and says how the process ended; `otherwise` where it had not ended by itself."""
        with contextlib.suppress(OverdueError):
            self._await_exit(time.monotonic() + 0.5)
        ended_itself = bool(wait([self._pidfd], timeout=0))
        self.close()
        code = self._popen.returncode
        how = otherwise
        if ended_itself:
            how = f"died with signal {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        output = _essence(bytes(self._recent))
        return f"the worker process {how}" + (f": {output}" if output else "")

    def _await_exit(self, deadline: float) -> None:
        while not wait([self._pidfd], timeout=0.02):
            self._drain()
            if time.monotonic() > deadline:
                raise OverdueError

    def _kill_group(self) -> None:
        with contextlib.suppress(psutil.Error):
            # Plugins that run code give it a session of its own, where the signal to our group does not reach.
            for descendant in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    descendant.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _drain(self) -> None:
        """Takes one helping of what the plugin printed: never until empty, an endless printer would not let us go."""
        try:
            printed = os.read(self._output_fd, 65536)
        except BlockingIOError:
            return
        if not printed:
            self._output_open = False
            return
        self._recent += printed
        del self._recent[:-KEPT_OUTPUT_BYTES]
        if self._on_output is not None:
            self._on_output(printed)


def _spawn(channel_fd: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    environment = {**CHILD_ENV, **os.environ, "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "weaver_rl.rewards.worker", str(channel_fd), str(os.getpid())],
        pass_fds=(channel_fd,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
    )


def _essence(output: bytes) -> str:
    """The last lines a dying process printed, without faulthandler's framing and the frames of our own worker."""
    noise = (
        "Extension modules:",
        "Current thread ",
        "Fatal Python error:",
        "<frozen runpy>",
        str(Path(__file__).parent),
    )
    lines = [line.strip() for line in output.decode(errors="replace").splitlines()]
    return one_line(" ".join([line for line in lines if line and not any(part in line for part in noise)][-6:]))
