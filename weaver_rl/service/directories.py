"""Directories of files, each there whole or not at all, each under a UUID of ours. It does not know what is in them.

A directory is written aside and gets its name when everything in it is on disk; before it is removed it loses its name.
So whatever a kill leaves under a UUID is complete, and the rest is recognised and removed at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Collection
from functools import partial
from pathlib import Path
from typing import TypeVar

from weaver_rl.errors import CheckpointError
from weaver_rl.run_folder import fsync_directory
from weaver_rl.service.records import ArtifactFile

T = TypeVar("T")

_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_WRITING, _REMOVING = ".writing-", ".removing-"


class Directories:
    """The directories in one folder. Making it removes what a killed process left half-done.

    Example:
        async with directories.writing(checkpoint_id) as directory:
            await learner.save_state(directory)
        directory = directories.path(checkpoint_id)
    """

    def __init__(self, folder: Path, what: str) -> None:
        """`what` is what errors call one of them. Raises OSError when the folder cannot be used."""
        self._folder = folder
        self._what = what
        folder.mkdir(parents=True, exist_ok=True)
        for prefix in (_WRITING, _REMOVING):
            for path in folder.glob(f"{prefix}*"):
                shutil.rmtree(path)
        self._found = {path.name for path in folder.iterdir() if _UUID.fullmatch(path.name)}

    def path(self, directory_id: str) -> Path:
        """Absolute if the folder is; whether it is there or not.

        Raises:
            ValueError: the id is not one that the service gives.
        """
        if _UUID.fullmatch(directory_id) is None:
            raise ValueError(f"{directory_id!r} is not the id of a {self._what}: a UUID in lower case is expected")
        return self._folder / directory_id

    @contextlib.asynccontextmanager
    async def writing(self, directory_id: str) -> AsyncIterator[Path]:
        """Yields an empty directory to write into; it becomes that of the id when the block succeeds.

        When the block or the disk fails, nothing of it is left, and other directories are as they were.

        Raises:
            CheckpointError: it could not be written; says what the disk said and how much room there is.
            ValueError: the id has a directory already, or is none.
        """
        target = self.path(directory_id)
        if await asyncio.to_thread(target.exists):
            raise ValueError(f"{self._what} {directory_id} is there already; it never changes")
        aside = self._folder / f"{_WRITING}{directory_id}-{uuid.uuid4().hex[:8]}"
        try:
            await _to_the_end(aside.mkdir)
            yield aside
            await _to_the_end(partial(self._put_in_place, aside, target))
        except BaseException as error:  # boundary: cleans up, then raises again
            await _to_the_end(partial(self._discard, aside, target))
            # Those two are OSErrors as well, of something else that the block waited for.
            if isinstance(error, OSError) and not isinstance(error, (TimeoutError, ConnectionError)):
                raise CheckpointError(self._failure(error)) from error
            raise

    async def remove(self, directory_id: str) -> None:
        """Of one that is not there nothing happens.

        Raises:
            CheckpointError: it could not be removed, or not whole; what is left is removed at the next start.
        """
        target = self.path(directory_id)
        try:
            await _to_the_end(partial(self._remove, target))
        except OSError as error:
            raise CheckpointError(f"a {self._what} could not be removed: {_words(error)}") from error

    async def sweep(self, keep: Collection[str]) -> int:
        """Removes what an earlier process wrote and `keep` does not have; what this one wrote stays. How many.

        Called once, before anybody is served: what was written and then not recorded, because of a kill, goes.

        Raises:
            CheckpointError: see `remove`.
        """
        forgotten, self._found = self._found - set(keep), set()
        for directory_id in sorted(forgotten):
            await self.remove(directory_id)
        return len(forgotten)

    def _put_in_place(self, aside: Path, target: Path) -> None:
        files = _files(aside)
        if not files:
            raise CheckpointError(f"a {self._what} was written without any file")
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for path in aside.rglob("*"):
            if path.is_dir():
                fsync_directory(path)
        fsync_directory(aside)
        aside.rename(target)
        fsync_directory(self._folder)

    def _discard(self, aside: Path, target: Path) -> None:
        """Nobody knows of it yet, so it may go even when it got its name at the last moment."""
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._remove(target)

    def _remove(self, target: Path) -> None:
        doomed = self._folder / f"{_REMOVING}{target.name}-{uuid.uuid4().hex[:8]}"
        try:
            target.rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed)

    def _failure(self, error: OSError) -> str:
        room = ""
        with contextlib.suppress(OSError):
            room = f" ({shutil.disk_usage(self._folder).free / 1e6:,.0f} MB free)"
        return f"a {self._what} could not be written: {_words(error)}{room}; everything saved before is as it was"


async def _to_the_end(work: Callable[[], T]) -> T:
    """In a thread, which a cancellation waits for: what goes on behind one's back cannot be undone."""
    at_work = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(at_work)
    except asyncio.CancelledError:
        await asyncio.wait([at_work])
        raise


async def manifest_of(directory: Path) -> tuple[ArtifactFile, ...]:
    """Every file in it, by name, with size and SHA-256. Raises CheckpointError when one cannot be read."""

    def entries() -> tuple[ArtifactFile, ...]:
        return tuple(_entry(directory, path) for path in _files(directory))

    try:
        return await asyncio.to_thread(entries)
    except OSError as error:
        raise CheckpointError(f"what was written cannot be read back: {_words(error)}") from error


def _entry(directory: Path, path: Path) -> ArtifactFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ArtifactFile(name=path.relative_to(directory).as_posix(), size=path.stat().st_size, sha256=digest)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def _words(error: OSError) -> str:
    """Without the path: clients read it."""
    return error.strerror or type(error).__name__
