"""The engine that a server samples with, asked without a server: no HTTP, no Ray, no database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.child import START_TIMEOUT_S
from benchmarks.service_load import Load, Served, closed_loop
from weaver_rl.engines.config import LoraLimits
from weaver_rl.rollout import SamplingConfig
from weaver_rl.service.sampling import sample_seeds
from weaver_rl.types import GroupSample, SampleRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What the server gives its engine, and what is asked of it."""

    model_dir: Path
    engine_args: dict[str, Any]
    seed: int
    stop_token_ids: tuple[int, ...]
    num_threads: int | None
    lora: LoraLimits | None
    load: Load


def build_engine_sweep(spec: EngineSpec) -> Callable[[], list[Served]]:
    """Starts the engine as a sampler does; the result asks it for every level of the load."""
    from weaver_rl.engines.loop import EngineLoop
    from weaver_rl.engines.start import import_vllm, prepare_process
    from weaver_rl.engines.vllm import VllmEngine

    prepare_process(spec.num_threads)

    def build() -> VllmEngine:
        import_vllm()
        return VllmEngine(
            model_dir=spec.model_dir,
            name="the engine alone",
            engine_args=spec.engine_args,
            seed=spec.seed,
            stop_token_ids=spec.stop_token_ids,
            with_tokenizer=True,
            lora=spec.lora,
        )

    loop = EngineLoop(build)
    loop.wait_started(START_TIMEOUT_S)
    load = spec.load
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_tokens=load.max_tokens)

    async def ask(_caller: int, number: int) -> tuple[int, ...]:
        # The seed that the service makes of a client's.
        seeds = sample_seeds(number, 1)
        request = SampleRequest(group_id=f"{number}", token_ids_P=load.prompts[number], seeds_G=seeds)
        group: GroupSample = await asyncio.wrap_future(loop.submit([request], sampling)[0])
        return tuple(group.completions_G[0].token_ids_L.tolist())

    async def sweep() -> list[Served]:
        return [await closed_loop(level, ask, lambda: {"engine": time.process_time()}) for level in load.levels]

    return lambda: asyncio.run(sweep())
