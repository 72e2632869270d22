"""All checks of a run, in the order of what they need. It runs none of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from weaver_rl.check.capacity import check_capacity
from weaver_rl.check.checklist import Check
from weaver_rl.check.files import check_files
from weaver_rl.check.finding import Finding, passed
from weaver_rl.check.memory_check import check_memory
from weaver_rl.check.prompts import check_prompts
from weaver_rl.check.run_space import check_run_space
from weaver_rl.check.scoring import check_rewards
from weaver_rl.check.settings import check_settings
from weaver_rl.check.subject import RunUnderCheck
from weaver_rl.check.versions import check_versions

REWARDS_TIMEOUT_S = 90.0
CLUSTER_TIMEOUT_S = 60.0


def run_checklist(run: RunUnderCheck, path: Path, *, with_cluster: bool = True) -> tuple[Check, ...]:
    """`path`: the configuration file, which was read already."""
    capacity = partial(check_capacity, run)
    checks = (
        Check(title="configuration", run=partial(_configuration, run, path), timeout_s=10),
        Check(title="versions", run=check_versions, timeout_s=10),
        # A model that was never used may have to be converted first, half a minute.
        Check(title="files", run=partial(check_files, run), timeout_s=180),
        Check(title="tokenizer and prompts", run=partial(check_prompts, run), timeout_s=60),
        Check(
            title="rewards",
            run=partial(check_rewards, run, REWARDS_TIMEOUT_S),
            timeout_s=REWARDS_TIMEOUT_S + 30,
        ),
        Check(title="cluster", run=capacity, timeout_s=CLUSTER_TIMEOUT_S + 10),
        Check(title="memory", run=partial(check_memory, run), timeout_s=60),
        Check(title="run folder", run=partial(check_run_space, run), timeout_s=60),
    )
    return checks if with_cluster else tuple(check for check in checks if check.title != "cluster")


def _configuration(run: RunUnderCheck, path: Path) -> Iterator[Finding]:
    phases = [f"{run.config.num_steps} steps of reinforcement learning"]
    if run.config.warm_start is not None:
        phases.insert(0, f"{run.config.warm_start.num_steps} of warm start")
    yield passed(str(path), f"loads: {', '.join(phases)}")
    yield from check_settings(run.config)
