"""The losses as Weaver documents them, and the chunked head the learner computes them with. Knows no model and no rank.

Importing this package is light: torch is imported only by the functions that need it.
"""

from weaver_rl.losses.cispo import cispo_loss
from weaver_rl.losses.cross_entropy import cross_entropy_loss
from weaver_rl.losses.importance_sampling import importance_sampling_loss
from weaver_rl.losses.importance_sampling_ratio import importance_sampling_ratio_loss
from weaver_rl.losses.ppo_clip import ppo_clip_loss
from weaver_rl.losses.surrogate import surrogate_loss
from weaver_rl.losses.truncated_importance_sampling import truncated_importance_sampling_loss

__all__ = [
    "cispo_loss",
    "cross_entropy_loss",
    "importance_sampling_loss",
    "importance_sampling_ratio_loss",
    "ppo_clip_loss",
    "surrogate_loss",
    "truncated_importance_sampling_loss",
]
