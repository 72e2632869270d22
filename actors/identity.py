"""Which process an actor is, and what can be said of its state from elsewhere. It asks no actor."""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray

from weaver_rl.process_state import ProcessFacts, start_time
from weaver_rl.wait_chain import Fact


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One process of the cluster."""

    pid: int
    node_id: str
    started_at: float | None
    """Seconds since the epoch."""


def this_process() -> Identity:
    """The process that this is called in, an actor's or the driver's."""
    pid = os.getpid()
    return Identity(pid=pid, node_id=ray.get_runtime_context().get_node_id(), started_at=start_time(pid))


class ActorFacts:
    """For `Waits.describe`: the state of an actor's process where it runs on this machine, else only where it runs."""

    def __init__(self, identity: Identity, here: str) -> None:
        self._identity = identity
        on_this_node = identity.node_id == here
        self._process = ProcessFacts(identity.pid, identity.started_at) if on_this_node else None

    def __call__(self) -> Fact | None:
        if self._process is not None:
            return self._process()
        return Fact(text=f"pid {self._identity.pid} on node {self._identity.node_id[:8]}")
