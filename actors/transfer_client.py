"""How the learner reaches the samplers during a GPU-to-GPU transfer: vLLM's four calls, sent to every sampler."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from weaver_rl.errors import ActorFailedError


class SamplerClient:
    """vLLM's `VLLMWeightSyncClient` over our samplers.

    vLLM's own Ray client gives every engine the same rank in the NCCL group; here sampler i takes the ranks from
    1 + i * tensor_parallel on.
    """

    def __init__(self, samplers: Sequence[Any], tensor_parallel: int, timeout_s: float) -> None:
        self._samplers = list(samplers)
        self._tensor_parallel = tensor_parallel
        self._timeout_s = timeout_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._wait(
            [
                sampler.call_workers.remote("init_weight_transfer_engine", self._ranked(init_info, index))
                for index, sampler in enumerate(self._samplers)
            ]
        )

    def start_weight_update(self) -> None:
        self._everywhere("start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._everywhere("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._everywhere("finish_weight_update")

    def _ranked(self, init_info: dict[str, Any], index: int) -> dict[str, Any]:
        if "rank_offset" not in init_info:
            return init_info
        return init_info | {"rank_offset": 1 + index * self._tensor_parallel}

    def _everywhere(self, method: str, *args: Any) -> None:
        self._wait([sampler.call_workers.remote(method, *args) for sampler in self._samplers])

    def _wait(self, references: list[Any]) -> None:
        """Waits for all; the first to fail is named at once, while the others may be blocked in a transfer with it."""
        names = {reference: f"sampler {index}" for index, reference in enumerate(references)}
        deadline = time.monotonic() + self._timeout_s
        pending = list(references)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                waiting = ", ".join(names[reference] for reference in pending)
                raise ActorFailedError(f"{waiting} did not take part in a weight transfer within {self._timeout_s:g} s")
            try:
                ray.get(done[0])
            except RayError as error:
                raise ActorFailedError(f"{names[done[0]]} failed in a weight transfer: {error}") from error
