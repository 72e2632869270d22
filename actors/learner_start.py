"""Bringing the ranks of a learner up: each loads the policy and meets the others. It spawns none of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.calls import answer, together
from actors.identity import ActorFacts, Identity, this_process
from actors.learner import LearnerSpec
from actors.model_files import model_on
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.waits import current_waits
from weaver_rl.weights.config import Transport


async def start_learner(
    ranks: Sequence[Any],
    config: LearnerConfig,
    *,
    model_dir: Path,
    seed: int,
    transport: Transport,
    chunk_bytes: int,
    name: str = "learner",
) -> None:
    """Every rank loads the policy of the directory and joins the others.

    Args:
        ranks: handles of `LearnerRank`, by rank, not started.
        chunk_bytes: weights are published in chunks of about this size.
        name: what errors and waits call the learner.
    """
    timeout_s = config.timeout_s
    # All before one starts: ranks wait for each other from then on, and not for as long as a large model may take.
    found = await together(
        model_on(actor, model_dir, name=f"{name} rank {rank}", start_timeout_s=timeout_s)
        for rank, actor in enumerate(ranks)
    )
    address, port = await answer(
        ranks[0].free_address.remote(), actor=f"{name} rank 0", doing="starting", timeout_s=timeout_s
    )
    async with asyncio.TaskGroup() as tasks:
        for rank, actor in enumerate(ranks):
            spec = LearnerSpec(
                model_dir=found[rank],
                config=config,
                rank=rank,
                seed=seed,
                master_addr=address,
                master_port=port,
                transport=transport,
                chunk_bytes=chunk_bytes,
            )
            tasks.create_task(_start_rank(actor, f"{name} rank {rank}", spec, timeout_s))


async def _start_rank(actor: Any, name: str, spec: LearnerSpec, timeout_s: float) -> None:
    await answer(actor.start.remote(spec), actor=name, doing="loading the policy", timeout_s=timeout_s)
    identity: Identity = await answer(
        actor.identity.remote(), actor=name, doing="saying which process it is", timeout_s=timeout_s
    )
    current_waits().describe(name, ActorFacts(identity, here=this_process().node_id))
