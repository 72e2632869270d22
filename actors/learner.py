"""A learner rank's process, and all ranks as one for the controller. It knows neither sampling nor rewards.

A rank holds a policy and any number of adapters on it, each a model of its own; an operation says whose it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.batches import handed_over
from actors.calls import answer, first_error, together
from actors.identity import Identity, this_process
from actors.model_files import ModelFiles, model_here
from actors.object_store import Chunk, publish
from actors.rank_files import FilesOfRank, RankFiles
from actors.span_source import NodeSpans, drain_this_process
from actors.transfer_client import SamplerClient
from actors.turns import Turns
from weaver_rl.errors import ActorFailedError, CallFailedError, ConfigError, LearnerLostError
from weaver_rl.learner.adapter_config import AdapterConfig
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.learner.microbatches import Positions, Shard, shard_data, unshard
from weaver_rl.learner.microbatches import sum_weights as total_weights
from weaver_rl.losses.config import LossConfig
from weaver_rl.spans import span
from weaver_rl.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    ForwardOutput,
    OptimStepOutput,
    PublishedWeights,
)
from weaver_rl.weights.config import Transport

if TYPE_CHECKING:
    from weaver_rl.learner.learner import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """Everything a rank needs to start."""

    model_dir: Path
    config: LearnerConfig
    rank: int
    seed: int
    master_addr: str
    master_port: int | None
    transport: Transport
    chunk_bytes: int


class LearnerRank(FilesOfRank):
    """One rank. Made first (which imports torch), started when the model and the other ranks' address are there.

    Operations take the name of an adapter; None: the policy itself.
    """

    def __init__(self) -> None:
        # Samplers work on the same cores while the learner waits: a spinning OpenMP pool would take them away.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
        with span("learner/start", part="import"):
            import transformers  # noqa: F401

        self._learner: Learner | None = None
        self._adapters: dict[str, Learner] = {}
        self._transfer: Any = None

    def free_address(self) -> tuple[str, int]:
        """Where the ranks can meet: this node's address and a port free just now."""
        address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, int(probe.getsockname()[1])

    def fetch_model(self, files: ModelFiles) -> Path:
        """The directory of this node that has the model; copied from the driver's node if there is none."""
        return model_here(files)

    @span("learner/start", part="policy")
    def start(self, spec: LearnerSpec) -> int:
        """Loads the policy, without adapters; returns its number of parameters."""
        from weaver_rl.learner.learner import Learner

        self._spec = spec
        self._adapters = {}
        self._learner = Learner(
            spec.model_dir,
            spec.config,
            rank=spec.rank,
            world_size=spec.config.num_ranks,
            master_addr=spec.master_addr,
            master_port=spec.master_port,
            seed=spec.seed,
        )
        return self._learner.num_parameters

    def add_adapter(self, name: str, config: AdapterConfig) -> int:
        """Makes an adapter that changes nothing yet; returns its number of parameters."""
        self._adapters[name] = self._running().with_adapter(name, config)
        return self._adapters[name].num_parameters

    def remove_adapter(self, name: str) -> None:
        self._running().remove_adapter(name)
        del self._adapters[name]

    @span("learner/forward")
    def forward(self, data: Sequence[Datum], temperature: float, adapter: str | None = None) -> ForwardOutput:
        return self._model(adapter).forward(data, temperature)

    @span("learner/forward_backward")
    def forward_backward(
        self,
        data: Sequence[Datum],
        loss: LossConfig,
        sum_weights: float,
        temperature: float,
        positions: Positions = "weighted",
        with_grad_norm: bool = False,
        adapter: str | None = None,
    ) -> ForwardBackwardOutput:
        return self._model(adapter).forward_backward(
            data, loss, sum_weights, temperature, positions=positions, with_grad_norm=with_grad_norm
        )

    @span("learner/optim_step")
    def optim_step(self, params: AdamParams, adapter: str | None = None) -> OptimStepOutput:
        return self._model(adapter).optim_step(params)

    def connect_samplers(self, samplers: Sequence[Any], tensor_parallel: int, address: tuple[str, int]) -> None:
        """Joins the samplers for transfers from GPU to GPU; the object store needs none of this."""
        if self._spec.transport == "object_store":
            return
        from weaver_rl.engines.weight_transfer import ChunkSource, open_transfer

        learner = self._running()
        self._source = ChunkSource(lambda: learner.state_chunks(self._spec.chunk_bytes))
        self._transfer = open_transfer(
            self._spec.transport,
            client=SamplerClient(samplers, tensor_parallel, self._spec.config.timeout_s),
            source=self._source,
            rank=self._spec.rank,
            master_addr=address[0],
            master_port=address[1],
            num_workers=len(samplers) * tensor_parallel,
        )

    @span("learner/publish")
    def publish_weights(self, version: int) -> PublishedWeights | None:
        """Sends the weights to the samplers' GPUs, or puts them into the object store for the samplers to fetch.

        Every rank takes part in gathering them, rank 0 answers.
        """
        if self._transfer is not None:
            self._transfer.send_weights()
            return PublishedWeights(version=version, handle=None, num_bytes=self._source.num_bytes)
        published = publish(version, self._chunks())
        return published if self._spec.rank == 0 else None

    @span("learner/save")
    def save_state(self, directory: Path, with_optimizer: bool = True, adapter: str | None = None) -> None:
        self._model(adapter).save_state(directory, with_optimizer)

    @span("learner/load")
    def load_state(self, directory: Path, with_optimizer: bool = True, adapter: str | None = None) -> None:
        self._model(adapter).load_state(directory, with_optimizer)

    @span("learner/save")
    def save_for_sampler(self, directory: Path, adapter: str | None = None) -> None:
        self._model(adapter).save_for_sampler(directory)

    @span("learner/save")
    def save_hf(self, directory: Path, adapter: str | None = None) -> None:
        self._model(adapter).save_hf(directory)

    def drain_spans(self) -> NodeSpans:
        """What it did since it was last asked."""
        return drain_this_process()

    def identity(self) -> Identity:
        """Which process this is."""
        return this_process()

    def close(self) -> None:
        """Leaves the other ranks; `start` may follow."""
        if self._learner is not None:
            self._learner.close()

    def _chunks(self) -> Iterator[Chunk]:
        for chunk in self._running().state_chunks(self._spec.chunk_bytes, dtype="float32"):
            if chunk:
                # The learner updates its weights in place: without the copy that `ray.put` makes, a sampler could
                # read half of an update. `numpy()` alone shares memory, `put` copies it.
                yield {name: tensor.detach().cpu().numpy() for name, tensor in chunk.items()}

    def _model(self, adapter: str | None) -> Learner:
        policy = self._running()
        if adapter is None:
            return policy
        if adapter not in self._adapters:
            raise ConfigError(
                f"the learner has no adapter {adapter!r}: it was not added since the learner started, or it was "
                "removed; add it again and load a saved state"
            )
        return self._adapters[adapter]

    def _running(self) -> Learner:
        if self._learner is None:
            raise RuntimeError("the learner was used before start()")
        return self._learner


