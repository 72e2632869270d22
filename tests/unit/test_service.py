"""The service with fakes for learners and engines, everything else real: database, files, order of operations."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cluster import FakeLearners, FakeSamplers

from weaver_rl.errors import CheckpointError, EngineLostError, ServiceError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.service.calls import LineupModel, NewModel, NewSamplingSession, NewSession, SampleCall, TrainingCall
from weaver_rl.service.config import ServeConfig
from weaver_rl.service.loss_functions import RawDatum, resolve_loss
from weaver_rl.service.operations import Operations
from weaver_rl.service.records import LoraParams, Model, Operation, SamplingSession
from weaver_rl.service.results import (
    ArtifactResult,
    CheckpointResult,
    LogprobsResult,
    OptimResult,
    Result,
    SampleResult,
    TrainingResult,
)
from weaver_rl.service.service import Service
from weaver_rl.service.state_files import StateFiles
from weaver_rl.service.store import Store
from weaver_rl.types import AdamParams

pytestmark = pytest.mark.unit

ANNE, BEN = "anne", "ben"
LINEUP = {
    "tiny": LineupModel(
        name="tiny",
        training_modes=("lora", "full_ft"),
        max_length=32,
        tokenizer_path="/models/tiny",
        max_lora_rank=32,
        vocab_size=100,
    )
}


def config(**changes: Any) -> ServeConfig:
    values: dict[str, Any] = {
        "models": [{"name": "tiny", "model": {"name": "some/directory"}}],
        "operations": {"reorder_wait_s": 0.05},
    }
    return ServeConfig.model_validate(values | changes)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Server:
    """A running service and what it is made of."""

    def __init__(self, service: Service, store: Store, learners: FakeLearners, samplers: FakeSamplers) -> None:
        self.service = service
        self.store = store
        self.learners = learners
        self.samplers = samplers
        self.seq_ids: dict[str, int] = {}

    async def model(self, owner: str = ANNE, **changes: Any) -> Model:
        session = await self.service.create_session(owner, NewSession())
        return await self.service.create_model(
            owner, session.id, NewModel(model_seq_id=1, base_model="tiny", **changes)
        )

    def next_seq(self, model: Model) -> int:
        self.seq_ids[model.id] = self.seq_ids.get(model.id, 0) + 1
        return self.seq_ids[model.id]

    async def ended(self, operation: Operation) -> dict[str, Any]:
        operation = await self.service.operation(operation.owner, operation.id, 10.0)
        assert operation.ended
        if operation.status == "error":
            assert operation.error_code is not None
            raise ServiceError(operation.error_code, str(operation.error_message), retryable=operation.retryable)
        assert operation.response is not None
        answer: dict[str, Any] = json.loads(operation.response)
        return answer

    async def forward_backward(self, model: Model, num_data: int = 1) -> dict[str, Any]:
        call = training_call(self.next_seq(model), num_data)
        return await self.ended(await self.service.forward_backward(model.owner, model.id, call, render))

    async def forward(self, model: Model) -> float:
        call = training_call(self.next_seq(model))
        answer = await self.ended(await self.service.forward(model.owner, model.id, call, render))
        return float(answer["logprobs"])

    async def step(self, model: Model, rate: float = 0.5) -> dict[str, Any]:
        await self.forward_backward(model)
        seq_id = self.next_seq(model)
        params = AdamParams(learning_rate=rate)
        operation = await self.service.optim_step(model.owner, model.id, seq_id, f"step {seq_id}", params, render)
        return await self.ended(operation)

    async def export(self, model: Model, name: str | None = None, ttl_seconds: int | None = 3600) -> str:
        seq_id = self.next_seq(model)
        operation = await self.service.export_sampler(
            model.owner, model.id, seq_id, f"export {seq_id}", name, ttl_seconds, render
        )
        return str((await self.ended(operation))["path"])

    async def save(self, model: Model, name: str | None = None, kind: Any = "weight_and_optimizer") -> str:
        operation = await self.service.save_checkpoint(model.owner, model.id, kind, name, None, render)
        return str((await self.ended(operation))["path"])

    async def load(self, model: Model, path: str, with_optimizer: bool = True) -> None:
        await self.ended(await self.service.load_checkpoint(model.owner, model.id, path, with_optimizer, render))

    async def sampler(self, owner: str, path: str | None, seq_id: int = 1) -> SamplingSession:
        session = await self.service.create_session(owner, NewSession())
        new = NewSamplingSession(seq_id=seq_id, base_model="tiny" if path is None else None, path=path)
        return await self.service.create_sampling_session(owner, session.id, new)

    async def sample(self, session: SamplingSession) -> str:
        call = SampleCall(token_ids=(1, 2), num_samples=1, sampling=SamplingConfig(), max_tokens=3)
        operation = await self.service.sample(session.owner, session.id, call, render)
        return str((await self.ended(operation))["text"])


def render(result: Result) -> bytes:
    """What tests look at."""
    answer: dict[str, Any] = {}
    match result:
        case TrainingResult():
            answer = {"logprobs": float(result.logprobs_per_datum[0][0]), "metrics": dict(result.metrics)}
        case OptimResult():
            answer = {"num_steps": result.num_steps}
        case CheckpointResult():
            answer = {"path": result.checkpoint.path, "id": result.checkpoint.id}
        case ArtifactResult():
            answer = {"id": result.artifact.id, "kind": result.artifact.kind, "files": len(result.artifact.files)}
        case SampleResult():
            answer = {"text": result.group.texts_G[0], "version": result.weight_version}
        case LogprobsResult():
            answer = {"logprobs": [None if np.isnan(value) else float(value) for value in result.prompt.logprobs_P]}
        case _:
            answer = {"path": result.path}
    return json.dumps(answer).encode()


def training_call(seq_id: int, num_data: int = 1, token: int = 5, length: int = 3) -> TrainingCall:
    raw = RawDatum(
        datum_id=None,
        token_ids_N=np.full(length, token, np.int64),
        inputs={"target_tokens": np.full(length, 6, np.int64), "weights": np.ones(length, np.float32)},
    )
    request = resolve_loss("cross_entropy", {}, [raw] * num_data, backward=True)
    return TrainingCall(
        seq_id=seq_id, digest=f"{seq_id} {num_data} {token}", datum_ids=(None,) * num_data, request=request
    )


@asynccontextmanager
async def serving(
    state_dir: Path,
    clock: Callable[[], float] | None = None,
    learners: FakeLearners | None = None,
    **changes: Any,
) -> AsyncIterator[Server]:
    settings = config(**changes)
    times = clock or Clock()
    learners, samplers = learners or FakeLearners(), FakeSamplers()
    with StateFiles(state_dir) as files:
        async with (
            Store.opened(files.database_url, clock=times) as store,
            Operations(store, settings.operations, times) as operations,
            Service(
                config=settings,
                store=store,
                operations=operations,
                files=files,
                learners=learners,
                samplers=samplers,
                lineup=LINEUP,
                clock=times,
            ) as service,
        ):
            yield Server(service, store, learners, samplers)


def test_training_moves_only_the_model_that_is_trained(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            first, second = await server.model(), await server.model()
            await server.step(first)
            assert (await server.step(first))["num_steps"] == 2
            assert await server.forward(second) == -1.0
            assert await server.forward(first) < -1.5

    asyncio.run(main())


def test_a_sampling_session_keeps_its_weights_whatever_is_exported_later(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model()
            await server.step(model)
            path = await server.export(model, "policy")
            old = await server.sampler(ANNE, path)
            before = await server.sample(old)
            await server.step(model)
            assert await server.export(model, "policy") == path
            new = await server.sampler(ANNE, path)
            assert await server.sample(old) == before
            assert await server.sample(new) != before
            assert await server.sample(await server.sampler(ANNE, None)) == "theta 0"

    asyncio.run(main())


def test_replaced_exports_are_removed_with_their_last_session_and_not_before(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model()
            await server.step(model)
            old = await server.sampler(ANNE, await server.export(model, "policy"))
            await server.export(model, "policy")
            await server.service._sweeper.sweep()
            assert len(list((tmp_path / "checkpoints").iterdir())) == 2
            await server.sample(old)
            await server.service.delete_sampling_session(ANNE, old.id)
            await server.service._sweeper.sweep()
            assert len(list((tmp_path / "checkpoints").iterdir())) == 1

    asyncio.run(main())


def test_an_export_and_its_sessions_end_with_their_time_to_live(tmp_path: Path):
    async def main() -> None:
        clock = Clock()
        async with serving(tmp_path, clock) as server:
            model = await server.model()
            path = await server.export(model, "policy", ttl_seconds=60)
            session = await server.sampler(ANNE, path)
            clock.now += 59
            await server.sample(session)
            clock.now += 2
            with pytest.raises(ServiceError, match="have expired") as refused:
                await server.sample(session)
            assert refused.value.status == 410
            with pytest.raises(ServiceError, match="expired"):
                await server.sampler(ANNE, path)
            assert await server.service.checkpoints(ANNE, model.id) == ()
            await server.service._sweeper.sweep()
            assert not list((tmp_path / "checkpoints").iterdir())

    asyncio.run(main())


def test_a_longer_time_to_live_keeps_the_session(tmp_path: Path):
    async def main() -> None:
        clock = Clock()
        async with serving(tmp_path, clock) as server:
            model = await server.model()
            path = await server.export(model, "policy", ttl_seconds=60)
            session = await server.sampler(ANNE, path)
            changed = await server.service.set_ttl(ANNE, model.id, path, None)
            assert changed.expires_at is None
            clock.now += 1000
            await server.service._sweeper.sweep()
            await server.sample(session)

    asyncio.run(main())


def test_what_belongs_to_another_key_is_not_there(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model(ANNE)
            path = await server.export(model, "policy")
            saved = (await server.service.checkpoints(ANNE, model.id))[0]
            session = await server.sampler(ANNE, path)
            service = server.service
            bens = await server.model(BEN)
            with pytest.raises(ServiceError, match="has no checkpoint"):
                await service.set_ttl(ANNE, (await server.model(ANNE)).id, path, 1)
            tries = [
                service.model(BEN, model.id),
                service.forward_backward(BEN, model.id, training_call(9), render),
                service.checkpoints(BEN, model.id),
                service.set_ttl(BEN, model.id, path, 1),
                server.load(bens, path, False),
                service.export_checkpoint(BEN, saved.id, False, None, False, render),
                service.sampling_session(BEN, session.id),
                service.sample(
                    BEN, session.id, SampleCall(token_ids=(1,), num_samples=1, sampling=SamplingConfig()), render
                ),
                server.sampler(BEN, path),
                service.terminate_model(BEN, model.id),
                service.session(BEN, model.session_id),
            ]
            for attempt in tries:
                with pytest.raises(ServiceError) as refused:
                    await attempt
                assert refused.value.code == "not_found", refused.value
            operation = await service.forward(ANNE, model.id, training_call(2), render)
            with pytest.raises(ServiceError, match="no operation"):
                await service.operation(BEN, operation.id, 1.0)

    asyncio.run(main())


def test_a_seed_that_was_not_given_is_drawn_once_and_recorded(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            first, second = await server.model(), await server.model()
            assert first.lora is not None
            assert second.lora is not None
            assert None not in (first.lora.seed, second.lora.seed)
            assert first.lora.seed != second.lora.seed
            assert await server.service.model(ANNE, first.id) == first

    asyncio.run(main())


def test_positions_without_a_target_have_no_log_probability(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model()
            inputs = {"target_tokens": np.array([-100, 6, -100]), "weights": np.ones(3, np.float32)}
            raw = RawDatum(datum_id=None, token_ids_N=np.full(3, 5, np.int64), inputs=inputs)
            request = resolve_loss("cross_entropy", {}, [raw], backward=True)
            call = TrainingCall(seq_id=1, digest="x", datum_ids=(None,), request=request)
            seen: list[list[float]] = []

            def look(result: Result) -> bytes:
                assert isinstance(result, TrainingResult)
                seen.append(result.logprobs_per_datum[0].tolist())
                return b"{}"

            await server.ended(await server.service.forward_backward(ANNE, model.id, call, look))
            assert seen == [[0.0, -1.0, 0.0]]

    asyncio.run(main())


def test_load_brings_weights_and_optimizer_back(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model()
            await server.step(model)
            path = await server.save(model, "saved")
            value = await server.forward(model)
            await server.step(model)
            after = await server.forward(model)
            await server.load(model, path)
            assert await server.forward(model) == value
            assert (await server.service.model(ANNE, model.id)).num_steps == 1
            await server.step(model)
            assert await server.forward(model) == after
            await server.load(model, path, with_optimizer=False)
            await server.step(model)
            assert await server.forward(model) != after

    asyncio.run(main())


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model()
            other = await server.model(lora=LoraParams(rank=8))
            await server.step(model)
            value = await server.forward(model)
            export, weight = await server.export(model, "export"), await server.save(model, "weight", "weight")
            for path, with_optimizer, words in (
                (export, False, "saved for sampling"),
                (weight, True, "without the optimizer"),
                (await server.save(other, "other"), False, "rank 8"),
                ("weaver://nobody/checkpoints/x", False, "no checkpoint"),
                ("/etc/passwd", False, "not the path"),
                (f"weaver://{model.id}/checkpoints/../../x", False, "not the path"),
            ):
                with pytest.raises(ServiceError, match=words):
                    await server.load(model, path, with_optimizer)
            assert await server.forward(model) == value

    asyncio.run(main())


def test_a_name_that_is_taken_is_refused(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model()
            await server.save(model, "mine", "weight")
            with pytest.raises(ServiceError, match="already") as refused:
                await server.save(model, "mine", "weight")
            assert refused.value.code == "name_taken"
            with pytest.raises(ServiceError, match="already"):
                await server.export(model, "mine")
            for name in ("../mine", "a/b", "", "x" * 200, ".hidden", "a\x00b"):
                with pytest.raises(ServiceError, match="cannot be used"):
                    await server.save(model, name, "weight")

    asyncio.run(main())


def test_a_full_disk_fails_the_save_and_leaves_the_model_usable(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model()
            await server.step(model)
            server.learners.disk_is_full = True
            with pytest.raises(ServiceError, match="No space left") as failed:
                await server.save(model, "saved")
            assert failed.value.code == "checkpoint_error"
            server.learners.disk_is_full = False
            assert [c.name for c in await server.service.checkpoints(ANNE, model.id)] == []
            await server.save(model, "saved")

    asyncio.run(main())


def test_a_failed_operation_leaves_the_model_usable(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model()
            bad = training_call(server.next_seq(model), token=100)
            with pytest.raises(ServiceError, match="vocabulary"):
                await server.ended(await server.service.forward_backward(ANNE, model.id, bad, render))
            await server.step(model)
            assert await server.forward(model) == -1.5
            long = training_call(server.next_seq(model), length=40)
            with pytest.raises(ServiceError, match="takes 32 at most"):
                await server.ended(await server.service.forward(ANNE, model.id, long, render))

    asyncio.run(main())


def test_a_trained_model_that_went_with_its_learner_waits_for_a_load(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            trained, fresh = await server.model(), await server.model()
            await server.step(trained)
            path = await server.save(trained, "saved")
            value = await server.forward(trained)
            await server.forward(fresh)
            server.learners.dying.add(trained.id)
            with pytest.raises(ServiceError, match=path) as lost:
                await server.forward_backward(trained)
            assert lost.value.code == "learner_lost"
            assert not lost.value.retryable
            for attempt in (
                server.forward(trained),
                server.step(trained),
                server.save(trained),
                server.export(trained),
            ):
                with pytest.raises(ServiceError, match="Load a checkpoint"):
                    await attempt
            assert await server.forward(fresh) == -1.0
            await server.load(trained, path)
            assert await server.forward(trained) == value

    asyncio.run(main())


def test_another_models_death_never_brings_a_trained_one_back_untrained(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            bystander, victim = await server.model(), await server.model()
            await server.step(bystander)
            server.learners.dying.add(victim.id)
            with pytest.raises(ServiceError, match="again") as lost:
                await server.forward(victim)
            assert lost.value.retryable, "a model as it was created can be made again"
            with pytest.raises(ServiceError, match="create a new model"):
                await server.forward(bystander)
            assert server.learners.opened.count(bystander.id) == 1

    asyncio.run(main())


def test_a_learner_that_dies_under_the_first_operation_takes_nothing_from_the_model(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model()
            await server.forward(model)
            server.learners.dying.add(model.id)
            with pytest.raises(ServiceError, match="call it again") as lost:
                await server.forward_backward(model)
            assert lost.value.retryable
            assert (await server.step(model))["num_steps"] == 1

    asyncio.run(main())


def test_a_first_operation_that_was_refused_leaves_the_model_as_created(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model()
            bad = training_call(server.next_seq(model), token=100)
            with pytest.raises(ServiceError, match="vocabulary"):
                await server.ended(await server.service.forward_backward(ANNE, model.id, bad, render))
            assert (await server.service.model(ANNE, model.id)).training_state == "fresh"

    asyncio.run(main())


def test_a_load_that_fails_never_leaves_a_lost_model_untrained(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model()
            await server.step(model)
            path = await server.save(model, "saved")
            server.learners.kill()
            server.learners.load_error = CheckpointError("cannot read the learner state: Input/output error")
            with pytest.raises(ServiceError, match="Input/output"):
                await server.load(model, path)
            server.learners.load_error = None
            with pytest.raises(ServiceError, match="Load a checkpoint"):
                await server.forward(model)
            await server.load(model, path)
            assert await server.forward(model) == -1.5

    asyncio.run(main())


def test_a_step_that_cannot_be_recorded_at_first_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("weaver_rl.service.model_states.PAUSE_BETWEEN_TRIES_S", 0.01)

    async def main(failures: int) -> Model:
        async with serving(tmp_path / str(failures)) as server:
            model = await server.model()
            await server.forward_backward(model)
            update, left = server.store.update_model, [failures]

            async def sometimes(model_id: str, **changes: Any) -> Any:
                if "num_steps" in changes and left[0]:
                    left[0] -= 1
                    raise ServiceError("storage_unavailable", "disk I/O error", status=503, retryable=True)
                return await update(model_id, **changes)

            server.store.update_model = sometimes  # type: ignore[method-assign]
            seq_id = server.next_seq(model)
            params = AdamParams(learning_rate=0.5)
            await server.ended(await server.service.optim_step(ANNE, model.id, seq_id, "step", params, render))
            return await server.service.model(ANNE, model.id)

    assert asyncio.run(main(2)).num_steps == 1
    with pytest.raises(ServiceError, match="was applied") as failed:
        asyncio.run(main(100))
    assert not failed.value.retryable


def test_models_of_clients_that_were_killed_are_ended(tmp_path: Path):
    async def main() -> None:
        clock = Clock()
        async with serving(tmp_path, clock, retention={"session_idle_s": 100}) as server:
            silent, beating, working = await server.model(), await server.model(), await server.model()
            for model in (silent, beating, working):
                await server.forward(model)
            clock.now += 99
            await server.service.heartbeat(ANNE, beating.session_id)
            await server.forward(working)
            await server.service.models(ANNE, 1, 0)
            clock.now += 2
            await server.step(working)  # writes what was noted before it
            await server.service._sweeper.sweep()
            statuses = [(await server.service.model(ANNE, model.id)).status for model in (silent, beating, working)]
            assert statuses == ["terminated", "active", "active"]
            await asyncio.sleep(0.1)
            assert silent.id not in server.learners.models

    asyncio.run(main())


def test_engines_are_kept_for_the_models_that_sessions_are_of(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model(training_mode="full_ft")
            session = await server.sampler(ANNE, await server.export(model))
            await server.service._sweeper.sweep()
            assert server.samplers.kept == {model.id}
            await server.service.delete_sampling_session(ANNE, session.id)
            await server.service._sweeper.sweep()
            assert server.samplers.kept == set()

    asyncio.run(main())


def test_gradients_that_went_with_the_learner_are_not_forgotten_silently(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model = await server.model()
            await server.forward_backward(model)
            server.learners.kill()
            with pytest.raises(ServiceError, match="lost"):
                await server.forward_backward(model)

    asyncio.run(main())


def test_after_a_restart_results_and_checkpoints_are_there_and_weights_must_be_loaded(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            model, fresh = await server.model(), await server.model()
            await server.step(model)
            call = training_call(server.next_seq(model))
            operation = await server.service.forward(ANNE, model.id, call, render)
            answer = await server.ended(operation)
            path = await server.save(model, "saved")
            session = await server.sampler(ANNE, await server.export(model, "policy"))
            text = await server.sample(session)
            seq_ids = dict(server.seq_ids)
        async with serving(tmp_path) as server:
            server.seq_ids = seq_ids
            assert (await server.service.model(ANNE, model.id)).training_state == "lost"
            assert await server.ended(operation) == answer
            assert await server.sample(session) == text
            with pytest.raises(ServiceError, match="restart of the server") as lost:
                await server.forward(model)
            assert lost.value.code == "model_state_lost"
            await server.load(model, path)
            assert await server.forward(model) == answer["logprobs"]
            assert await server.forward(fresh) == -1.0

    asyncio.run(main())


def test_an_operation_that_a_restart_cut_off_says_so(tmp_path: Path):
    async def main() -> None:
        learners = FakeLearners(seconds=3600)
        async with serving(tmp_path, learners=learners) as server:
            model = await server.model()
            operation = await server.service.forward(ANNE, model.id, training_call(1), render)
            await server.service._operations.close(timeout_s=0.1)
        async with serving(tmp_path) as server:
            with pytest.raises(ServiceError, match="restarted") as cut:
                await server.ended(operation)
            assert cut.value.code == "server_restarted"
            assert cut.value.retryable

    asyncio.run(main())


def test_artifacts(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            service, model = server.service, await server.model()
            await server.step(model)
            saved = await server.save(model, "saved")
            checkpoint = next(c for c in await service.checkpoints(ANNE, model.id) if c.path == saved)
            first = await server.ended(
                await service.export_checkpoint(ANNE, checkpoint.id, False, None, False, render)  # type: ignore[arg-type]
            )
            assert first["kind"] == "hf_adapter"
            again = await service.export_checkpoint(ANNE, checkpoint.id, False, None, False, render)
            assert again.id == first["id"]
            forced = await service.export_checkpoint(ANNE, checkpoint.id, False, None, True, render)
            assert (await server.ended(forced))["id"] != first["id"]  # type: ignore[arg-type]
            merged = await server.ended(
                await service.export_checkpoint(ANNE, checkpoint.id, True, None, False, render)  # type: ignore[arg-type]
            )
            assert merged["kind"] == "hf_model"
            artifact = await service.artifact(ANNE, merged["id"])
            path = await service.artifact_file(artifact.id, "theta")
            assert float(path.read_text()) == server.learners.models[model.id].theta
            with pytest.raises(ServiceError, match="no file"):
                await service.artifact_file(artifact.id, "../../weaver.sqlite")
            assert [name for name in server.learners.models if name.startswith("export-")] == []
            current = await server.ended(await service.export_hf(ANNE, model.id, True, None, render))
            assert current["kind"] == "hf_model"

    asyncio.run(main())


def test_generation_control_is_for_models_trained_whole(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            adapter, whole = await server.model(), await server.model(training_mode="full_ft")
            session = await server.sampler(ANNE, await server.export(adapter, "a"))
            with pytest.raises(ServiceError, match="full_ft"):
                await server.service.pause_generation(ANNE, session.id, "abort")
            session = await server.sampler(ANNE, await server.export(whole, "b"))
            await server.service.pause_generation(ANNE, session.id, "abort")
            assert server.samplers.paused == {whole.id: "abort"}
            await server.service.continue_generation(ANNE, session.id)
            assert server.samplers.paused == {}

    asyncio.run(main())


def test_a_lost_engine_is_told_and_may_be_tried_again(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            session = await server.sampler(ANNE, None)
            server.samplers.error = EngineLostError("the engine of tiny died")
            with pytest.raises(ServiceError, match="died") as lost:
                await server.sample(session)
            assert lost.value.retryable
            server.samplers.error = None
            await server.sample(session)

    asyncio.run(main())


def test_the_same_seed_draws_the_same_and_none_draws_anew(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            session = await server.sampler(ANNE, None)
            for seed in (7, 7, 8, None, None):
                call = SampleCall(token_ids=(1,), num_samples=3, sampling=SamplingConfig(), max_tokens=1, seed=seed)
                await server.ended(await server.service.sample(ANNE, session.id, call, render))
            first, same, other, free, freer = (request.seeds_G for request in server.samplers.seen)
            assert first == same
            assert len({first, other, free, freer}) == 4
            assert len(set(first)) == 3

    asyncio.run(main())


def test_a_request_sent_twice_makes_one_model_and_one_session(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            service, session = server.service, await server.service.create_session(ANNE, NewSession())
            new = NewModel(model_seq_id=1, base_model="tiny")
            first = await service.create_model(ANNE, session.id, new)
            assert (await service.create_model(ANNE, session.id, new)).id == first.id
            other = await service.create_model(
                ANNE, session.id, NewModel(model_seq_id=1, base_model="tiny", max_length=9)
            )
            assert other.id != first.id
            await server.step(first)
            assert (await service.create_model(ANNE, session.id, new)).id not in (first.id, other.id)
            sampler = NewSamplingSession(seq_id=1, base_model="tiny")
            base = await service.create_sampling_session(ANNE, session.id, sampler)
            assert (await service.create_sampling_session(ANNE, session.id, sampler)).id == base.id
            tuned = NewSamplingSession(seq_id=1, path=await server.export(first))
            assert await server.sample(await service.create_sampling_session(ANNE, session.id, tuned)) == "theta 0.5"
            assert await server.sample(base) == "theta 0"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("tokens", "words"), [((), "empty"), ((100,), "vocabulary"), ((-1,), "vocabulary"), ((1,) * 32, "31 at most")]
)
def test_prompts_that_no_engine_takes_are_refused_at_once(tmp_path: Path, tokens: tuple[int, ...], words: str):
    async def main() -> None:
        async with serving(tmp_path) as server:
            session = await server.sampler(ANNE, None)
            call = SampleCall(token_ids=tokens, num_samples=1, sampling=SamplingConfig())
            with pytest.raises(ServiceError, match=words):
                await server.service.sample(ANNE, session.id, call, render)

    asyncio.run(main())


def test_without_max_tokens_the_rest_of_the_context_is_there(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path) as server:
            session = await server.sampler(ANNE, None)
            seen = []

            async def sample(weights: Any, request: Any, sampling: SamplingConfig) -> Any:
                seen.append(sampling.max_tokens)
                return await FakeSamplers.sample(server.samplers, weights, request, sampling)

            server.samplers.sample = sample  # type: ignore[method-assign]
            for max_tokens in (None, 5, 500):
                call = SampleCall(token_ids=(1,) * 10, num_samples=1, sampling=SamplingConfig(), max_tokens=max_tokens)
                await server.ended(await server.service.sample(ANNE, session.id, call, render))
            assert seen == [22, 5, 22]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model": "huge"}, "supported: tiny"),
        ({"lora": LoraParams(rank=33)}, "allows 1..32"),
        ({"lora": LoraParams(rank=0)}, "allows 1..32"),
        ({"lora": LoraParams(train_attn=False, train_mlp=False, train_unembed=False)}, "trains nothing"),
        ({"max_length": 33}, "allows 2..32"),
    ],
)
def test_models_that_the_lineup_has_not_are_refused(tmp_path: Path, changes: dict[str, Any], words: str):
    async def main() -> None:
        async with serving(tmp_path) as server:
            session = await server.service.create_session(ANNE, NewSession())
            new = NewModel(**({"model_seq_id": 1, "base_model": "tiny"} | changes))
            with pytest.raises(ServiceError, match=words):
                await server.service.create_model(ANNE, session.id, new)

    asyncio.run(main())


def test_a_key_may_have_so_many_models_and_terminated_ones_do_not_count(tmp_path: Path):
    async def main() -> None:
        async with serving(tmp_path, limits={"models": 2}) as server:
            first, _ = await server.model(), await server.model()
            with pytest.raises(ServiceError, match="2 active models"):
                await server.model()
            await server.service.terminate_model(ANNE, first.id)
            await server.model()
            await server.model(BEN)
            with pytest.raises(ServiceError, match="terminated"):
                await server.forward(first)

    asyncio.run(main())
