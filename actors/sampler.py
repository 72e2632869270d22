"""A sampler process: one engine in a thread of its own, asked over Ray. It knows neither rewards nor training."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError

from actors.identity import Identity, this_process
from actors.model_files import ModelFiles, model_here
from actors.object_store import tensors
from actors.span_source import NodeSpans, drain_this_process
from weaver_rl.engines.config import LoraLimits
from weaver_rl.engines.loop import EngineLoop, PauseMode
from weaver_rl.engines.start import import_vllm, prepare_process
from weaver_rl.engines.vllm import VllmEngine
from weaver_rl.errors import LearnerLostError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.spans import span
from weaver_rl.types import (
    Adapter,
    Float32Array,
    GroupSample,
    PromptLogprobs,
    PublishedWeights,
    SampleRequest,
)
from weaver_rl.weights.config import Transport

CONTROL = "control"
CONCURRENCY_GROUPS = {CONTROL: 100}
"""What every `Sampler` is made with, by number of calls at a time: what steers it must not wait behind requests, of
which as many as `max_concurrency` may be in flight for as long as it is paused. The two run in threads of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSpec:
    """Everything a sampler needs to start its engine."""

    name: str
    model_dir: Path
    engine_args: dict[str, Any]
    seed: int
    """Engine seed, different for every sampler."""
    stop_token_ids: tuple[int, ...]
    tensor_parallel: int
    transport: Transport
    start_timeout_s: float
    with_tokenizer: bool = False
    """Completions come with texts, and texts can end them. The tokenizer is that of `model_dir`."""
    lora: LoraLimits | None = None
    """Which adapters requests may bring; an engine that takes some keeps its base weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a sampler says of itself."""

    num_steps: int
    """Engine steps so far."""
    is_busy: bool
    """Groups or scores are in flight, and the engine should be stepping."""
    is_closed: bool = False
    """The engine takes nothing any more."""
    num_failed_in_a_row: int = 0
    """Engine steps that failed since the last good one."""