class RayLearnerGroup:
    """All ranks as one: shards data by tokens, puts answers back into order.

    It operates on the policy; `with_adapter` gives one that operates on an adapter of the same ranks. All of them
    take turns, in the order that they ask, so that the time of one operation is not spent waiting for others. An
    operation that is cancelled when its turn has come goes on in the ranks, and the next one waits for its end.

    Args:
        ranks: handles of `LearnerRank`, by rank, all started.
        timeout_s: how long one operation may take, from its turn on.
        start_anew: ends the ranks and gives new ones, started.
        outlives_failed_calls: a rank that is alone goes on after a call that failed in it (out of memory, say), which
            is CallFailedError then; ranks that may be out of step with each other are lost by that.
        name: what errors and waits call the learner.
        files: brings state and policy from and to ranks that do not see the directories; None: all ranks see them.
    """

    def __init__(
        self,
        ranks: Sequence[Any],
        timeout_s: float,
        start_anew: Callable[[], Awaitable[Sequence[Any]]] | None = None,
        *,
        outlives_failed_calls: bool = False,
        name: str = "learner",
        files: RankFiles | None = None,
    ) -> None:
        self._ranks = list(ranks)
        self._timeout_s = timeout_s
        self._start_anew = start_anew
        self._outlives_failed_calls = outlives_failed_calls
        self._name = name
        self._files = files
        self._adapter: str | None = None
        self._turns = Turns()

    async def add_adapter(self, name: str, config: AdapterConfig) -> None:
        """Makes an adapter on every rank. Raises ConfigError for a taken name and for parts that the model lacks."""
        await self._all("add_adapter", lambda rank: rank.add_adapter.remote(name, config))

    async def remove_adapter(self, name: str) -> None:
        """Frees an adapter. Raises ConfigError if there is none of that name."""
        await self._all("remove_adapter", lambda rank: rank.remove_adapter.remote(name))

    def with_adapter(self, name: str) -> RayLearnerGroup:
        """A view of these ranks whose operations are on one adapter; ConfigError comes from each if it is not there.

        Adapters do not survive `restart`, and neither do views: one from before stays with the ranks that ended.
        """
        view = RayLearnerGroup(
            self._ranks, self._timeout_s, outlives_failed_calls=self._outlives_failed_calls, name=self._name
        )
        view._adapter, view._turns = name, self._turns
        return view

    async def restart(self) -> None:
        """Ends the ranks and starts others, at the weights that they began with and without adapters."""
        if self._start_anew is None:
            raise RuntimeError("this learner cannot start anew")
        try:
            self._ranks = list(await self._start_anew())
        except* ActorFailedError as errors:
            raise LearnerLostError(str(first_error(errors))) from errors
        self._turns = Turns()

    async def forward(self, data: Sequence[Datum], temperature: float = 1.0) -> ForwardOutput:
        shards = self._shards(data)
        outputs = await self._each(
            "forward", lambda rank, part: rank.forward.remote(part, temperature, self._adapter), shards
        )
        return ForwardOutput(logprobs_per_datum=unshard(shards, [output.logprobs_per_datum for output in outputs]))

    async def forward_backward(
        self,
        data: Sequence[Datum],
        loss: LossConfig,
        temperature: float = 1.0,
        sum_weights: float | None = None,
        *,
        positions: Positions = "weighted",
        with_grad_norm: bool = False,
    ) -> ForwardBackwardOutput:
        """Accumulates gradients of the whole batch's loss, whatever the number of ranks.

        `sum_weights` is the normaliser where data of the batch are left out because they add nothing; None: the sum
        of the weights of `data`. A loss that is not normalised has none. For the rest see `Learner`.
        """
        shards = self._shards(data)
        if not loss.normalised:
            sum_weights = 1.0
        elif sum_weights is None:
            sum_weights = total_weights(data)
        outputs: list[ForwardBackwardOutput] = await self._each(
            "forward_backward",
            lambda rank, part: rank.forward_backward.remote(
                part, loss, sum_weights, temperature, positions, with_grad_norm, self._adapter
            ),
            shards,
        )
        return ForwardBackwardOutput(
            loss=outputs[0].loss,
            num_tokens=sum(len(datum.token_ids_N) for datum in data),
            sum_weights=sum_weights,
            logprobs_per_datum=unshard(shards, [output.logprobs_per_datum for output in outputs]),
            metrics=outputs[0].metrics,
        )

    async def optim_step(self, params: AdamParams) -> OptimStepOutput:
        outputs: list[OptimStepOutput] = await self._all(
            "optim_step", lambda rank: rank.optim_step.remote(params, self._adapter)
        )
        return outputs[0]

    async def publish_weights(self, version: int) -> PublishedWeights:
        """The policy's own; adapters go to samplers as directories."""
        published: list[PublishedWeights] = await self._all(
            "publish_weights", lambda rank: rank.publish_weights.remote(version)
        )
        return published[0]

    async def save_state(self, directory: Path, with_optimizer: bool = True) -> None:
        # Ranks may run with another working directory: only an absolute path means the same to all.
        async with self._written(directory) as paths:
            await self._all_at(
                paths, "save_state", lambda rank, path: rank.save_state.remote(path, with_optimizer, self._adapter)
            )

    async def load_state(self, directory: Path, with_optimizer: bool = True) -> None:
        async with self._read(directory) as paths:
            await self._all_at(
                paths, "load_state", lambda rank, path: rank.load_state.remote(path, with_optimizer, self._adapter)
            )

    async def save_for_sampler(self, directory: Path) -> None:
        async with self._written(directory) as paths:
            await self._all_at(
                paths, "save_for_sampler", lambda rank, path: rank.save_for_sampler.remote(path, self._adapter)
            )

    async def save_hf(self, directory: Path) -> None:
        async with self._written(directory) as paths:
            await self._all_at(paths, "save_hf", lambda rank, path: rank.save_hf.remote(path, self._adapter))

    @contextlib.asynccontextmanager
    async def _written(self, directory: Path) -> AsyncIterator[Sequence[Path]]:
        """Where each rank writes to `directory`."""
        with _lost_by_failure():
            if self._files is None:
                yield [directory.resolve()] * len(self._ranks)
                return
            async with self._files.written(self._ranks, directory.resolve()) as paths:
                yield paths

    @contextlib.asynccontextmanager
    async def _read(self, directory: Path) -> AsyncIterator[Sequence[Path]]:
        """Where each rank reads from `directory`."""
        with _lost_by_failure():
            if self._files is None:
                yield [directory.resolve()] * len(self._ranks)
                return
            async with self._files.read(self._ranks, directory.resolve()) as paths:
                yield paths

    def _shards(self, data: Sequence[Datum]) -> tuple[Shard, ...]:
        return shard_data(data, len(self._ranks))

    async def _all(self, doing: str, call: Callable[[Any], Any]) -> list[Any]:
        """Every rank's answer to one call."""
        return await self._each(doing, lambda rank, _: call(rank))

    async def _each(self, doing: str, call: Callable[[Any, Any], Any], shards: Sequence[Shard] = ()) -> list[Any]:
        """Every rank's answer, each called with the data of its shard."""
        ranks = self._ranks  # those of now: nobody who waits gets into the ranks of a restart unasked
        return await self._turns.run(lambda: self._answers(ranks, doing, call, shards))

    async def _all_at(self, paths: Sequence[Path], doing: str, call: Callable[[Any, Any], Any]) -> list[Any]:
        """Every rank's answer, each called with its path."""
        ranks = self._ranks
        return await self._turns.run(lambda: self._answered(ranks, doing, call, paths))

    async def _answers(
        self, ranks: Sequence[Any], doing: str, call: Callable[[Any, Any], Any], shards: Sequence[Shard]
    ) -> list[Any]:
        parts = await asyncio.gather(*(handed_over(shard.data) for shard in shards)) or [None] * len(ranks)
        return await self._answered(ranks, doing, call, parts)

    async def _answered(
        self, ranks: Sequence[Any], doing: str, call: Callable[[Any, Any], Any], parts: Sequence[Any]
    ) -> list[Any]:
        try:
            return await together(
                answer(call(handle, part), actor=f"{self._name} rank {rank}", doing=doing, timeout_s=self._timeout_s)
                for rank, (handle, part) in enumerate(zip(ranks, parts, strict=True))
            )
        except ActorFailedError as error:
            alone = self._outlives_failed_calls and len(ranks) == 1
            if alone and isinstance(error, CallFailedError):
                raise
            raise LearnerLostError(str(error)) from error


@contextlib.contextmanager
def _lost_by_failure() -> Iterator[None]:
    """A rank, or its node, that does not give its files is as lost as one that does not answer."""
    try:
        yield
    except (CallFailedError, LearnerLostError):
        raise
    except ActorFailedError as error:
        raise LearnerLostError(str(error)) from error
