"""Something to measure, alive in a process of its own. It knows neither models nor engines."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_TIMEOUT_S = 300.0
CALL_TIMEOUT_S = 300.0


class Child:
    """A process that builds a function once and calls it whenever asked.

    Args:
        build: module-level function; its result is called by `__call__`.
        arguments: of `build`, picklable.
        environment: set before `build` imports anything.

    Example:
        with Child(build_engine, (spec,)) as generate:
            seconds = generate()
    """

    def __init__(
        self,
        build: Callable[..., Callable[[], Any]],
        arguments: tuple[Any, ...],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        # A forked child would inherit this process's threads and memory, Ray's among them.
        context = multiprocessing.get_context("spawn")
        self._name = build.__name__
        self._pipe, theirs = context.Pipe()
        handle, log = tempfile.mkstemp(prefix="weaver-rl-benchmark-", suffix=".log")
        os.close(handle)
        self._log = Path(log)
        self._process = context.Process(
            target=_serve, args=(theirs, self._log, build, arguments, dict(environment or {})), daemon=True
        )
        self._process.start()
        theirs.close()
        self._started = False

    def __call__(self) -> Any:
        """One call in the child; what it returns."""
        self.wait_started()
        self._pipe.send("call")
        return self._answer(CALL_TIMEOUT_S)

    def wait_started(self) -> None:
        """Returns once the function is built."""
        if not self._started:
            self._answer(START_TIMEOUT_S)
            self._started = True

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._log.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, timeout_s: float) -> Any:
        try:
            if not self._pipe.poll(timeout_s):
                raise RuntimeError(f"{self._name} did not answer within {timeout_s:g} s")
            outcome, value = self._pipe.recv()
        except EOFError:
            self._process.join(timeout=5)
            said = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self._name} ended with exit status {self._process.exitcode}:\n{said}") from None
        if outcome == "failed":
            raise RuntimeError(f"{self._name} failed:\n{value}")
        return value


def _serve(
    pipe: Connection,
    log: Path,
    build: Callable[..., Callable[[], Any]],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)
    said = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        function = build(*arguments)
        pipe.send(("done", None))
        while True:
            pipe.recv()
            pipe.send(("done", function()))
    except EOFError:
        return
    except Exception:  # noqa: BLE001 - boundary of the process: whoever asked gets it as text
        pipe.send(("failed", traceback.format_exc()))
