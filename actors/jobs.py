"""Runs as jobs of a Ray cluster: submitted, followed through lost connections, stopped. It prints through a console."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from actors.job_client import JobLook, JobServer
from actors.job_package import JobPackage, plan_package, write_package
from weaver_rl.config import RunConfig
from weaver_rl.errors import ConfigError, JobServerLostError, UnknownJobError, UserError
from weaver_rl.exit_status import INTERRUPTED, INTERRUPTED_STATUS
from weaver_rl.job_log import JobLog
from weaver_rl.run_location import is_url

T = TypeVar("T")

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WITHIN_S = 120
"""What a job gets between SIGTERM and SIGKILL; Ray's own 3 s are too short for a checkpoint."""
SILENCE_S = 5.0
"""After so long without a word it is asked whether the job server and the job are still there."""
STALE_S = 60.0
"""After so long the whole log is asked for: a connection can be dead and look silent."""
LOG_OF_ENDED_S = 30.0
"""How long a job that has ended is asked for the rest of its log: the node that has it may be gone."""
RETRY_FIRST_S = 0.5
RETRY_AT_MOST_S = 15.0
LOOK_EVERY_S = 0.5
NOT_FOUND_STATUS = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """What shall become a job.

    Example:
        JobRequest(config_file=Path("tiny.yaml"), overrides=("run_dir=/shared/tiny",))
    """

    config_file: Path
    overrides: Sequence[str] = ()
    resume: bool = False
    overwrite: bool = False
    working_dir: Path | None = None
    excludes: Sequence[str] = ()
    env: Mapping[str, str]
    """Of the job and all its actors."""
    job_id: str | None = None


def submit(server: JobServer, config: RunConfig, request: JobRequest, console: Console) -> str:
    """Packs what the run needs, sends it and starts the job; returns its id.

    Raises:
        ConfigError: the run folder would be lost, the package is too large, the job's id is taken.
        ResourcesError: the job server does not answer.
    """
    _check_run_dir(config)
    if request.job_id is not None:
        _check_free(server, request.job_id)
    package = plan_package(request.config_file, config, working_dir=request.working_dir, excludes=request.excludes)
    for note in package.notes:
        console.print(f"note: {note}", markup=False)
    job_id = request.job_id or f"{config.name}-{secrets.token_hex(4)}"
    env = {STOP_WAIT: str(STOP_WITHIN_S), **request.env}
    with tempfile.TemporaryDirectory(prefix="weaver-rl-package-") as directory:
        archive = Path(directory) / "package.zip"
        write_package(package, archive)
        size = archive.stat().st_size / 2**20
        console.print(f"packed {package.root}: {len(package.files)} files, {size:.1f} MB", markup=False)
        server.submit(entrypoint=_entrypoint(config, request, package), job_id=job_id, package=archive, env_vars=env)
    return job_id


def follow(server: JobServer, job_id: str, console: Console, *, reconnect_s: float, tail: int | None = None) -> JobLook:
    """Prints the job's log line by line until the job ends; returns how it ended.

    Args:
        reconnect_s: how long the job server may be away.
        tail: of what is there already only so many lines.

    Raises:
        JobServerLostError: it was away for longer; the job goes on.
        KeyboardInterrupt: of the user; the job goes on.
    """
    return asyncio.run(_Follower(server, job_id, console, reconnect_s, tail).run())


def stop(server: JobServer, job_id: str, *, timeout_s: float) -> JobLook:
    """Asks the job to end and waits until it has, or for `timeout_s`; returns how it stands then."""
    end = time.monotonic() + timeout_s
    look = server.look(job_id)
    if not look.has_ended:
        server.stop(job_id)
    while not look.has_ended and time.monotonic() < end:
        time.sleep(LOOK_EVERY_S)
        with contextlib.suppress(JobServerLostError):
            look = server.look(job_id)
    return look


def exit_status(look: JobLook) -> int:
    """What a command that followed the job to its end ends with."""
    if look.state == "SUCCEEDED":
        return 0
    if look.state == "STOPPED" or look.exit_code == INTERRUPTED_STATUS:
        return INTERRUPTED_STATUS
    return 1


def ending(look: JobLook) -> str:
    """How the job stands, in a sentence."""
    if look.state == "FAILED" and look.exit_code == NOT_FOUND_STATUS:
        return (
            f"job {look.job_id} failed: the head node does not find the program `weaver-rl`. Install this package in "
            "the environment of `ray start` there, and have its bin directory on PATH"
        )
    if look.state == "FAILED" and look.exit_code is not None:
        return f"job {look.job_id} failed with exit status {look.exit_code}; its log says why"
    if look.state == "FAILED":
        return f"job {look.job_id} failed: {look.message.strip() or 'Ray does not say why'}"
    words = {"SUCCEEDED": "succeeded", "STOPPED": "was stopped", "RUNNING": "is running", "PENDING": "is waiting"}
    return f"job {look.job_id} {words[look.state]}"


