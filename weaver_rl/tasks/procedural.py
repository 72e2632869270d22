"""Endless problems from `reasoning-gym`, with its own scorers. It knows no tokenizer.

Problems come in chunks: one small dataset object per chunk of indices, seeded from the run's seed and the chunk's
number. Some datasets prepare all of their items when built, so one object of unbounded size is not an option.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from weaver_rl.errors import TaskError
from weaver_rl.tasks.config import ReasoningGymTask
from weaver_rl.tasks.task import Problem, Scorer, is_held_out
from weaver_rl.types import Rollout

log = logging.getLogger(__name__)

CHUNK_SIZE = 256
EVAL_SEED = 20_000_003
"""The evaluation problems are the same whatever the seed of the run."""
MAX_DRAWS = 1000
"""Redraws of one training problem before the dataset counts as too small for its evaluation share."""
HASH_ORDERED_DATASETS = ("isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")
"""Datasets that iterate over sets of strings: the same seed gives other problems under another PYTHONHASHSEED."""


def build_dataset(name: str, args: Mapping[str, Any], seed: int, size: int) -> Any:
    """A reasoning-gym dataset object; every refusal is a TaskError that says what is allowed."""
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)[:3]
        raise TaskError(
            f"task.dataset: {name!r} is no reasoning-gym dataset; nearest: {', '.join(near)} ({len(DATASETS)} in all)"
        )
    dataset_class, config_class = DATASETS[name]
    allowed = sorted({f.name for f in dataclasses.fields(config_class)} - {"seed", "size"})
    for key in args:
        if key not in allowed:
            why = "is chosen by the run" if key in ("seed", "size") else "is unknown"
            raise TaskError(f"task.args: {key!r} {why}; {name} allows {', '.join(allowed)}")
    try:
        values = dict(args)
        if name == "composite":
            from reasoning_gym.composite import DatasetSpec

            values["datasets"] = [DatasetSpec(**spec) for spec in values.get("datasets", [])]
        return dataset_class(config_class(**values, seed=seed, size=size))
    except Exception as error:  # boundary: reasoning-gym checks its settings with asserts and anything else
        raise TaskError(
            f"task.args: reasoning-gym refuses {dict(args)} for {name}: {type(error).__name__}: {error}"
        ) from error


def chunk_seed(seed: int, stream: str, chunk: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{stream}/{chunk}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**31


@contextlib.contextmanager
def global_rngs_seeded(seed: int) -> Iterator[None]:
    """A few datasets (codeio) draw from the global generators: pin these, and leave them as they were."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class ProceduralTask:
    """A `Task` over one reasoning-gym dataset."""

    num_problems: int | None = None

    def __init__(self, config: ReasoningGymTask, seed: int) -> None:
        self.config = config
        self.seed = seed
        self._eval: list[Problem] = []
        self._num_eval_draws = 0
        # A handful of chunks: the one being read, and the redraws that belong to it.
        self._chunk = functools.lru_cache(maxsize=8)(self._build_chunk)
        self._text(self._draw("train", seed, 0))
        if config.dataset in HASH_ORDERED_DATASETS and not os.environ.get("PYTHONHASHSEED", "").isdigit():
            log.warning("%s depends on Python's string hashing: set PYTHONHASHSEED=0 to resume exactly", config.dataset)

    def problem(self, index: int) -> Problem:
        for attempt in range(MAX_DRAWS):
            problem = self._problem(f"train-{index}", self._draw(f"train/{attempt}", self.seed, index))
            if not is_held_out(problem.key, self.config.eval_fraction):
                return problem
        raise TaskError(
            f"{MAX_DRAWS} draws from {self.config.dataset} gave only evaluation problems: it has too few different "
            f"problems with args {self.config.args}; widen them or lower task.eval_fraction {self.config.eval_fraction}"
        )

    def eval_problems(self, num: int) -> list[Problem]:
        fraction = self.config.eval_fraction
        if num > 0 and fraction == 0:
            raise TaskError(f"eval asks for {num} problems but task.eval_fraction is 0; set it above 0")
        keys = {problem.key for problem in self._eval}
        idle = 0
        while len(self._eval) < num:
            entry = self._draw("eval", EVAL_SEED, self._num_eval_draws)
            problem = self._problem(f"eval-{len(self._eval)}", entry)
            self._num_eval_draws += 1
            idle += 1
            if is_held_out(problem.key, fraction) and problem.key not in keys:
                keys.add(problem.key)
                self._eval.append(problem)
                idle = 0
            if idle > MAX_DRAWS / fraction:
                raise TaskError(
                    f"eval asks for {num} problems but {self.config.dataset} with args {self.config.args} has only "
                    f"{len(self._eval)} different ones in its evaluation share of {fraction}; ask for fewer, widen "
                    "args or raise task.eval_fraction"
                )
        return self._eval[:num]

    def scorer(self) -> Scorer | None:
        dataset = build_dataset(self.config.dataset, self.config.args, seed=0, size=CHUNK_SIZE)
        return ProceduralScorer(dataset, self.config.answer_tag)

    def _build_chunk(self, stream: str, seed: int, chunk: int) -> Any:
        derived = chunk_seed(seed, stream, chunk)
        with global_rngs_seeded(derived):
            return build_dataset(self.config.dataset, self.config.args, derived, CHUNK_SIZE)

    def _draw(self, stream: str, seed: int, index: int) -> dict[str, Any]:
        chunk, offset = divmod(index, CHUNK_SIZE)
        dataset = self._chunk(stream, seed, chunk)
        with global_rngs_seeded(chunk_seed(seed, stream, index)):
            try:
                entry = dataset[offset]
            except Exception as error:  # boundary: a generator that fails on some settings is named
                raise TaskError(
                    f"{self.config.dataset} could not generate problem {index} of {stream} with args "
                    f"{self.config.args}: {type(error).__name__}: {error}"
                ) from error
        return dict(entry)

    def _text(self, entry: dict[str, Any]) -> str:
        try:
            return self.config.prompt_template.format(**entry)
        except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
            metadata = ", ".join(str(key) for key in entry.get("metadata") or {})
            raise TaskError(
                f"task.prompt_template: {self.config.prompt_template!r} does not fit {self.config.dataset} "
                f"({type(error).__name__}: {error}); it may use question, answer, metadata[...] with {metadata}"
            ) from error

    def _problem(self, problem_id: str, entry: dict[str, Any]) -> Problem:
        answer = None if entry["answer"] is None else str(entry["answer"])
        return Problem(problem_id=problem_id, prompt=self._text(entry), answer=answer, columns=entry)


class ProceduralScorer:
    """The dataset's own `score_answer`, given the stripped completion or what stands in its last answer tag."""

    def __init__(self, dataset: Any, answer_tag: str | None) -> None:
        self.dataset = dataset
        self.answer_tag = answer_tag

    def __call__(self, rollout: Rollout) -> float:
        answer: str | None = rollout.text.strip()
        if self.answer_tag is not None:
            found = re.findall(f"<{self.answer_tag}>(.*?)</{self.answer_tag}>", rollout.text, re.DOTALL)
            answer = found[-1].strip() if found else None
        return float(self.dataset.score_answer(answer=answer, entry=dict(rollout.prompt.columns)))
