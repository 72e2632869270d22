"""The losses as Weaver documents them, and the chunked head the learner computes them with. Knows no model and no rank.

Importing this package is light: torch is imported only by the functions that need it.
"""

from weaver_rl.losses.cross_entropy import cross_entropy_loss
from weaver_rl.losses.importance_sampling import importance_sampling_loss

__all__ = ["cross_entropy_loss", "importance_sampling_loss"]
