"""The configuration of a run: composes the sections and checks what goes across them.

It imports nothing heavy: `weaver-rl show` answers without Ray, vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import Field, model_validator

from weaver_rl.advantages import AdvantageConfig, CorrectionConfig, Grpo, LogprobGapLimit, NoCorrection, Reinforce
from weaver_rl.config_file import load_file
from weaver_rl.engines.config import SamplerConfig
from weaver_rl.evaluation import EvalConfig
from weaver_rl.learner.config import LearnerConfig
from weaver_rl.losses.config import ImportanceSampling, RunLossConfig
from weaver_rl.models.config import ModelConfig
from weaver_rl.placement import ClusterConfig
from weaver_rl.rewards.config import RewardSpec, RewardWorkersConfig, check_labels
from weaver_rl.rollout import RolloutConfig
from weaver_rl.run_location import RunDir, staging_folder
from weaver_rl.section import Section
from weaver_rl.tasks.config import TaskConfig
from weaver_rl.tracking.config import TrackingConfig
from weaver_rl.warm_start import WarmStartConfig
from weaver_rl.weights.config import WeightsConfig


class CheckpointConfig(Section):
    """Checkpoints to resume from."""

    every: int = Field(default=20, ge=0)
    """Steps between checkpoints, in either phase; 0: only after the warm start and the last step."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""


class RunConfig(Section):
    """A whole run, one file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run and its folder."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Everything random in the run follows from it."""
    run_dir: RunDir = None
    """The run folder, a path or a URL (`s3://bucket/runs/x`, any scheme of fsspec); null: runs/NAME under the working
    directory."""
    base_dir: Path | None = None
    """Where relative paths of tasks and rewards start; null: the directory of the configuration file."""
    model: ModelConfig
    """The policy that training starts from."""
    task: TaskConfig
    """Where prompts and their answers come from."""
    warm_start: WarmStartConfig | None = None
    """Supervised steps before the first rollout; null: none."""
    num_steps: int = Field(ge=0)
    """Steps of reinforcement learning."""
    rollout: RolloutConfig = RolloutConfig()
    """What one step samples, and how."""
    rewards: tuple[RewardSpec, ...] = Field(min_length=1)
    """Reward functions; a rollout's reward is their weighted sum."""
    reward_workers: RewardWorkersConfig = RewardWorkersConfig()
    """The processes that run the rewards, and how many rewards may go missing."""
    advantage: AdvantageConfig = Grpo()
    """How the rewards of a group become advantages."""
    correction: CorrectionConfig = NoCorrection()
    """What makes up for sampler and learner giving a token different probabilities."""
    loss: RunLossConfig = ImportanceSampling(name="importance_sampling")
    """What a step of reinforcement learning minimises."""
    logprob_gap: LogprobGapLimit = LogprobGapLimit()
    """How far sampler and learner may disagree before the run stops."""
    learner: LearnerConfig = LearnerConfig()
    """The processes that train, and their optimizer."""
    sampler: SamplerConfig = SamplerConfig()
    """The vLLM engines that sample."""
    weights: WeightsConfig = WeightsConfig()
    """How new weights get to the samplers, and how their arrival is checked."""
    cluster: ClusterConfig = ClusterConfig()
    """Which Ray cluster, and which actors share a GPU."""
    eval: EvalConfig = EvalConfig()
    """Evaluation on held-out prompts."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints to resume from."""
    tracking: TrackingConfig = TrackingConfig()
    """Weights & Biases and MLflow, if the run is to tell them its metrics."""

    @property
    def folder(self) -> Path:
        """The run folder as a directory of this machine; of a URL the one that is mirrored to it."""
        place = self.place
        return staging_folder(place) if isinstance(place, str) else place

    @property
    def place(self) -> Path | str:
        """The run folder as it was given: a path, or a URL as text."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.name

    @property
    def deciding_reward(self) -> str:
        """Label of the reward that decides whether a held-out completion was right."""
        return self.eval.reward if self.eval.reward is not None else self.rewards[0].component_name

    @model_validator(mode="after")
    def _check_across_sections(self) -> RunConfig:
        labels = [spec.component_name for spec in self.rewards]
        check_labels(self.rewards)
        if self.eval.reward is not None and self.eval.reward not in labels:
            raise ValueError(f"eval.reward is {self.eval.reward!r}, the rewards are {labels}")
        group = self.rollout.samples_per_prompt
        if group < 2 and not isinstance(self.advantage, Reinforce):
            raise ValueError(
                f"advantage.name {self.advantage.name} compares the rollouts of a group, rollout.samples_per_prompt is "
                f"{group}; 2 or more are needed, or advantage.name reinforce"
            )
        if self.num_steps and self.rollout.sampling.temperature == 0:
            raise ValueError("rollout.sampling.temperature is 0: greedy groups are all alike; use a value above 0")
        if self.num_steps and self.loss.name != "importance_sampling":
            raise ValueError(
                f"loss.name is {self.loss.name}: it ignores importance weights, so rewards would change nothing; "
                "use importance_sampling, or num_steps: 0 for a warm start alone"
            )
        max_len = self.sampler.engine_args.get("max_model_len")
        if isinstance(max_len, int) and max_len <= self.rollout.sampling.max_tokens:
            raise ValueError(
                f"sampler.engine_args.max_model_len is {max_len}, rollout.sampling.max_tokens "
                f"{self.rollout.sampling.max_tokens}: nothing is left for the prompt"
            )
        if self.weights.transport == "object_store" and self.sampler.tensor_parallel > 1:
            raise ValueError(
                f"weights.transport is object_store, sampler.tensor_parallel {self.sampler.tensor_parallel}: it loads "
                "engines of one worker only; use nccl"
            )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads the YAML file of a run and applies `key.path=value` overrides (values in YAML).

    Raises:
        ConfigError: names each key, what was seen, what is allowed, and for an unknown key the nearest one.
    """
    return load_file(RunConfig, path, overrides)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; `RunConfig` of it is equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
