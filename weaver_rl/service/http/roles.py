"""What the HTTP face asks of the service, as a Protocol: `weaver_rl.service.service.Service`, or a fake in tests.

All of it raises ServiceError; what does not exist and what is another owner's is the same 404.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from weaver_rl.service.calls import (
    LineupModel,
    NewModel,
    NewSamplingSession,
    NewSession,
    Page,
    SampleCall,
    TrainingCall,
)
from weaver_rl.service.records import (
    Artifact,
    Checkpoint,
    CheckpointKind,
    Model,
    Operation,
    SamplingSession,
    Session,
    SessionMetric,
)
from weaver_rl.service.results import Render
from weaver_rl.service.roles import PauseMode
from weaver_rl.types import AdamParams


class WeaverService(Protocol):
    """The first argument is always the name of the caller's API key."""

    def lineup(self) -> Sequence[LineupModel]: ...

    def health(self) -> Mapping[str, Any]: ...

    # -- sessions and models

    async def create_session(self, owner: str, new: NewSession, /) -> Session: ...

    async def session(self, owner: str, session_id: str, /) -> Session: ...

    async def heartbeat(self, owner: str, session_id: str, /) -> None: ...

    async def add_metrics(self, owner: str, session_id: str, metrics: Sequence[SessionMetric], /) -> None: ...

    async def create_model(self, owner: str, session_id: str, new: NewModel, /) -> Model: ...

    async def model(self, owner: str, model_id: str, /) -> Model: ...

    async def models(self, owner: str, limit: int, offset: int, /) -> Page[Model]: ...

    async def terminate_model(
        self, owner: str, model_id: str, /, *, trainer: bool = True, inference: bool = True
    ) -> Model: ...

    # -- operations of models; `seq_id` is the client's count, `digest` the SHA-256 of the request

    def receiving(self, owner: str, model_id: str, /) -> AbstractContextManager[None]:
        """A request body of the model is arriving: a gap in its seq_ids may close yet."""
        ...

    async def skip_seq(self, owner: str, model_id: str, seq_id: int, /) -> None:
        """That request was refused: it leaves no gap."""
        ...

    async def forward(self, owner: str, model_id: str, call: TrainingCall, render: Render, /) -> Operation: ...

    async def forward_backward(self, owner: str, model_id: str, call: TrainingCall, render: Render, /) -> Operation: ...

    async def optim_step(
        self, owner: str, model_id: str, seq_id: int, digest: str, params: AdamParams, render: Render, /
    ) -> Operation: ...

    async def export_sampler(
        self,
        owner: str,
        model_id: str,
        seq_id: int,
        digest: str,
        name: str | None,
        ttl_seconds: int | None,
        render: Render,
        /,
    ) -> Operation: ...

    async def save_checkpoint(
        self,
        owner: str,
        model_id: str,
        kind: CheckpointKind,
        name: str | None,
        ttl_seconds: int | None,
        render: Render,
        /,
    ) -> Operation: ...

    async def load_checkpoint(
        self, owner: str, model_id: str, path: str, include_optimizer: bool, render: Render, /
    ) -> Operation: ...

    async def export_hf(
        self, owner: str, model_id: str, merge_adapter: bool, ttl_seconds: int | None, render: Render, /
    ) -> Operation: ...

    async def export_checkpoint(
        self,
        owner: str,
        checkpoint_id: str,
        merge_adapter: bool,
        ttl_seconds: int | None,
        force: bool,
        render: Render,
        /,
    ) -> Operation | Artifact: ...

    async def operation(self, owner: str, operation_id: str, wait_s: float, /) -> Operation:
        """As it is when it ended, or after `wait_s`."""
        ...

    async def operation_attachment(self, owner: str, operation_id: str, /) -> bytes:
        """What the service's `Rendered.attachment` was; 404 where there is none."""
        ...

    def operations_in_flight(self, owner: str, /) -> int: ...

    # -- checkpoints and artifacts

    async def checkpoints(self, owner: str, model_id: str, /) -> Sequence[Checkpoint]: ...

    async def set_ttl(self, owner: str, model_id: str, path: str, ttl_seconds: int | None, /) -> Checkpoint: ...

    async def artifacts(self, owner: str, checkpoint_id: str, /) -> Sequence[Artifact]: ...

    async def artifact(self, owner: str, artifact_id: str, /) -> Artifact: ...

    async def artifact_file(self, artifact_id: str, name: str, /) -> Path:
        """For who holds a signed link."""
        ...

    # -- sampling

    async def create_sampling_session(
        self, owner: str, session_id: str, new: NewSamplingSession, /
    ) -> SamplingSession: ...

    async def sampling_session(self, owner: str, sampling_session_id: str, /) -> SamplingSession: ...

    async def delete_sampling_session(self, owner: str, sampling_session_id: str, /) -> None: ...

    async def sample(self, owner: str, sampling_session_id: str, call: SampleCall, render: Render, /) -> Operation: ...

    async def logprobs(
        self, owner: str, sampling_session_id: str, token_ids: Sequence[int], temperature: float, render: Render, /
    ) -> Operation: ...

    async def pause_generation(self, owner: str, sampling_session_id: str, mode: PauseMode, /) -> None: ...

    async def continue_generation(self, owner: str, sampling_session_id: str, /) -> None: ...
