"""Whether the run folder can be written, holds no other run, and has room for what a run leaves."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from weaver_rl.check.finding import Finding, failed, passed, warned
from weaver_rl.check.given import NotCheckedError
from weaver_rl.check.memory import checkpoint_bytes
from weaver_rl.check.subject import RunUnderCheck
from weaver_rl.config import RunConfig
from weaver_rl.errors import WeaverRLError
from weaver_rl.lease import read_lease
from weaver_rl.models.config import ScratchModel
from weaver_rl.remote_folder import RemoteFolder
from weaver_rl.run_folder import RunFolder

PROBE = ".weaver-rl-check"
"""A file that is written to a URL and removed again."""
ROLLOUT_BYTES_PER_TOKEN = 20
"""Of a rollouts file: token, two log-probabilities, version, weights. Text and journal are less."""
MUCH_SHARE = 0.8
"""Of what is free: beyond it, a run beside this one fills the disk."""


def check_run_space(run: RunUnderCheck) -> Iterator[Finding]:
    """The folder itself, or the URL that it is mirrored to, and the disk of the driver's machine."""
    place, path = run.config.place, run.config.folder.absolute()
    if isinstance(place, str):
        yield _url(place)
    elif run.on_head:
        yield _folder_on_head(place)
    else:
        yield from _folder(path)
    yield from _space(run, path)


def _folder(path: Path) -> Iterator[Finding]:
    folder = RunFolder(path)
    if problem := why_not_writable(path):
        yield failed("run_dir", problem, "give another run_dir")
        return
    if folder.is_claimed():
        yield failed("run_dir", f"{path} is in use by a live run", "wait for it, stop it, or give another run_dir")
    elif folder.holds_run():
        status = folder.read_status()
        how = f"{status.state}, last step {status.last_step}" if status else "of unknown state"
        yield warned(
            "run_dir",
            f"{path} already holds a run ({how})",
            "train with --resume or --overwrite, or give another run_dir",
        )
    else:
        yield passed("run_dir", f"{path} can be written and holds no run")


def _folder_on_head(place: Path) -> Finding:
    if not place.is_absolute():
        return failed(
            "run_dir",
            f"{place} is relative: in a job it would be lost with a temporary directory of the head",
            "give a path on storage that the cluster keeps, or a URL",
        )
    return warned(
        "run_dir",
        f"{place} on the cluster's head, which cannot be looked at by HTTP",
        "see there that it can be written and holds no run",
    )


def existing_parent(path: Path) -> Path:
    """The directory itself, or the nearest one above it that is there."""
    return next(place for place in (path, *path.parents) if place.is_dir())


def why_not_writable(path: Path) -> str | None:
    """Why the directory could not be made or written, or None; nothing is left of the attempt."""
    if path.exists() and not path.is_dir():
        return f"{path} is a file, no directory"
    parent = existing_parent(path)
    try:
        with tempfile.TemporaryFile(dir=parent):
            return None
    except OSError as error:
        return f"{parent} cannot be written ({error.strerror})"


def _space(run: RunUnderCheck, path: Path) -> Iterator[Finding]:
    try:
        shape = run.shape.needed()
    except NotCheckedError as error:
        raise NotCheckedError(f"room for checkpoints: {error}") from None
    config = run.config
    one = checkpoint_bytes(shape)
    # Written beside those that are kept, before the oldest goes.
    checkpoints = one * (config.checkpoint.keep + 1)
    policies = 4 * shape.num_parameters * (2 if isinstance(config.model, ScratchModel) else 1)
    rollouts = rollout_bytes(config)
    needed = checkpoints + policies + rollouts
    room = (
        f"at most {_size(needed)} needed: {config.checkpoint.keep} + 1 checkpoints of {_size(one)} (float32 weights "
        f"and two moments), policy {_size(policies)}, rollouts {_size(rollouts)}"
    )
    if run.on_head:
        seen = f"of the cluster's head, which cannot be looked at by HTTP; {room}"
        yield warned("disk", seen, "see there that so much is free")
        return
    free = shutil.disk_usage(existing_parent(path)).free
    seen = f"{_size(free)} free; {room}"
    if needed > free:
        yield failed("disk", seen, "free some, lower checkpoint.keep, or give a run_dir on a larger disk")
    elif needed > MUCH_SHARE * free:
        yield warned("disk", seen, "free some, or see that nothing else is written there meanwhile")
    else:
        yield passed("disk", seen)


def rollout_bytes(config: RunConfig) -> int:
    """Every completion at its longest, prompts as long again."""
    evaluations = 2 + (config.num_steps // config.eval.every if config.eval.every else 0)
    completions = (
        config.num_steps * config.rollout.prompts_per_step * config.rollout.samples_per_prompt
        + evaluations * config.eval.num_prompts
    )
    return completions * 2 * config.rollout.sampling.max_tokens * ROLLOUT_BYTES_PER_TOKEN


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"


def _url(url: str) -> Finding:
    advice = "correct the URL, or the credentials in the environment"
    try:
        remote = RemoteFolder(url)
        lease, now = read_lease(remote), time.time()
        if lease is not None and lease.is_held(now):
            seen = f"{url} is in use by a live run ({lease.who(now)})"
            advice = "wait for it, stop it, or give another run_dir; what was killed can be taken over after 90 s"
            return failed("run_dir", seen, advice)
        remote.try_write(PROBE)
        holds_run = remote.read(RunFolder(Path()).status_file.name) is not None
    except WeaverRLError as error:
        return failed("run_dir", str(error), advice)
    if holds_run:
        return warned(
            "run_dir", f"{url} already holds a run", "train with --resume or --overwrite, or give another run_dir"
        )
    return passed("run_dir", f"{url} can be written and holds no run")