class Sampler:
    """One sampler. Made first (which imports vLLM), started when the model is there."""

    def __init__(self, num_threads: int | None) -> None:
        prepare_process(num_threads)
        self._spec: Future[SamplerSpec] = Future()
        self._loop = EngineLoop(self._build)
        self._num_loading = 0

    @ray.method(concurrency_group=CONTROL)
    async def fetch_model(self, files: ModelFiles) -> Path:
        """The directory of this node that has the model; copied from the driver's node if there is none."""
        return await asyncio.to_thread(model_here, files)

    @ray.method(concurrency_group=CONTROL)
    async def start(self, spec: SamplerSpec) -> int:
        """Builds the engine; returns its limit of tokens in a sequence."""
        self._spec.set_result(spec)
        await asyncio.to_thread(self._loop.wait_started, spec.start_timeout_s)
        return int(await self._call(lambda engine: engine.max_model_len))

    async def generate(
        self, requests: Sequence[SampleRequest], sampling: SamplingConfig
    ) -> AsyncIterator[list[GroupSample]]:
        """Samples all groups, yielding those that are complete as soon as there are some.

        With nothing in flight it starts from an empty prefix cache: the same requests then meet the same engine,
        whatever ran before, and a resumed run equals an uninterrupted one bit for bit.
        """
        futures = self._loop.submit(requests, sampling, cold=True)
        arrived: asyncio.Queue[asyncio.Future[GroupSample]] = asyncio.Queue()
        for future in futures:
            asyncio.wrap_future(future).add_done_callback(arrived.put_nowait)
        num_left = len(futures)
        try:
            while num_left:
                # A message costs Ray more than a group: whatever came meanwhile goes with it.
                done = [await arrived.get()]
                while not arrived.empty():
                    done.append(arrived.get_nowait())
                num_left -= len(done)
                yield [group.result() for group in done]
        finally:
            if num_left:
                self._loop.abort(futures)

    async def sample(self, request: SampleRequest, sampling: SamplingConfig) -> GroupSample:
        """Samples one group beside whatever is in flight. Cancelled, it frees the engine.

        Raises EngineError for a request that the engine refuses, EngineLostError when a step of the engine failed.
        """
        [future] = self._loop.submit([request], sampling)
        group: GroupSample = await self._answer(future)
        return group

    @ray.method(concurrency_group=CONTROL)
    async def abort(self, group_id: str) -> None:
        """Ends a group that nobody waits for any more: its `sample` fails with EngineError."""
        await asyncio.wrap_future(self._loop.abort_group(group_id))

    async def prompt_logprobs(
        self, token_ids: Sequence[int], temperature: float = 1.0, adapter: Adapter | None = None
    ) -> PromptLogprobs:
        """Log-probabilities (N,) of a fixed sequence, log_softmax(logits / temperature); see `VllmEngine.add_score`.

        Raises EngineError for what cannot be scored, EngineLostError when a step of the engine failed.
        """
        return PromptLogprobs(logprobs_P=await self._answer(self._loop.score(token_ids, temperature, adapter)))

    async def score(self, token_ids: Sequence[int]) -> Float32Array:
        """Log-probabilities (N-1,) of a fixed sequence at temperature 1."""
        logprobs: Float32Array = await self._answer(self._loop.score(token_ids))
        return logprobs[1:]

    @ray.method(concurrency_group=CONTROL)
    async def pause(self, mode: PauseMode) -> None:
        """No engine step until `resume`; see `EngineLoop.pause` for what becomes of what is in flight."""
        await asyncio.wrap_future(self._loop.pause(mode))

    @ray.method(concurrency_group=CONTROL)
    async def resume(self) -> None:
        """Goes on after `pause`."""
        await asyncio.wrap_future(self._loop.resume())

    @ray.method(concurrency_group=CONTROL)
    async def load_directory(self, directory: Path, version: int) -> None:
        """Loads the weights of a Hugging Face directory, paused or not; what is in flight goes on with them.

        Raises EngineError, with the weights as they were, for a directory of another model or an engine with adapters.
        """
        loading = span("sampler/load_weights", version=version)
        await self._load(loading(lambda engine: engine.load_directory(directory, version)))

    @ray.method(concurrency_group=CONTROL)
    async def forget_adapter(self, name: str) -> None:
        """Frees the adapter; a request that brings that name again reads its directory again."""
        await self._call(lambda engine: engine.forget_adapter(name))

    @ray.method(concurrency_group=CONTROL)
    async def load_weights(self, weights: PublishedWeights) -> None:
        """Loads a version and drops what was cached under older ones."""
        try:
            with span("sampler/fetch_weights", version=weights.version):
                chunks = [await reference for reference in weights.handle or ()]
        except (ObjectLostError, ray.exceptions.RaySystemError) as error:
            raise LearnerLostError(
                f"weights v{weights.version} are gone with the learner that published them"
            ) from error

        # In one command: an engine step between two chunks would sample from a policy that never existed.
        @span("sampler/load_weights", version=weights.version)
        def load(engine: VllmEngine) -> None:
            pairs = chain.from_iterable(tensors(chunk) for chunk in chunks) if chunks else None
            engine.replace_weights(weights.version, pairs)

        await self._load(load)

    async def _load(self, load: Callable[[VllmEngine], None]) -> None:
        self._num_loading += 1
        try:
            await self._call(load)
        finally:
            self._num_loading -= 1
            await asyncio.wrap_future(self._loop.release())

    @ray.method(concurrency_group=CONTROL)
    async def heartbeat(self) -> Heartbeat:
        """Answers while the process lives, whatever its engine does."""
        # A load has a deadline of its own, and no engine step comes before its end.
        is_busy = self._loop.is_busy and not self._num_loading
        return Heartbeat(
            num_steps=self._loop.num_steps,
            is_busy=is_busy,
            is_closed=self._loop.is_closed,
            num_failed_in_a_row=self._loop.num_failed_in_a_row,
        )

    @ray.method(concurrency_group=CONTROL)
    def drain_spans(self) -> NodeSpans:
        """What it did since it was last asked."""
        return drain_this_process()

    @ray.method(concurrency_group=CONTROL)
    def identity(self) -> Identity:
        """Which process this is."""
        return this_process()

    @ray.method(concurrency_group=CONTROL)
    async def call_workers(self, method: str, *args: Any) -> None:
        """One call of vLLM's weight-transfer API, on every worker of the engine.

        From the start of an update to the `load_weights` after it the engine makes no step: its weights are of no
        version then.
        """
        if method == "start_weight_update":
            await asyncio.wrap_future(self._loop.hold())
        calling = span("sampler/load_weights", method=method)
        await self._call(calling(lambda engine: engine.call_workers(method, *args)))

    @ray.method(concurrency_group=CONTROL)
    async def close(self) -> None:
        """Ends the engine and its worker processes."""
        self._spec.cancel()  # a sampler that was never started still waits for it
        await asyncio.to_thread(self._loop.close)

    async def _call(self, function: Any) -> Any:
        return await asyncio.wrap_future(self._loop.call(function))

    async def _answer(self, future: Future[Any]) -> Any:
        try:
            return await asyncio.wrap_future(future)
        finally:
            if not future.done():
                self._loop.abort([future])

    def _build(self) -> VllmEngine:
        # The import takes as long as the rest; it happens while the model is still being prepared. It is here and not
        # in a thread of its own because vLLM is to be imported, built and stepped by one and the same thread.
        with span("sampler/start", part="import"):
            import_vllm()
        spec = self._spec.result()
        with span("sampler/start", part="engine"):
            return self._built(spec)

    def _built(self, spec: SamplerSpec) -> VllmEngine:
        return VllmEngine(
            model_dir=spec.model_dir,
            name=spec.name,
            engine_args=spec.engine_args,
            seed=spec.seed,
            stop_token_ids=spec.stop_token_ids,
            tensor_parallel=spec.tensor_parallel,
            weight_transfer=None if spec.transport == "object_store" else spec.transport,
            with_tokenizer=spec.with_tokenizer,
            lora=spec.lora,
        )
