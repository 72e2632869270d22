"""All samplers as one for the controller: shares out requests, merges what comes back. It holds no engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any

from ray.exceptions import RayError

from actors.calls import answer, explained, together
from weaver_rl.errors import ActorFailedError
from weaver_rl.rollout import SamplingConfig
from weaver_rl.types import Float32Array, GroupSample, PublishedWeights, SampleRequest


class RaySamplerPool:
    """The samplers of a run.

    Args:
        samplers: handles of `Sampler` by name.
        started: done once every sampler is up; until then nothing here answers.
        generate_timeout_s: how long the samplers may take for the requests of one call.
        load_timeout_s: how long one load or probe may take.
    """

    def __init__(
        self,
        samplers: Mapping[str, Any],
        started: Awaitable[Any],
        *,
        generate_timeout_s: float,
        load_timeout_s: float,
    ) -> None:
        self._samplers = dict(samplers)
        self._started = started
        self._generate_timeout_s = generate_timeout_s
        self._load_timeout_s = load_timeout_s
        self.names = tuple(self._samplers)

    async def generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig) -> AsyncIterator[GroupSample]:
        """Yields groups as they are completed. Which sampler takes which group depends on the order alone."""
        await self._started
        arrived: asyncio.Queue[GroupSample | Exception] = asyncio.Queue()
        shares = {name: list(requests[index :: len(self.names)]) for index, name in enumerate(self.names)}
        streams = [
            asyncio.create_task(self._generate_on(name, share, sampling, arrived))
            for name, share in shares.items()
            if share
        ]
        try:
            async with asyncio.timeout(self._generate_timeout_s) as deadline:
                for _ in requests:
                    item = await arrived.get()
                    if isinstance(item, Exception):
                        raise item
                    yield item
        except TimeoutError:
            if not deadline.expired():
                raise
            raise ActorFailedError(
                f"the samplers {', '.join(self.names)} did not finish {len(requests)} groups within "
                f"{self._generate_timeout_s:g} s (rollout.timeout_s)"
            ) from None
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    async def _generate_on(
        self,
        name: str,
        requests: list[SampleRequest],
        sampling: SamplingConfig,
        arrived: asyncio.Queue[GroupSample | Exception],
    ) -> None:
        started = time.monotonic()
        doing = f"sampling {len(requests)} groups"
        num_owed = len(requests)
        try:
            stream = self._samplers[name].generate.options(num_returns="streaming").remote(requests, sampling)
            async for reference in stream:
                for group in await reference:
                    arrived.put_nowait(group)
                    num_owed -= 1
        except RayError as error:
            arrived.put_nowait(explained(error, name, doing, time.monotonic() - started))
        except Exception as error:  # noqa: BLE001 - boundary: who waits for the groups gets it, else it waits for ever
            arrived.put_nowait(error)
        else:
            if num_owed:
                arrived.put_nowait(ActorFailedError(f"{name} ended {doing} with {num_owed} of them missing"))

    async def load_weights(self, weights: PublishedWeights, only: str | None = None) -> None:
        await self._started
        names = self.names if only is None else (only,)
        await together(
            answer(
                self._samplers[name].load_weights.remote(weights),
                actor=name,
                doing=f"loading weights v{weights.version}",
                timeout_s=self._load_timeout_s,
            )
            for name in names
        )

    async def score(self, token_ids: Sequence[int]) -> Mapping[str, Float32Array]:
        await self._started
        answers: list[Float32Array] = await together(
            answer(
                sampler.score.remote(tuple(token_ids)),
                actor=name,
                doing="answering the probe",
                timeout_s=self._load_timeout_s,
            )
            for name, sampler in self._samplers.items()
        )
        return dict(zip(self.names, answers, strict=True))
