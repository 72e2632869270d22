"""A model in its learner, and what the database says of it: `fresh`, `trained` or `lost`. It knows no operation.

The one rule: a model whose weights are gone never comes back untrained without a word.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from weaver_rl.errors import BatchError, CallFailedError, CheckpointError, ConfigError, LearnerLostError, ServiceError
from weaver_rl.service.records import Model, TrainingState
from weaver_rl.service.roles import Learners, ModelLearner
from weaver_rl.service.store import Store
from weaver_rl.service.weights import Weights

UNDONE = (BatchError, ConfigError, CheckpointError, CallFailedError)
"""Errors of a learner that lives, after which a model is as before the call, its gradients apart (dropped or kept)."""
RECORD_TRIES = 5
PAUSE_BETWEEN_TRIES_S = 1.0

log = logging.getLogger(__name__)


class ModelStates:
    """All models.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(
        self, store: Store, learners: Learners, weights: Weights, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._learners = learners
        self._weights = weights
        self._clock = clock

    async def current(self, model: Model) -> Model:
        """As it is now, when an operation runs. Raises ServiceError when it was terminated."""
        found = await self._store.model(model.owner, model.id)
        if found is None or found.status != "active":
            raise ServiceError("model_terminated", f"model {model.id} was terminated", status=409)
        return found

    @asynccontextmanager
    async def in_learner(
        self, created: Model, *, changes: bool = False, reloads: bool = False
    ) -> AsyncIterator[ModelLearner]:
        """The model in its learner, for one operation.

        Args:
            changes: the operation makes more of the model than it was created or loaded as.
            reloads: it gives the model new weights, so it may have lost its own.

        Raises:
            ServiceError: `model_state_lost`, or `learner_lost` when the learner died under the operation.
        """
        model = await self._as_it_is(await self.current(created))
        if model.training_state == "lost" and not reloads:
            raise await self._lost_error(model)
        try:
            learner = self._learners.get(model.id)
            if learner is None:
                learner = await self._learners.open(model.id, model.base_model, model.training_mode, model.lora)
            if changes and model.training_state == "fresh":
                # Before the effect: a server killed in between must not take it for untouched.
                await self._set(model, "trained")
            yield learner
        except UNDONE:
            if changes and model.training_state == "fresh":
                await self._set(model, "fresh")
            raise
        except LearnerLostError as error:
            raise await self._after_loss(model, error) from error

    async def record(self, model: Model, *, num_steps: int, training_state: TrainingState = "trained") -> None:
        """What an operation did to the model; it is done, so this is tried until the database takes it.

        Raises:
            ServiceError: it never did; not retryable, for the operation had its effect.
        """
        for left in reversed(range(RECORD_TRIES)):
            try:
                await self._store.update_model(
                    model.id, updated_at=self._clock(), num_steps=num_steps, training_state=training_state
                )
            except ServiceError as error:
                log.warning("model %s: %s", model.id, error)
                if not left:
                    raise ServiceError(
                        "not_recorded",
                        f"the operation was applied, but recording it failed: {error.message}. The model's step count "
                        "is one too low from here on",
                        status=503,
                    ) from error
            else:
                return
            await asyncio.sleep(PAUSE_BETWEEN_TRIES_S)

    async def _as_it_is(self, model: Model) -> Model:
        """A trained model that is in no learner is lost, whatever the database says; it is told first of all."""
        if model.training_state == "trained" and self._learners.get(model.id) is None:
            return await self._set(model, "lost")
        return model

    async def _set(self, model: Model, state: TrainingState) -> Model:
        changed = await self._store.update_model(model.id, updated_at=self._clock(), training_state=state)
        assert changed is not None
        return changed

    async def _after_loss(self, model: Model, error: LearnerLostError) -> ServiceError:
        if model.training_state == "fresh":
            await self._set(model, "fresh")
            hint = "Nothing of the model was lost, it can be made again as it was: call it again."
        else:
            await self._set(model, "lost")
            hint = await self._advice(model)
        return ServiceError("learner_lost", f"{error}. {hint}", status=503, retryable=model.training_state == "fresh")

    async def _lost_error(self, model: Model) -> ServiceError:
        return ServiceError(
            "model_state_lost",
            "the weights that this model was trained to were lost with its learner or with a restart of the server. "
            + await self._advice(model),
            status=409,
        )

    async def _advice(self, model: Model) -> str:
        saved = [c for c in await self._weights.checkpoints(model.owner, model.id) if c.kind != "sampling"]
        if not saved:
            return "It has no checkpoint to load: create a new model."
        newest = max(saved, key=lambda checkpoint: checkpoint.created_at)
        return f"Load a checkpoint to go on; the newest is {newest.path} (after {newest.num_steps} steps)."
