"""What happened in a step, and why a rollout got its importance weights: read from a run folder, recomputed by the
code that the run itself uses. It starts nothing."""
