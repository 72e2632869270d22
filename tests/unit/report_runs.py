"""Run folders for the tests of report and inspection: written by the code that writes a run's, without running one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from weaver_rl.batch import ScoredGroup, build_batch
from weaver_rl.config import RunConfig
from weaver_rl.ledger import LedgerRow
from weaver_rl.metrics import MetricsWriter
from weaver_rl.models.scratch import build_tokenizer
from weaver_rl.off_policy import LearnInput, correct
from weaver_rl.records import eval_records, train_records
from weaver_rl.rewards.combine import combine
from weaver_rl.rollout_files import RecordedRollout, write_rollouts
from weaver_rl.run_folder import RunFolder
from weaver_rl.types import Completion, ForwardOutput, Prompt, RewardComponent, Rollout, ScoredRollout

EVIL = "</script><script>alert(1)</script><img src=https://example.com/x onerror=alert(2)>"
TEXTS = ["12 é🎉 ok", "7", "a b c", EVIL, "", "\u2028<!-- ]]> \\u003c", "日本語 x", "-3"]


def run_config(**changes: object) -> RunConfig:
    """A configuration with two rewards, of which one counts a tenth."""
    raw = {
        "name": "quickstart",
        "model": {"name": "scratch"},
        "task": {"name": "reasoning_gym", "dataset": "chain_sum"},
        "num_steps": 10,
        "rewards": [{"name": "task"}, {"name": "length_penalty", "weight": 0.1}],
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 4},
    }
    return RunConfig.model_validate(raw | changes)


def save_tokenizer(run_dir: Path) -> Tokenizer:
    """A byte-level tokenizer in the run's policy, such as a scratch model has: characters fall into bytes."""
    tokenizer = build_tokenizer(["3 + 4 = 7", "ok"] * 3, 300)
    (run_dir / "policy").mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(run_dir / "policy")
    return tokenizer._tokenizer


def make_run(
    path: Path,
    warm_steps: int = 0,
    steps: int = 0,
    *,
    evaluate: bool = True,
    ending: tuple = ("finished", None),
    config: RunConfig | None = None,
) -> RunFolder:
    """A folder with metrics of some steps, a status, and a configuration."""
    folder = RunFolder(path)
    with folder.claim() as claim, MetricsWriter(folder) as writer:
        folder.config_json.write_text((config or run_config()).model_dump_json())
        for step in range(1, warm_steps + steps + 1):
            warm = step <= warm_steps
            values = {"loss": 1 / step, "seconds/learn": 0.4, "seconds/step": 1.0, "tokens_per_s": 1800.0 + step}
            values["seconds/other"] = 0.6 if warm else 0.1
            if not warm:
                values |= {"reward/mean": step / 10, "reward/task/mean": 0.1, f"reward/{EVIL}/mean": 0.2}
                values |= {"logprob_gap/mean": 1e-5, "logprob_gap/max": 0.0, "seconds/sample": 0.5}
                values |= {"sampler/num_tokens": 100, "grad_norm": 0.5, "ratio/ess": 0.9, "rollout/length_mean": 3.0}
            if evaluate and (step == warm_steps or step == warm_steps + steps):
                values["eval/accuracy"] = 0.41 if warm else 0.93
            writer.write(step, "warm_start" if warm else "train", values)
        claim.end(*ending)
    return folder


def group(config: RunConfig, position: int, tokenizer: Tokenizer, step: int, *, missing: int = 0) -> ScoredGroup:
    """One prompt with its completions and rewards; the last `missing` of them have no reward."""
    draw = np.random.default_rng(position)
    members = []
    count = config.rollout.samples_per_prompt
    for index in range(count):
        text = TEXTS[(position + index) % len(TEXTS)]
        ids = [*tokenizer.encode(text).ids, tokenizer.token_to_id("<eos>")]
        completion = Completion(
            token_ids_L=np.array(ids, np.int32),
            logprobs_L=-draw.exponential(1.0, len(ids)).astype(np.float32),
            versions_L=np.sort(draw.integers(max(0, step - 2), step, len(ids))).astype(np.int32),
            stop_reason="stop",
        )
        rollout = Rollout(
            rollout_id=f"{position:08d}-{index:03d}",
            prompt=Prompt(prompt_id=f"p{position}", text=f"prompt-{position} =", token_ids_P=(5, 6, 7), answer="7"),
            completion=completion,
            text=text,
            sample_index=index,
        )
        task = (
            RewardComponent(name="task", value=None, missing="timed out")
            if index >= count - missing
            else RewardComponent(name="task", value=float(draw.integers(0, 4)) / 3)
        )
        length = RewardComponent(name="length_penalty", value=float(draw.random()), seconds=0.01)
        components = (task, length)[: len(config.rewards)]
        members.append(combine(rollout, components, config.rewards))
    return ScoredGroup(group_id=f"{position:08d}", sampler="sampler 0", scored_G=tuple(members), position=position)