def how_it_stopped(server: JobServer, look: JobLook) -> str:
    """What became of a job that was asked to end."""
    if not look.has_ended:
        return (
            f"job {look.job_id} has not ended yet; it gets {STOP_WAIT} seconds ({STOP_WITHIN_S} unless set by --env), "
            f"then it is killed. `weaver-rl logs {look.job_id} --address {server.address}` shows what it does"
        )
    if look.state != "STOPPED":
        return ending(look)
    try:
        log = server.log(look.job_id)
    except UserError as error:
        return f"job {look.job_id} was stopped; whether in good order its log would say, which cannot be read ({error})"
    # What `weaver-rl train` prints at its end when a signal stopped it.
    if INTERRUPTED in log[-2000:]:
        return f"job {look.job_id} has ended in good order; `--resume` goes on from its newest checkpoint"
    return (
        f"job {look.job_id} was killed before it had ended by itself; `--resume` goes on from the newest checkpoint. "
        f"More time: submit --env {STOP_WAIT}=SECONDS"
    )


def _check_run_dir(config: RunConfig) -> None:
    where = str(config.run_dir) if config.run_dir is not None else f"runs/{config.name}"
    if is_url(where) or Path(where).is_absolute():
        return
    raise ConfigError(
        f"run_dir: {where} is relative: in the job it would be inside a temporary directory of the head node and lost "
        f"with it. Give a path on storage that the cluster keeps, run_dir=/shared/{config.name}, or a URL, "
        f"run_dir=s3://bucket/{config.name}"
    )


def _check_free(server: JobServer, job_id: str) -> None:
    with contextlib.suppress(UnknownJobError):
        look = server.look(job_id)
        raise ConfigError(
            f"--job-id {job_id}: there is such a job ({look.state}); give another name, or leave it out for a new one"
        )


def _entrypoint(config: RunConfig, request: JobRequest, package: JobPackage) -> str:
    overrides = [*request.overrides, *package.overrides]
    if config.cluster.address is not None:
        overrides.append("cluster.address=null")  # the cluster of the job is the one that runs it
    flags = [flag for flag, given in (("--resume", request.resume), ("--overwrite", request.overwrite)) if given]
    # Without a shell in between, which a signal would end before the run.
    return "exec " + shlex.join(["weaver-rl", "train", package.config, *overrides, *flags])


class _Follower:
    """One reader of one job's log."""

    def __init__(self, server: JobServer, job_id: str, console: Console, reconnect_s: float, tail: int | None) -> None:
        self._server = server
        self._job_id = job_id
        self._console = console
        self._reconnect_s = reconnect_s
        self._tail = tail
        self._log = JobLog()
        self._lost_at: float | None = None
        self._wait_s = RETRY_FIRST_S
        # Not asyncio's own: that is waited for when the user interrupts a question to a server that is away.
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def run(self) -> JobLook:
        if self._tail is not None:
            lines = self._log.tell(await self._ask(self._server.log))
            self._print(lines[max(0, len(lines) - self._tail) :])
        look: JobLook | None = None
        while True:
            try:
                look = await self._ask(self._server.look)
                if look.has_ended:
                    await self._catch_up()
                    break
                await self._connection()
                await asyncio.sleep(LOOK_EVERY_S)
            except JobServerLostError as error:
                if look is not None and look.has_ended and self._lost_for() > LOG_OF_ENDED_S:
                    self._note(f"the rest of its log cannot be had ({error})")
                    break
                await self._wait_for_server(error)
        self._print(self._log.end())
        return look

    async def _connection(self) -> None:
        """Follows one connection to its end, whatever ends it."""
        self._log.connect()
        silent_s = 0.0
        async with contextlib.aclosing(self._server.tail(self._job_id)) as texts:
            waiting = asyncio.ensure_future(_next(texts))
            try:
                while True:
                    done, _ = await asyncio.wait({waiting}, timeout=SILENCE_S)
                    if done:
                        text, silent_s = waiting.result(), 0.0
                        if not text:
                            return
                        self._found()
                        self._print(self._log.tell(text))
                        waiting = asyncio.ensure_future(_next(texts))
                        continue
                    silent_s += SILENCE_S
                    look = await self._ask(self._server.look)
                    self._found()
                    if look.has_ended or (silent_s >= STALE_S and await self._catch_up()):
                        return  # or there was more, which this connection did not tell
            finally:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

    async def _catch_up(self) -> bool:
        """Prints what the log has beyond what was told; returns whether it has."""
        text = await self._ask(self._server.log)
        self._found()
        before = self._log.num_told
        self._print(self._log.tell_whole(text))
        return self._log.num_told > before

    async def _wait_for_server(self, error: JobServerLostError) -> None:
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            self._note(f"connection lost; the job goes on, trying again for {self._reconnect_s:g} s")
        if self._lost_for() + self._wait_s > self._reconnect_s:
            raise JobServerLostError(
                f"{error}. Gave up after {self._lost_for():.0f} s; the job goes on: `weaver-rl logs {self._job_id} "
                f"--address {self._server.address}` follows it again"
            ) from None
        await asyncio.sleep(self._wait_s)
        self._wait_s = min(2 * self._wait_s, RETRY_AT_MOST_S)

    def _found(self) -> None:
        """The log is told again."""
        if self._lost_at is not None:
            self._note(f"connected again after {self._lost_for():.0f} s; the log goes on where it was")
        self._lost_at, self._wait_s = None, RETRY_FIRST_S

    def _lost_for(self) -> float:
        return 0.0 if self._lost_at is None else time.monotonic() - self._lost_at

    async def _ask(self, question: Callable[[str], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, question, self._job_id)

    def _print(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _note(self, text: str) -> None:
        self._console.print(f"-- {text}", markup=False, highlight=False, soft_wrap=True)


async def _next(texts: AsyncIterator[str]) -> str:
    """The next text, which is never empty; nothing at the end."""
    async for text in texts:
        if text:
            return text
    return ""
