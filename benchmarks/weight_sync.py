"""Seconds of a weight sync by real actors beside a memcpy of the same bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alternation import Effort, alternate, ratio
from benchmarks.crew import local_crew
from benchmarks.quickstart import prepare, quickstart_config
from benchmarks.random_llama import SMOLLM2_SIZE, save_random_llama
from benchmarks.results import Row
from benchmarks.scale import Scale
from weaver_rl.types import PublishedWeights
from weaver_rl.weights.probe import probe_token_ids
from weaver_rl.weights.sync import WeightSync

TOLERANCE = 1e-3
MEMCPY = "memcpy of the same bytes"


def measure(scale: Scale, folder: Path) -> list[Row]:
    """Rows for the quickstart's policy and for one of 135M parameters, float32."""
    quickstart = prepare(quickstart_config(), folder / "sync-0", num_demonstrations=0)
    rows = _case("quickstart", quickstart.model_dir, quickstart.vocab_size, 3 if scale.quick else 21, scale, folder)
    directory = folder / "sync-1"
    save_random_llama(SMOLLM2_SIZE, directory)
    return rows + _case("135M", directory, SMOLLM2_SIZE.vocab_size, 2 if scale.quick else 7, scale, folder)


def _case(name: str, model_dir: Path, vocab_size: int, rounds: int, scale: Scale, folder: Path) -> list[Row]:
    config = quickstart_config()
    engine_args = config.sampler.engine_args | {"max_model_len": 64}
    stages: dict[str, list[float]] = {"publish": [], "load": []}
    published: PublishedWeights | None = None
    with local_crew(config, folder, scale.num_threads) as crew:
        learner = crew.learner(model_dir)
        pool = crew.sampler(model_dir, engine_args, ())
        # Proves once that what is timed really arrives, and says how many bytes that is.
        probe = probe_token_ids(vocab_size, 32)
        report = crew.wait(_proved(WeightSync(learner, pool, probe, TOLERANCE)))

        async def publish() -> None:
            nonlocal published
            published = await learner.publish_weights(1)

        async def load() -> None:
            assert published is not None
            await pool.load_weights(published)

        def sync() -> float:
            for stage, work in (("publish", publish), ("load", load)):
                stages[stage].append(_seconds(lambda work=work: crew.wait(work())))  # type: ignore[misc]
            return stages["publish"][-1] + stages["load"][-1]

        seconds = alternate(
            {"sync": sync, MEMCPY: _memcpy(report.num_bytes)}, Effort(rounds=rounds, max_seconds=30, warmups=1)
        )
    ours, theirs = seconds["sync"], seconds[MEMCPY]
    parts = ", ".join(f"{stage} {statistics.median(values[1:]):.3g} s" for stage, values in stages.items())
    return [
        Row(
            benchmark="sync",
            case=f"{name}: {report.num_bytes / 1e6:,.1f} MB, {parts}",
            quantity="seconds",
            ours=statistics.median(ours),
            baseline=statistics.median(theirs),
            baseline_name=MEMCPY,
            ratio=ratio(ours, theirs),
        )
    ]


async def _proved(sync: WeightSync) -> Any:
    return await sync(1)


def _memcpy(num_bytes: int) -> Callable[[], float]:
    """Between two buffers that exist already: no page is touched for the first time."""
    source = np.ones(num_bytes, dtype=np.uint8)
    destination = np.zeros_like(source)
    return lambda: _seconds(lambda: np.copyto(destination, source))


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
