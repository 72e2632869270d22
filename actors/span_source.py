"""What an actor answers when it is asked for its spans: they and the node whose clock they are by. It asks no actor."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from weaver_rl.spans import Spans, drain


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpans:
    """The spans of a process and where it runs.

    Example:
        NodeSpans(node_id="9f3c…", spans=drain())
    """

    node_id: str
    spans: Spans


def drain_this_process() -> NodeSpans:
    """What this process did since the last call."""
    return NodeSpans(node_id=ray.get_runtime_context().get_node_id(), spans=drain())