def record_step(
    run_dir: Path,
    config: RunConfig,
    step: int,
    groups: list[ScoredGroup],
    *,
    baseline: float = 0.0,
    held_out: list[ScoredGroup] = (),  # type: ignore[assignment]
) -> list[RecordedRollout]:
    """Does with the groups what a step does, but for the learner, whose log-probabilities are the sampler's, moved."""
    batch = build_batch(groups, config.advantage, baseline)
    learn_input = LearnInput.of(batch)
    if learn_input.entries:
        draw = np.random.default_rng(step)
        answers = []
        for entry in learn_input.entries:
            sampler_L = entry.scored.rollout.completion.logprobs_L
            moved_L = (sampler_L + draw.normal(0, 0.6, len(sampler_L))).astype(np.float32)
            head = np.zeros(len(entry.scored.rollout.prompt.token_ids_P) - 1, np.float32)
            answers.append(np.concatenate([head, moved_L]))
        learn_input = correct(learn_input, ForwardOutput(logprobs_per_datum=tuple(answers)), config.correction)
        learn_input = learn_input.with_learner_logprobs(answers)
    records = train_records(batch, step, learn_input if learn_input.entries else None)
    write_rollouts(run_dir, step, [*records, *eval_records(held_out, step)])
    return records


def full_run(path: Path, *, config: RunConfig | None = None, steps: int = 6, ledger: bool = True) -> RunFolder:
    """A run with everything that a report shows."""
    config = config or run_config()
    folder = make_run(path, warm_steps=2, steps=steps, config=config)
    tokenizer = save_tokenizer(path)
    for step in range(3, 3 + steps):
        first = (step - 3) * 2
        groups = [group(config, first, tokenizer, step, missing=step % 3), group(config, first + 1, tokenizer, step)]
        record_step(path, config, step, groups)
    if ledger:
        write_ledger(folder, range(1, 3 + steps), warm_steps=2)
    return folder


def write_ledger(folder: RunFolder, steps: range, warm_steps: int = 0) -> None:
    """Two samplers and a learner, each step a second long."""
    rows = []
    for step in steps:
        for actor, role, seconds in (
            ("sampler 0", "sampler", {"generate": 0.5, "sync": 0.1, "wait for learner": 0.4}),
            ("sampler 1", "sampler", {"generate": 0.25, "sync": 0.25, "wait for learner": 0.5}),
            ("learner 0", "learner", {"learn": 0.75, "wait for samplers": 0.25}),
        ):
            rows.append(
                LedgerRow(
                    step=step,
                    phase="train" if step > warm_steps else "warm_start",
                    actor=actor,
                    role=role,
                    seconds=seconds,
                ).to_json()
            )
    folder.ledger_file.write_text("".join(rows))


def rollout(number: int, reward: float | None, text: str = "7", step: int = 5, **changes: object) -> RecordedRollout:
    """One record of two tokens."""
    completion = Completion(
        token_ids_L=np.zeros(2, np.int32),
        logprobs_L=np.zeros(2, np.float32),
        versions_L=np.zeros(2, np.int32),
        stop_reason="stop",
    )
    prompt = Prompt(prompt_id="p", text=f"prompt-{number}-", token_ids_P=(1,), answer="7")
    missing = "timed out" if reward is None else None
    return RecordedRollout(
        scored=ScoredRollout(
            rollout=Rollout(rollout_id=str(number), prompt=prompt, completion=completion, text=text),
            components=(RewardComponent(name="task", value=reward, missing=missing),),
            reward=reward,
        ),
        step=step,
        sampler="sampler-0",
        advantage=None if reward is None else reward - 0.5,
        **changes,  # type: ignore[arg-type]
    )


def damaged_config(folder: RunFolder, name: str) -> None:
    """A configuration whose names are hostile text: no run could have made it, somebody's editor could."""
    folder.config_json.write_text(json.dumps({"name": name, "model": {"name": name}}))
    folder.config_yaml.write_text(f"name: {name}\n")
