"""A run whose folder is at a URL: brought here, kept there, and looked at from anywhere. It trains nothing.

The run itself works in a staging folder of this machine and knows nothing of it; see `run_mirror` for what goes up.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from weaver_rl.errors import ConfigError, FilesError
from weaver_rl.lease import NAME as LEASE_FILE
from weaver_rl.lease import Lease, LeaseRecord, read_lease
from weaver_rl.models.resolve import SCRATCH_DIRECTORY
from weaver_rl.remote_folder import RemoteFolder
from weaver_rl.run_folder import RunFolder, refuse_both
from weaver_rl.run_location import is_url, staging_folder
from weaver_rl.run_mirror import (
    CHECKPOINTS,
    UNKNOWN,
    RunMirror,
    Stamp,
    download_checkpoint,
    download_run,
    folder_bytes,
)

STAGING_ID = ".staging_id"
LAST_UPLOAD_S = 900.0
"""For what is left when the run has ended; more for what takes longer at `SLOWEST_BYTES_PER_S`."""
SLOWEST_BYTES_PER_S = 5e6
NOT_FOR_READERS = ("checkpoints", "policy", SCRATCH_DIRECTORY)
_ROLLOUTS = re.compile(r"rollouts/step_(\d+)\.parquet")


@contextlib.contextmanager
def mirrored(
    place: Path | str,
    folder: RunFolder,
    *,
    resume: bool,
    overwrite: bool,
    keep: int,
    tell: Callable[[str], None],
    check: Callable[[], object] = lambda: None,
    in_peace: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[RunMirror | None]:
    """Where `place` is a URL: it is this run's for the length of the block, and has everything after it.

    The staging folder is gone then, unless its upload failed. For a path nothing happens.

    Args:
        keep: how many checkpoints stay at the URL.
        check: raises when the run, which is in the folder but for its checkpoint, must not be resumed. Nothing of the
            run was changed at the URL by then.
        in_peace: what the last upload is done in, so that no signal cuts it off.

    Raises:
        ConfigError: the URL cannot be used, is another run's, or holds a run and neither flag is given.
        FilesError: the block succeeded and the upload did not.
    """
    if not isinstance(place, str):
        yield None
        return
    refuse_both(resume=resume, overwrite=overwrite)
    remote = RemoteFolder(place)
    _refuse_claimed(folder)
    is_new = not folder.path.exists()
    lease = Lease(remote, _staging_id(folder.path))
    try:
        # All refusals that need no lease come before it: a holder that only seems to be dead would notice it.
        before = lease.find()
        sizes = remote.sizes()
        _refuse(remote, folder, before, sizes, resume, overwrite, check)
        lease.take(before)
    except BaseException as error:  # boundary: cleans up, then raises again
        if is_new:
            _forget(folder)
        if isinstance(error, FilesError):
            raise ConfigError(f"run_dir: {error}") from error
        raise
    if before is not None and not before.is_released:
        tell(f"{place} was held by process {before.pid} on {before.host}, which is dead or silent: taken over")
    try:
        sent, undone = _begin(remote, folder, before, sizes, resume, overwrite, tell, check)
        lease.begin(is_new_run=not resume)
        lease.remove(undone)
        mirror = RunMirror(folder, remote, lease, keep=keep, sent=sent, tell=tell)
        mirror.start()
    except BaseException:  # boundary: cleans up, then raises again
        with contextlib.suppress(FilesError):
            lease.release()
        if is_new:
            _forget(folder)
        raise
    failed = True
    try:
        yield mirror
        failed = False
    finally:
        with in_peace():
            _end(mirror, lease, place, folder, failed, tell)


def _end(
    mirror: RunMirror, lease: Lease, url: str, folder: RunFolder, failed: bool, tell: Callable[[str], None]
) -> None:
    mirror.tell = tell  # the run's own display is gone by now
    num_bytes = folder_bytes(folder.path)
    tell(f"bringing what is left to {url}; until that is done everything is in {folder.path}")
    try:
        mirror.close(LAST_UPLOAD_S + num_bytes / SLOWEST_BYTES_PER_S)
    except FilesError as error:
        if not failed:
            raise
        tell(str(error))  # the reason that the run failed for must not be hidden
        return
    if folder.is_claimed():
        tell(f"{folder.path} stays: another live run works in it")
    else:
        # Before the release: who has the lease next on this machine works in a folder of the same name.
        shutil.rmtree(folder.path, ignore_errors=True)
    try:
        lease.release()
    except FilesError as error:
        tell(f"everything is at {url}, but the claim could not be given up and ends by itself: {error}")


def _refuse(
    remote: RemoteFolder,
    folder: RunFolder,
    before: LeaseRecord | None,
    sizes: dict[str, int],
    resume: bool,
    overwrite: bool,
    check: Callable[[], object],
) -> None:
    """Raises ConfigError for a wish that does not fit what is in the staging folder and at the URL."""
    there = _is_run(sizes)
    if resume:
        if _goes_on_here(folder, before, there):
            check()
        elif not there:
            raise ConfigError(f"nothing to resume: {remote.url} holds no run. Leave out --resume to start one there")
    elif there and not overwrite:
        raise ConfigError(
            f"run_dir: {remote.url} already holds a run. Continue it with --resume, keep it by giving another "
            "`run_dir`, or replace it with --overwrite"
        )
    elif folder.holds_run() and not overwrite:
        raise ConfigError(
            f"run_dir: {folder.path} holds a run that was not uploaded to {remote.url}. Continue it with --resume, "
            "or replace it with --overwrite"
        )


def _is_run(sizes: dict[str, int]) -> bool:
    return "run.json" in sizes or "metrics.jsonl" in sizes


def _goes_on_here(folder: RunFolder, before: LeaseRecord | None, there: bool) -> bool:
    """Whether a run that is resumed has nothing at the URL that is not in the staging folder."""
    return folder.holds_run() and (before is None or before.staging == _staging_id(folder.path) or not there)


def _begin(
    remote: RemoteFolder,
    folder: RunFolder,
    before: LeaseRecord | None,
    sizes: dict[str, int],
    resume: bool,
    overwrite: bool,
    tell: Callable[[str], None],
    check: Callable[[], object],
) -> tuple[dict[str, Stamp], list[str]]:
    """Makes the staging folder ready; returns the files that are in both, and those to be removed at the URL."""
    if not resume:
        own = [name for name in sizes if folder.is_own(name) or name.split("/")[0] == SCRATCH_DIRECTORY]
        _clear(folder.path)
        # run.json last: what a crash leaves still says that it holds a run.
        return {}, sorted(own, key=lambda name: name == folder.status_file.name) if overwrite else []
    if _goes_on_here(folder, before, _is_run(sizes)):
        tell(f"{folder.path} has what was not uploaded to {remote.url}; the run goes on from there")
        # Not what only the URL has: it is from another machine, and of before this one went on.
        both = [name for name in sizes if name.split("/")[0] != CHECKPOINTS and (folder.path / name).is_file()]
        return dict.fromkeys(both, UNKNOWN), []
    if folder.holds_run():
        tell(f"{folder.path} is older than what another machine left at {remote.url}, and replaced by that")
    _clear(folder.path)
    try:
        return _bring(remote, folder, before, sizes, tell, check)
    except BaseException:  # boundary: cleans up, then raises again
        _clear(folder.path)  # a part of a run must not be taken for one
        raise


def _bring(
    remote: RemoteFolder,
    folder: RunFolder,
    before: LeaseRecord | None,
    sizes: dict[str, int],
    tell: Callable[[str], None],
    check: Callable[[], object],
) -> tuple[dict[str, Stamp], list[str]]:
    """Downloads what a run that goes on needs into an empty folder; returns what `_begin` does."""
    # What a run that goes on reads or appends to. Not the rollouts, which it only adds to.
    continued = (SCRATCH_DIRECTORY, folder.spans.name, folder.tracking.name)
    wanted = [name for name in sizes if name != LEASE_FILE and ("/" not in name or name.split("/")[0] in continued)]
    sent = download_run(remote, folder.path, wanted)
    check()
    step = download_checkpoint(remote, folder.path, sizes, tell)
    if before is not None and not before.is_released:
        tell(_what_is_missing(before, step))
    if step is None:
        return sent, []
    # The run makes these again: what is truncated here is not known to be there.
    return sent, [name for name in sizes if (match := _ROLLOUTS.fullmatch(name)) and int(match[1]) > step]


def _what_is_missing(before: LeaseRecord, step: int | None) -> str:
    """For who goes on from what a holder left that did not end: what that may have done besides."""
    if before.complete_at is None:
        upload = "no upload of it is known to be complete"
    else:
        upload = f"its last complete upload was {max(0.0, time.time() - before.complete_at):.0f} s ago"
    checkpoint = "no checkpoint is there" if step is None else f"the newest checkpoint there is of step {step}"
    return f"{upload}, and {checkpoint}; what it did since then is at most in its own folder on {before.host}"


def _refuse_claimed(folder: RunFolder) -> None:
    if folder.is_claimed():
        raise ConfigError(
            f"run_dir: {folder.path}, which this run would work in, is in use by a live run; wait for it, stop it, or "
            "give another `run_dir`"
        )


def _clear(staging: Path) -> None:
    """Empties the staging folder but for what says which one it is."""
    _refuse_claimed(RunFolder(staging))
    for path in staging.iterdir() if staging.is_dir() else ():
        if path.name not in (STAGING_ID, ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _forget(folder: RunFolder) -> None:
    """Removes a staging folder that was made for a run which then did not begin."""
    if not folder.holds_run() and not folder.is_claimed():
        shutil.rmtree(folder.path, ignore_errors=True)


def _staging_id(staging: Path) -> str:
    """Names this staging folder, and no other one anywhere."""
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), (staging / STAGING_ID).open("x") as file:
            file.write(uuid.uuid4().hex)
        return (staging / STAGING_ID).read_text()
    except OSError as error:
        raise ConfigError(
            f"run_dir: {staging}, which this run would work in, cannot be written ({error.strerror}); set "
            "XDG_CACHE_HOME to a directory with room for the run's checkpoints"
        ) from error


@contextlib.contextmanager
def run_to_read(run: str, *, small: bool = False, checkpoints: bool = False, live: bool = False) -> Iterator[Path]:
    """A run folder to look at, whether it is given as a path or as a URL, whose files are downloaded for that.

    A run that is live on this machine is given as it is.

    Args:
        small: without rollouts, spans and everything else in folders.
        checkpoints: with them.
        live: a copy will not do.
    """
    if not is_url(run):
        yield Path(run)
        return
    staging = RunFolder(staging_folder(run))
    if staging.is_claimed():
        yield staging.path
        return
    if live:
        raise ConfigError(f"no run of {run} is live on this machine; give this command on the machine of its driver")
    remote = RemoteFolder(run)
    sizes = remote.sizes()
    if "run.json" not in sizes:
        raise ConfigError(f"{run} holds no run")
    skipped = ("policy",) if checkpoints else NOT_FOR_READERS
    with tempfile.TemporaryDirectory(prefix="weaver-rl-run-") as name:
        folder = RunFolder(Path(name))
        wanted = [
            file
            for file in sizes
            if file != LEASE_FILE and ("/" not in file if small else file.split("/")[0] not in skipped)
        ]
        download_run(remote, folder.path, wanted)
        lease = read_lease(remote)
        with contextlib.ExitStack() as stack:
            if lease is not None and lease.is_held(time.time()):
                stack.enter_context(folder.held())
            yield folder.path
