"""Which recorded step and group each simulated one repeats. It knows lengths and scores, and no time.

A simulated step repeats a whole recorded one, its groups in another order: completions of one prompt, and of one time,
stay together, and with them how fast every role was then. Which, follows from the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weaver_rl.plan.trace import Trace, TracedGroup, TracedStep

JITTER = 2
"""Recorded steps by which a simulated one may be off its place."""


class Recording:
    """The trace as simulated roles ask for it.

    Args:
        num_steps: simulated steps that count; they are spread over the recorded ones in their order.
        lead_in: steps before them, until everything flows.
        lead_out: steps after them, so that the last that count find something to sample ahead.
        groups_per_step: of the simulated run, as is `samples_per_prompt`.
    """

    def __init__(
        self,
        trace: Trace,
        *,
        num_steps: int,
        groups_per_step: int,
        samples_per_prompt: int,
        seed: int,
        lead_in: int = 0,
        lead_out: int = 0,
    ) -> None:
        generator = np.random.default_rng([seed, 1])
        recorded = [step for step in trace.steps if step.groups]
        places = np.arange(num_steps) * len(recorded) // num_steps
        off = generator.integers(-JITTER, JITTER + 1, size=num_steps)
        # Each as often as any other, as far as that goes: a jitter alone would favour some of the noise.
        order = np.argsort(places + off + generator.random(num_steps), kind="stable")
        counted: list[TracedStep] = [recorded[place] for place in places[order].tolist()]
        self._steps = [counted[i % num_steps] for i in range(-lead_in, num_steps + lead_out)]
        self._groups_per_step = groups_per_step
        self._samples_per_prompt = samples_per_prompt
        self._seed = seed
        self._orders: dict[int, list[int]] = {}
        evaluated = [group for step in trace.evaluations[-1:] for group in step.evaluated]
        # Without an evaluation in the trace: first completions of what was trained.
        self._evaluated: Sequence[TracedGroup] = evaluated or [g for step in recorded for g in step.groups]

    def step(self, index: int) -> TracedStep:
        """What the simulated step at `index`, from 0 on, repeats."""
        return self._steps[min(index, len(self._steps) - 1)]

    def group(self, position: int) -> TracedGroup:
        """What the group at a position of the simulated training stream repeats."""
        index, place = divmod(position, self._groups_per_step)
        groups = self.step(index).groups
        if index not in self._orders:
            generator = np.random.default_rng([self._seed, 2, index])
            whole = [generator.permutation(len(groups)) for _ in range(-(-self._groups_per_step // len(groups)))]
            self._orders[index] = np.concatenate(whole).tolist()
        return groups[self._orders[index][place]]

    def evaluation(self, index: int) -> TracedGroup:
        """What the evaluation of a held-out prompt repeats."""
        return self._evaluated[index % len(self._evaluated)]

    def of_request(self, group_id: str) -> TracedGroup:
        """What a request repeats, by the name that controller and stream give it."""
        if group_id.startswith("eval-"):
            return self.evaluation(int(group_id.rpartition("-")[2]))
        return self.group(int(group_id))

    def members(self, group_id: str) -> list[int]:
        """Which recorded completion each one of a request repeats."""
        recorded = len(self.of_request(group_id).lengths_G)
        if group_id.startswith("eval-"):
            return [0]
        if recorded == self._samples_per_prompt:
            return list(range(recorded))
        generator = np.random.default_rng([self._seed, 3, int(group_id)])
        more: list[int] = generator.integers(0, recorded, size=self._samples_per_prompt).tolist()
        return more
