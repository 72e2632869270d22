"""The directory of a server's state: what lies where, and that one server has it. It does not know what files hold.

    weaver.sqlite     the database, unless another is configured
    checkpoints/ID/   saved weights
    artifacts/ID/     exports to download
    logs/             of the cluster

No text of a client becomes part of a path, but for the name of a file of an artifact: that must be one that is there.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from weaver_rl.errors import ConfigError, ServiceError
from weaver_rl.service.directories import Directories, manifest_of
from weaver_rl.service.exclusive_lock import ExclusiveLock
from weaver_rl.service.records import ArtifactFile


class StateFiles:
    """The state directory, held by this process until `close`. A context manager, which closes it.

    Raises:
        ConfigError: it cannot be written, or another server has it.

    Example:
        with StateFiles(Path("/data/weaver_state")) as files:
            async with files.writing(checkpoint_id) as directory:
                await learner.save_state(directory)
    """

    def __init__(self, state_dir: Path) -> None:
        """Makes what is not there, and removes what a killed server left half-written."""
        self.path = state_dir.absolute()
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self._lock = ExclusiveLock(self.path / ".lock", f"state_dir {self.path}")
            with contextlib.ExitStack() as undo:
                undo.callback(self._lock.release)
                self._checkpoints = Directories(self.path / "checkpoints", "checkpoint")
                self._artifacts = Directories(self.path / "artifacts", "artifact")
                undo.pop_all()
        except OSError as error:
            raise ConfigError(f"state_dir {self.path} cannot be used: {error.strerror}; give another") from error

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def database_url(self) -> str:
        """Of the database in it, for `Store.open`."""
        return f"sqlite:///{self.path / 'weaver.sqlite'}"

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def checkpoint_dir(self, checkpoint_id: str) -> Path:
        """Absolute. Raises ValueError for what is no id of ours."""
        return self._checkpoints.path(checkpoint_id)

    def writing(self, checkpoint_id: str) -> contextlib.AbstractAsyncContextManager[Path]:
        """A new checkpoint; see `Directories.writing`."""
        return self._checkpoints.writing(checkpoint_id)

    async def remove_checkpoint(self, checkpoint_id: str) -> None:
        """Only of one that `Store.claim_unused_checkpoints` gave: no sampling session needs it then."""
        await self._checkpoints.remove(checkpoint_id)

    # -- artifacts -------------------------------------------------------------------------------------------------

    def artifact_dir(self, artifact_id: str) -> Path:
        """Absolute. Raises ValueError for what is no id of ours."""
        return self._artifacts.path(artifact_id)

    def writing_artifact(self, artifact_id: str) -> contextlib.AbstractAsyncContextManager[Path]:
        """A new artifact; see `Directories.writing`."""
        return self._artifacts.writing(artifact_id)

    async def manifest(self, directory: Path) -> tuple[ArtifactFile, ...]:
        """Every file in it, with size and SHA-256. Raises CheckpointError when one cannot be read."""
        return await manifest_of(directory)

    def artifact_file(self, artifact_id: str, name: str) -> Path:
        """A file of an artifact, by its name in the manifest. It looks at the disk, for microseconds.

        Raises:
            ServiceError: 404 `not_found`; there is no regular file of that name inside the artifact.
        """
        parts = PurePosixPath(name).parts
        # The absolute, and everything that can be written shorter, is not what its parts give.
        is_plain = bool(parts) and "/".join(parts) == name and ".." not in parts
        if is_plain and "\x00" not in name:
            with contextlib.suppress(OSError, ValueError):
                directory = self.artifact_dir(artifact_id)
                path = directory.joinpath(*parts)
                # A link may lead anywhere; `resolve` follows those of every part.
                inside = path.resolve(strict=True).is_relative_to(directory.resolve())
                if inside and stat.S_ISREG(path.lstat().st_mode):
                    return path
        raise ServiceError("not_found", f"artifact {artifact_id} has no file {name[:200]!a}", status=404)

    async def remove_artifact(self, artifact_id: str) -> None:
        """Only of one that `Store.claim_unused_artifacts` gave."""
        await self._artifacts.remove(artifact_id)

    # -- both ------------------------------------------------------------------------------------------------------

    async def sweep(self, *, checkpoint_ids: Collection[str], artifact_ids: Collection[str]) -> int:
        """At the start of a server: removes the directories that an earlier one left and that are not among these.

        Those to keep come from `Store.checkpoint_ids_with_files` and `Store.artifact_ids_with_files`. How many went.
        """
        num_checkpoints = await self._checkpoints.sweep(checkpoint_ids)
        return num_checkpoints + await self._artifacts.sweep(artifact_ids)
