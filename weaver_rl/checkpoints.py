"""Checkpoint directories, whole or not at all. It does not know what a checkpoint contains, nor torch."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from weaver_rl.errors import CheckpointError, WeaverRLError
from weaver_rl.run_folder import fsync_directory, write_atomically

MANIFEST = "manifest.json"
CONTROLLER_STATE = "controller_state.json"

_NAME = re.compile(r"step_(\d{6,})")
_WRITING, _DELETING, _REPLACED = ".writing-", ".deleting-", ".replaced-"


def _ignore(_: str) -> None:
    pass


class Checkpoints:
    """The checkpoints of one run. Opening it removes what a killed process left half-done.

    Example:
        checkpoints = Checkpoints(run_folder.checkpoints, keep=2, warn=view.note)
        with checkpoints.writing(step=20) as directory:
            save_controller_state(directory, {"step": 20})
        directory = checkpoints.latest()
    """

    def __init__(self, folder: Path, keep: int, warn: Callable[[str], None] = _ignore) -> None:
        """`keep` is how many of the newest stay; `warn` is told about each damaged one."""
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep is {keep}; it must be at least 1")
        self._folder = folder
        self._keep = keep
        self._warn = warn
        with _clear_errors(f"cannot use {folder} for checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()

    @contextlib.contextmanager
    def writing(self, step: int, *, pinned: bool = False) -> Iterator[Path]:
        """Yields an empty directory to write into; it becomes the checkpoint of `step` when the block succeeds.

        When the block fails, the directory is removed, earlier checkpoints stay as they are, and the failure comes out
        as a CheckpointError (other errors of this package and interrupts as they are). `pinned` ones are never pruned.
        """
        name = _name(step)
        aside = self._folder / f"{_WRITING}{name}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside
            _seal(aside, step, pinned)
            self._put_in_place(aside, name)
        except CheckpointError as error:
            raise CheckpointError(self._failure(name, error)) from error
        except WeaverRLError:
            raise
        except Exception as error:  # the boundary: what writes weights (torch, safetensors) may raise anything
            raise CheckpointError(self._failure(name, error)) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._prune(step)

    @contextlib.asynccontextmanager
    async def written(self, step: int) -> AsyncIterator[Path]:
        """`writing` for asyncio: hashing and fsync of many gigabytes are in a thread, the loop goes on meanwhile."""
        writing = self.writing(step)
        directory = await asyncio.to_thread(writing.__enter__)
        try:
            yield directory
        except BaseException as error:  # boundary: cleans up, then raises again
            if not await asyncio.to_thread(writing.__exit__, type(error), error, error.__traceback__):
                raise
        else:
            await asyncio.to_thread(writing.__exit__, None, None, None)

    def latest(self) -> Path | None:
        """The newest checkpoint whose files are as they were written; damaged ones are passed over with a warning."""
        for step in reversed(self.steps()):
            directory = self._folder / _name(step)
            damage = find_damage(directory)
            if damage is None:
                return directory
            self._warn(f"checkpoint {directory} is damaged ({damage}); trying the one before it")
        return None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, damaged or not, in order."""
        names = (_NAME.fullmatch(path.name) for path in self._folder.iterdir() if path.is_dir())
        return sorted(int(name[1]) for name in names if name)

    def truncate_after(self, step: int) -> None:
        """Removes checkpoints of later steps: a run resumed from `step` makes its own."""
        with _clear_errors(f"cannot remove checkpoints after step {step} in {self._folder}"):
            for later in (number for number in self.steps() if number > step):
                self._delete(self._folder / _name(later))

    def _put_in_place(self, aside: Path, name: str) -> None:
        target = self._folder / name
        replaced = self._folder / f"{_REPLACED}{name}"
        if target.exists():
            target.rename(replaced)
        aside.rename(target)
        fsync_directory(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _prune(self, newest: int) -> None:
        # Only up to `newest`, which was just written and is valid: a later one is a damaged one that the run fell back
        # from, and counting it would delete good ones in its favour.
        candidates = [step for step in self.steps() if step <= newest]
        for step in candidates[: -self._keep]:
            directory = self._folder / _name(step)
            try:
                if not _is_pinned(directory):
                    self._delete(directory)
            except OSError as error:
                self._warn(f"old checkpoint {directory} could not be removed: {_words(error)}")

    def _delete(self, directory: Path) -> None:
        # Renamed first, so that a kill in the middle never leaves something that looks like a checkpoint.
        doomed = directory.with_name(f"{_DELETING}{directory.name}")
        directory.rename(doomed)
        shutil.rmtree(doomed)

    def _remove_leftovers(self) -> None:
        for path in self._folder.glob(f"{_REPLACED}*"):
            original = self._folder / path.name.removeprefix(_REPLACED)
            if not original.exists():
                path.rename(original)
        for prefix in (_WRITING, _DELETING, _REPLACED):
            for path in self._folder.glob(f"{prefix}*"):
                shutil.rmtree(path)

    def _failure(self, name: str, error: Exception) -> str:
        free_mb = shutil.disk_usage(self._folder).free / 1e6
        earlier = ", ".join(_name(step) for step in self.steps()) or "none"
        return (
            f"checkpoint {name} could not be written in {self._folder}: {_words(error)} ({free_mb:,.0f} MB free). "
            f"Earlier checkpoints are untouched: {earlier}. If the disk is full, free some space or lower "
            f"`checkpoint.keep` (now {self._keep}), then continue with --resume"
        )


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file is there with its size and sha256."""
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
        for name, entry in files.items():
            if (size := (directory / name).stat().st_size) != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
        digests = _digests(directory, list(files))
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or a file cannot be read: {_words(error)}"
    wrong = [name for name, digest in digests.items() if digest != files[name]["sha256"]]
    return f"the content of {wrong[0]} has changed" if wrong else None


def save_controller_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Writes what the controller needs to go on (step, phase, data position, version, baselines...) as JSON.

    Floats come back bit for bit. Values that JSON has no form for are refused, NaN among them.
    """
    try:
        content = json.dumps(dict(state), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the controller's state cannot be written as JSON: {error}") from error
    (directory / CONTROLLER_STATE).write_text(content)


def load_controller_state(directory: Path) -> dict[str, Any]:
    path = directory / CONTROLLER_STATE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {_words(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds {type(state).__name__}; an object is expected")
    return state


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _words(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"


def _seal(directory: Path, step: int, pinned: bool) -> None:
    """Writes the manifest and makes everything durable. Only then may the directory get its name."""
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    if not names:
        raise CheckpointError(f"checkpoint {_name(step)} has no files")
    digests = _digests(directory, names)
    files = {name: {"size": (directory / name).stat().st_size, "sha256": digests[name]} for name in names}
    for name in names:
        _fsync_file(directory / name)
    for path in directory.rglob("*"):
        if path.is_dir():
            fsync_directory(path)
    manifest = {"step": step, "pinned": pinned, "files": files}
    write_atomically(directory / MANIFEST, json.dumps(manifest, indent=2))


def _digests(directory: Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with (directory / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _is_pinned(directory: Path) -> bool:
    try:
        return bool(json.loads((directory / MANIFEST).read_text()).get("pinned", False))
    except (OSError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def _clear_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {_words(error)}") from error
