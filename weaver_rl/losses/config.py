"""The tables of losses: of the learner, and of a run's configuration. They know classes and import nothing heavy."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from weaver_rl.losses.cispo import Cispo
from weaver_rl.losses.cross_entropy import CrossEntropy
from weaver_rl.losses.importance_sampling import ImportanceSampling
from weaver_rl.losses.importance_sampling_ratio import ImportanceSamplingRatio
from weaver_rl.losses.ppo_clip import PpoClip
from weaver_rl.losses.surrogate import Surrogate
from weaver_rl.losses.truncated_importance_sampling import TruncatedImportanceSampling

__all__ = [
    "Cispo",
    "CrossEntropy",
    "ImportanceSampling",
    "ImportanceSamplingRatio",
    "LossConfig",
    "PpoClip",
    "RunLossConfig",
    "Surrogate",
    "TruncatedImportanceSampling",
]

LossConfig = Annotated[
    CrossEntropy
    | ImportanceSampling
    | ImportanceSamplingRatio
    | TruncatedImportanceSampling
    | PpoClip
    | Cispo
    | Surrogate,
    Field(discriminator="name"),
]
"""What the learner can minimise."""

RunLossConfig = Annotated[CrossEntropy | ImportanceSampling, Field(discriminator="name")]
"""What a run can: its data carry importance weights, into which advantage and correction have gone already."""
