"""What a reward worker and its parent say to each other. Only these records cross the channel, and no user's object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from weaver_rl.rewards.config import RewardSpec

CallMode = Literal["each", "concurrent", "batched"]
"""How a reward function is called: one rollout after the other; all at once (async); or with the list of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorker:
    """First message to a new worker."""

    specs: tuple[RewardSpec, ...]
    base_dir: str
    """Directory that relative plugin files are found in; the current directory comes second."""
    task_scorer: bytes | None
    """Pickled callable of the `task` reward."""
    memory_limit_mb: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The plugins are loaded."""

    modes: tuple[CallMode, ...]
    """One per spec."""
    sources: tuple[str, ...]
    """SHA-256 of each plugin's source file, one per spec: a replacement must run the same code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The plugins cannot be loaded; `reason` is for the user."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJob:
    """Score these rollouts with one reward function."""

    component: int
    """Index of the spec."""
    rollouts: tuple[bytes, ...]
    """Each pickled by itself, so that one that cannot be read spoils no other."""
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The score of one rollout of the job, or why it has none."""

    position: int
    """Index within the job's rollouts."""
    value: float | None
    missing: str | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDone:
    """The job is over. A rollout without an `Answer` could not be judged in this company and is to be tried alone."""

    unusable: str | None = None
    """Why the worker must be replaced before the next job."""


ToWorker = StartWorker | ScoreJob
FromWorker = Ready | Refused | Answer | JobDone
