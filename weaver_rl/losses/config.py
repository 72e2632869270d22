"""The table of losses a configuration can name. It knows their classes and imports nothing heavy."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from weaver_rl.losses.cross_entropy import CrossEntropy
from weaver_rl.losses.importance_sampling import ImportanceSampling

__all__ = ["CrossEntropy", "ImportanceSampling", "LossConfig"]

LossConfig = Annotated[CrossEntropy | ImportanceSampling, Field(discriminator="name")]
