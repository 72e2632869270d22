"""Saved weights: checkpoints of models, what samplers load of them, and artifacts to download. It trains nothing."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

from weaver_rl.errors import ServiceError
from weaver_rl.service.records import Artifact, ArtifactFile, ArtifactKind, Checkpoint, CheckpointKind, Model
from weaver_rl.service.state_files import StateFiles
from weaver_rl.service.store import Store
from weaver_rl.service.weaver_paths import check_name, parse_checkpoint_path

WEIGHTS = "weights"
"""Where a learner's state has its weights, see weaver_rl/learner/state.py."""

ADAPTER_CONFIG = "adapter_config.json"

Write = Callable[[Path], Awaitable[None]]


class Weights:
    """Checkpoints and artifacts of all models.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, store: Store, files: StateFiles, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._files = files
        self._clock = clock

    # -- checkpoints -----------------------------------------------------------------------------------------------

    async def check_free(self, model: Model, name: str, kind: CheckpointKind) -> None:
        """Refuses a name that another checkpoint has. An export for samplers replaces one of its own name."""
        check_name(name)
        taken = await self._store.checkpoint_named(model.owner, model.id, name)
        if taken is not None and not (taken.kind == kind == "sampling"):
            raise ServiceError(
                "name_taken",
                f"model {model.id} has a {taken.kind} checkpoint {name!r} already; choose another name",
                status=409,
            )

    async def save(
        self, model: Model, *, name: str, kind: CheckpointKind, ttl_seconds: int | None, write: Write
    ) -> Checkpoint:
        """A checkpoint whose files `write` makes. It is listed when it is complete and on disk, or never."""
        checkpoint_id = str(uuid.uuid4())
        async with self._files.writing(checkpoint_id) as directory:
            await write(directory)
        now = self._clock()
        checkpoint = Checkpoint(
            id=checkpoint_id,
            owner=model.owner,
            model_id=model.id,
            name=name,
            kind=kind,
            base_model=model.base_model,
            training_mode=model.training_mode,
            lora=model.lora,
            num_steps=model.num_steps,
            created_at=now,
            ttl_seconds=ttl_seconds,
            expires_at=None if ttl_seconds is None else now + ttl_seconds,
        )
        try:
            return await self._store.add_checkpoint(checkpoint)
        except ServiceError:
            await self._files.remove_checkpoint(checkpoint_id)
            raise

    async def checkpoints(self, owner: str, model_id: str) -> tuple[Checkpoint, ...]:
        """Those that have not expired, newest first."""
        return await self._store.checkpoints(owner, model_id)

    async def checkpoint(self, owner: str, checkpoint_id: str) -> Checkpoint:
        """By id. Raises ServiceError 404."""
        found = await self._store.checkpoint(owner, checkpoint_id)
        if found is None or found.status == "deleted":
            raise ServiceError("not_found", f"there is no checkpoint {checkpoint_id}, or it has expired", status=404)
        return found

    async def at_path(self, owner: str, path: str) -> Checkpoint:
        """By its `weaver://` name. Raises ServiceError 400 for another form, 404 for what is not there."""
        place = parse_checkpoint_path(path)
        found = await self._store.checkpoint_named(owner, place.model_id, place.name)
        if found is None:
            raise ServiceError("not_found", f"there is no checkpoint {path}, or it has expired", status=404)
        return found

    async def set_ttl(self, owner: str, model_id: str, path: str, ttl_seconds: int | None) -> Checkpoint:
        """Counts from now; None: permanent."""
        checkpoint = await self.at_path(owner, path)
        if checkpoint.model_id != model_id:
            raise ServiceError("not_found", f"model {model_id} has no checkpoint {path}", status=404)
        expires_at = None if ttl_seconds is None else self._clock() + ttl_seconds
        changed = await self._store.set_checkpoint_ttl(checkpoint.id, ttl_seconds, expires_at)
        if changed is None:
            raise ServiceError("not_found", f"checkpoint {path} has just expired or was replaced", status=404)
        return changed

    def state_directory(self, checkpoint: Checkpoint) -> Path:
        """What a learner loads of it. Raises ServiceError for one that is for samplers only."""
        if checkpoint.kind == "sampling":
            raise ServiceError(
                "invalid_request",
                f"{checkpoint.path} was saved for sampling and holds no training state; load one of type weight or "
                "weight_and_optimizer",
            )
        return self._files.checkpoint_dir(checkpoint.id)

    def sampler_directory(self, checkpoint: Checkpoint) -> Path:
        """What an engine loads of it: every kind has that."""
        directory = self._files.checkpoint_dir(checkpoint.id)
        return directory if checkpoint.kind == "sampling" else directory / WEIGHTS

    # -- artifacts -------------------------------------------------------------------------------------------------

    async def finished_artifact(self, checkpoint: Checkpoint, kind: ArtifactKind) -> Artifact | None:
        """The artifact of this kind that is ready, if there is one."""
        found = await self._store.artifacts(checkpoint.owner, checkpoint.id)
        return next((a for a in found if a.kind == kind and a.status == "completed"), None)

    async def make_artifact(
        self, checkpoint: Checkpoint, kind: ArtifactKind, ttl_seconds: int | None, write: Write
    ) -> Artifact:
        """An artifact whose files `write` makes; one of the same kind that was there before is gone then."""
        artifact_id = str(uuid.uuid4())
        async with self._files.writing_artifact(artifact_id) as directory:
            await write(directory)
            await asyncio.to_thread(_name_base, directory, checkpoint.base_model)
        files: tuple[ArtifactFile, ...] = await self._files.manifest(self._files.artifact_dir(artifact_id))
        now = self._clock()
        artifact = Artifact(
            id=artifact_id,
            owner=checkpoint.owner,
            checkpoint_id=checkpoint.id,
            model_id=checkpoint.model_id,
            checkpoint_name=checkpoint.name,
            kind=kind,
            created_at=now,
            updated_at=now,
            status="completed",
            files=files,
            ttl_seconds=ttl_seconds,
            expires_at=None if ttl_seconds is None else now + ttl_seconds,
        )
        try:
            return await self._store.add_artifact(artifact)
        except ServiceError:
            await self._files.remove_artifact(artifact_id)
            raise

    async def artifacts(self, owner: str, checkpoint_id: str) -> tuple[Artifact, ...]:
        """Of a checkpoint, which may be gone already: artifacts live on their own."""
        found = await self._store.artifacts(owner, checkpoint_id)
        if not found:
            await self.checkpoint(owner, checkpoint_id)
        return found

    async def artifact(self, owner: str, artifact_id: str) -> Artifact:
        """By id. Raises ServiceError 404."""
        found = await self._store.artifact(owner, artifact_id)
        if found is None or found.status != "completed":
            raise ServiceError("not_found", f"there is no artifact {artifact_id}, or it has expired", status=404)
        return found

    async def artifact_file(self, artifact_id: str, name: str) -> Path:
        """One of its files, for who holds a download link. Raises ServiceError 404."""
        if await self._store.downloadable_artifact(artifact_id) is None:
            raise ServiceError("not_found", f"there is no artifact {artifact_id}, or it has expired", status=404)
        return self._files.artifact_file(artifact_id, name)


def _name_base(directory: Path, base_model: str) -> None:
    """What is downloaded names its base as clients know it, not by a path of this machine."""
    path = directory / ADAPTER_CONFIG
    if path.is_file():
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"base_model_name_or_path": base_model}, indent=2) + "\n")
