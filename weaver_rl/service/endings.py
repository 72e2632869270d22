"""Ends of models: what waits is called off, what runs may end, then learner and engine are freed.

It goes on in the background, for what runs may take its time.

- `begin`  produces a task; it waits for the model's operations that run, then for learner and engine to let go.
"""

from __future__ import annotations

import asyncio
import logging

from weaver_rl.service.operations import Operations
from weaver_rl.service.roles import Learners, Samplers

log = logging.getLogger(__name__)


class Endings:
    """All ends that are under way."""

    def __init__(self, operations: Operations, learners: Learners, samplers: Samplers) -> None:
        self._operations = operations
        self._learners = learners
        self._samplers = samplers
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, model_id: str, *, trainer: bool = True, inference: bool = True) -> asyncio.Task[None]:
        """Frees the model's learner, its engine, or both."""
        task = asyncio.create_task(self._end(model_id, trainer, inference), name=f"end of model {model_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Leaves the rest to who ends all learners and engines."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _end(self, model_id: str, trainer: bool, inference: bool) -> None:
        try:
            if trainer:
                code = "model_terminated" if inference else "trainer_terminated"
                await self._operations.cancel_model(model_id, code, f"the trainer of model {model_id} was terminated")
                await self._learners.close(model_id)
            if inference:
                await self._samplers.close(model_id)
        except Exception:  # boundary of the task: nobody waits for it for certain
            log.exception("model %s could not be ended in good order", model_id)
