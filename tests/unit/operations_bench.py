"""Operations on a virtual clock over a store in memory, for tests: what is asked, what ran, and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from weaver_rl.errors import ServiceError
from weaver_rl.plan.virtual_loop import run_virtually
from weaver_rl.service.config import OperationsConfig
from weaver_rl.service.operation_work import Run
from weaver_rl.service.operations import Operations
from weaver_rl.service.records import Model, Operation, OperationKind
from weaver_rl.service.results import Rendered

OWNER = "team-a"
WAIT_S = 5.0
LONG_S = 1e6


class FakeStore:
    """Rows in memory, each committed after `commit_s()`. `broken` makes it raise."""

    def __init__(self, commit_s: Callable[[], float] = lambda: 0.0) -> None:
        self.rows: dict[str, Operation] = {}
        self.known_models: dict[str, Model] = {}
        self.commit_s = commit_s
        self.broken: ServiceError | None = None

    async def _commit(self) -> None:
        await asyncio.sleep(self.commit_s())
        if self.broken is not None:
            raise self.broken

    async def add_operation(self, operation: Operation) -> Operation:
        await self._commit()
        known = self._at(operation.model_id, operation.seq_id)
        if known is None:
            self.rows[operation.id] = operation
        return known or operation

    async def finish_operation(self, ended: Operation) -> bool:
        await self._commit()
        assert ended.ended
        assert not self.rows[ended.id].ended
        self.rows[ended.id] = ended
        return True

    async def operation(self, owner: str, operation_id: str) -> Operation | None:
        await asyncio.sleep(0)
        found = self.rows.get(operation_id)
        return replace(found, attachment=None) if found is not None and found.owner == owner else None

    async def operation_attachment(self, owner: str, operation_id: str) -> bytes | None:
        await asyncio.sleep(0)
        found = self.rows.get(operation_id)
        return found.attachment if found is not None and found.owner == owner else None

    async def operation_at(self, model_id: str, seq_id: int) -> Operation | None:
        await asyncio.sleep(0)
        return self._at(model_id, seq_id)

    async def model(self, owner: str, model_id: str) -> Model | None:
        await asyncio.sleep(0)
        found = self.known_models.get(model_id)
        return found if found is not None and found.owner == owner else None

    def _at(self, model_id: str | None, seq_id: int | None) -> Operation | None:
        if seq_id is None:
            return None
        return next((row for row in self.rows.values() if (row.model_id, row.seq_id) == (model_id, seq_id)), None)


@dataclass
class Bench:
    """Operations over a fake store with models "m" and "n", and a protocol of what ran."""

    config: OperationsConfig = field(default_factory=lambda: OperationsConfig(reorder_wait_s=WAIT_S))
    store: FakeStore = field(default_factory=FakeStore)
    ran: list[str] = field(default_factory=list)
    at_work: int = 0
    last_seq_id: int = 0

    def __post_init__(self) -> None:
        for model_id in ("m", "n"):
            self.add_model(model_id, self.last_seq_id)
        self.operations = Operations(self.store, self.config, clock=self.now)
        self._num_made = 0

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def add_model(self, model_id: str, last_seq_id: int = 0) -> None:
        self.store.known_models[model_id] = Model(
            id=model_id,
            owner=OWNER,
            session_id="s",
            model_seq_id=1,
            base_model="base",
            training_mode="lora",
            lora=None,
            max_length=8,
            created_at=0.0,
            updated_at=0.0,
            last_seq_id=last_seq_id,
        )

    def operation(
        self,
        seq_id: int | None = None,
        *,
        model_id: str | None = "m",
        digest: str | None = None,
        kind: OperationKind | None = None,
    ) -> Operation:
        self._num_made += 1
        default: OperationKind = "sample" if model_id is None else "save" if seq_id is None else "forward_backward"
        return Operation(
            id=f"op-{self._num_made}",
            owner=OWNER,
            kind=kind or default,
            created_at=self.now(),
            model_id=model_id,
            seq_id=seq_id,
            digest=None if seq_id is None else digest or f"digest of {seq_id}",
        )

    def run(
        self, name: str, seconds: float = 1.0, error: BaseException | None = None, attachment: bytes | None = None
    ) -> Run:
        async def work() -> bytes | Rendered:
            self.ran.append(name)
            await asyncio.sleep(seconds)
            if error is not None:
                raise error
            response = name.encode()
            return response if attachment is None else Rendered(response=response, attachment=attachment)

        return work

    async def submit(self, seq_id: int | None = None, *, name: str | None = None, **more: Any) -> Operation:
        of_run = {key: more.pop(key) for key in ("seconds", "error", "attachment") if key in more}
        operation = self.operation(seq_id, **more)
        return await self.operations.submit(operation, self.run(name or str(seq_id), **of_run))

    async def end(self, operation: Operation, timeout_s: float = LONG_S) -> Operation:
        return await self.operations.wait(OWNER, operation.id, timeout_s)


def virtually(scenario: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await scenario()

    run_virtually(run())


def refused(error: pytest.ExceptionInfo[ServiceError]) -> tuple[str, int, bool]:
    return error.value.code, error.value.status, error.value.retryable
