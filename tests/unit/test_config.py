"""Every configuration that ships, overrides, and the words for each kind of mistake."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from weaver_rl.advantages import Grpo
from weaver_rl.config import RunConfig, dump_config, load_config
from weaver_rl.errors import ConfigError
from weaver_rl.learner.config import ScheduleConfig
from weaver_rl.section import Section

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "name": "small",
    "model": {"name": "scratch"},
    "task": {"name": "reasoning_gym", "dataset": "chain_sum"},
    "num_steps": 3,
    "rewards": [{"name": "task"}, {"name": "length_penalty", "weight": 0.5}],
}


def write(path: Path, changes: dict[str, Any] | None = None, text: str | None = None) -> Path:
    file = path / "run.yaml"
    file.write_text(yaml.safe_dump(SMALL | (changes or {})) if text is None else text)
    return file


def refusal(path: Path, *overrides: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(write(path, changes), overrides)
    text = str(refused.value)
    assert "Traceback" not in text
    assert "pydantic" not in text
    return text


# -- what loads ------------------------------------------------------------------------------------------------------


def test_there_are_configs():
    assert (ROOT / "configs" / "quickstart.yaml").exists()


RUNS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("serve_"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_config_loads_and_round_trips_to_an_equal_object(path: Path, tmp_path: Path):
    config = load_config(path)
    assert config.name == path.stem
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_defaults_of_a_small_run(tmp_path: Path):
    config = load_config(write(tmp_path))
    assert isinstance(config.advantage, Grpo)
    assert config.correction.name == "none"
    assert config.loss.name == "importance_sampling"
    assert config.warm_start is None
    assert config.folder == Path("runs/small")
    assert config.base_dir == tmp_path.resolve()
    assert config.deciding_reward == "task"
    assert config.rollout.max_lag == 0


def test_base_dir_that_is_null_is_the_directory_of_the_file(tmp_path: Path):
    assert load_config(write(tmp_path, {"base_dir": None})).base_dir == tmp_path.resolve()
    assert load_config(write(tmp_path, {"base_dir": "/elsewhere"})).base_dir == Path("/elsewhere")


def test_run_dir_and_deciding_reward_can_be_given(tmp_path: Path):
    config = load_config(write(tmp_path, {"run_dir": "/data/x", "eval": {"reward": "length_penalty"}}))
    assert config.folder == Path("/data/x")
    assert config.deciding_reward == "length_penalty"


def test_sections_are_frozen(tmp_path: Path):
    config = load_config(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.num_steps = 4


# -- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_nest_make_sections_and_reach_into_lists(tmp_path: Path):
    config = load_config(
        write(tmp_path),
        [
            "num_steps=7",
            "rollout.sampling.temperature=0.5",
            "learner.learning_rate=3e-4",
            "rewards.1.weight=2",
            "sampler.engine_args.max_model_len=512",
            "warm_start={num_steps: 4}",
            "warm_start.learning_rate=0.5",
            "run_dir=",
        ],
    )
    assert config.num_steps == 7
    assert config.rollout.sampling.temperature == 0.5
    assert config.learner.learning_rate == 3e-4
    assert config.rewards[1].weight == 2
    assert config.sampler.engine_args == {"max_model_len": 512}
    assert config.warm_start is not None
    assert (config.warm_start.num_steps, config.warm_start.learning_rate) == (4, 0.5)
    assert config.run_dir is None


def test_a_value_may_contain_an_equals_sign(tmp_path: Path):
    config = load_config(write(tmp_path), ["task.prompt_template='{question} ='"])
    assert config.task.prompt_template == "{question} ="


def test_an_override_replaces_a_list_item(tmp_path: Path):
    assert load_config(write(tmp_path), ["rewards.0={name: numeric}"]).rewards[0].name == "numeric"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("num_steps", r"'num_steps': the form is key\.path=value"),
        ("=3", r"the form is key\.path=value"),
        ("num_steps=[", "the value is not YAML"),
        ("num_steps.x=1", "num_steps is 3, it has no keys"),
        ("rewards.2.weight=1", r"rewards\.2 is no item of a list of 2"),
        ("rewards.-1.weight=1", r"rewards\.-1 is no item"),
        ("rewards.²=1", r"rewards\.² is no item"),
        ("lerner.learning_rate=1", "lerner: unknown key; did you mean 'learner'"),
    ],
)
def test_bad_overrides_say_what_is_wrong(tmp_path: Path, override: str, words: str):
    with pytest.raises(ConfigError, match=words):
        load_config(write(tmp_path), [override])


# -- unknown keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_stepz": 1}, "num_stepz: unknown key; did you mean 'num_steps'?"),
        ({"rollout": {"promts_per_step": 1}}, "rollout.promts_per_step: unknown key; did you mean 'prompts_per_step'?"),
        (
            {"rollout": {"sampling": {"temprature": 1}}},
            "rollout.sampling.temprature: unknown key; did you mean 'temperature'?",
        ),
        ({"advantage": {"name": "grpo", "epz": 1}}, "advantage.epz: unknown key; did you mean 'eps'?"),
        ({"correction": {"name": "tis", "kap": 1}}, "correction.kap: unknown key; did you mean 'cap'?"),
        (
            {"loss": {"name": "importance_sampling", "clip_ration": 1}},
            "loss.clip_ration: unknown key; did you mean 'clip_ratio'?",
        ),
        (
            {"model": {"name": "scratch", "hiden_size": 64}},
            "model.hiden_size: unknown key; did you mean 'hidden_size'?",
        ),
        ({"rewards": [{"name": "task", "wieght": 1}]}, "rewards.0.wieght: unknown key; did you mean 'weight'?"),
        (
            {"learner": {"schedule": {"warmup": 1}}},
            "learner.schedule.warmup: unknown key; did you mean 'warmup_steps'?",
        ),
        ({"warm_start": {"num_steps": 1, "lr": 1}}, "warm_start.lr: unknown key; allowed: learning_rate, loss, "),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, changes: dict[str, Any], words: str):
    text = refusal(tmp_path, **changes)
    assert words in text
    assert text.startswith(str(tmp_path / "run.yaml"))


def test_a_key_of_another_alternative_is_not_offered(tmp_path: Path):
    text = refusal(tmp_path, advantage={"name": "mean_centered", "eps": 1})
    assert text.endswith("advantage.eps: 'mean_centered' has no eps; allowed: name")
    text = refusal(tmp_path, task={"name": "my_tasks:Sums", "dataset": "x"})
    assert "task.dataset: unknown key; allowed: answer_template, args, " in text
    assert "eval_fraction" not in text
    text = refusal(tmp_path, "correction.cap=null", correction={"name": "none"})
    assert text.endswith("correction.cap: 'none' has no cap; allowed: name")


def test_another_loss_over_a_file_that_sets_a_key_of_the_old_one(tmp_path: Path):
    text = refusal(tmp_path, "loss.name=cross_entropy", loss={"name": "importance_sampling", "clip_ratio": 5})
    assert text.endswith("loss.clip_ratio: 'cross_entropy' has no clip_ratio; allowed: aggregation, name")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": {"name": "my_tasks:Sums", "eror_rate": 0.1}}, "a custom class's own keys go under args"),
        ({"rewards": [{"name": "length_penalty", "soft": 3}]}, "keys of what `name` names go under args"),
    ],
)
def test_keys_that_belong_under_args(tmp_path: Path, changes: dict[str, Any], words: str):
    text = refusal(tmp_path, **changes)
    assert text.endswith(words)
    assert "did you mean" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"advantage": {"name": "gpro"}},
            "advantage.name: seen 'gpro'; allowed: grpo, mean_centered, reinforce, rloo; did",
        ),
        ({"advantage": {"eps": 1}}, "advantage.name: missing; allowed: grpo, mean_centered, reinforce, rloo"),
        ({"loss": {"name": "ppo"}}, "loss.name: seen 'ppo'; allowed: cross_entropy, importance_sampling"),
        ({"rewards": [{"name": "tsk"}]}, "did you mean 'task'?"),
        ({"task": {"name": "reasonin_gym"}}, "did you mean 'reasoning_gym'?"),
        ({"model": {"name": None}}, "model: model needs a name: scratch, "),
        ({"model": {}}, "model: model needs a name: scratch, "),
    ],
)
def test_an_unknown_name_names_what_is_allowed(tmp_path: Path, changes: dict[str, Any], words: str):
    assert words in refusal(tmp_path, **changes)


# -- wrong values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key", "seen", "allowed"),
    [
        ({"num_steps": "three"}, "num_steps:", "seen 'three'", "valid integer"),
        ({"num_steps": -1}, "num_steps:", "seen -1", "greater than or equal to 0"),
        ({"loss": {"name": "importance_sampling", "clip_ratio": 0}}, "loss.clip_ratio:", "seen 0", "greater than 0"),
        ({"rollout": {"sampling": {"top_p": 1.5}}}, "rollout.sampling.top_p:", "seen 1.5", "less than or equal to 1"),
        ({"rollout": {"max_lag": -1}}, "rollout.max_lag:", "seen -1", "greater than or equal to 0"),
        ({"rollout": 3}, "rollout:", "seen 3", "a mapping of keys is needed"),
        ({"model": "foo"}, "model:", "seen 'foo'", "a mapping of keys is needed"),
        ({"loss": None}, "loss:", "seen None", "a mapping of keys is needed"),
        ({"sampler": {"engine_args": 3}}, "sampler.engine_args:", "seen 3", "a mapping of keys is needed"),
        ({"rewards": "foo"}, "rewards:", "seen 'foo'", "a list is needed"),
        ({"run_dir": 3}, "run_dir:", "seen 3", "a path is needed"),
        ({"num_steps": True}, "num_steps:", "seen True", "a number is needed"),
        ({"learner": {"learning_rate": True}}, "learner.learning_rate:", "seen True", "a number is needed"),
        ({"sampler": {"num_gpus": True}}, "sampler.num_gpus:", "seen True", "a number is needed"),
        ({"learner": {"schedule": {"name": "cosin"}}}, "learner.schedule.name:", "seen 'cosin'", "'cosine'"),
        ({"learner": {"learning_rate": float("nan")}}, "learner.learning_rate:", "seen nan", "finite"),
        ({"rewards": []}, "rewards:", "seen []", "at least 1"),
        ({"name": "a b"}, "name:", "seen 'a b'", "pattern"),
        ({"cluster": {"placement": "both"}}, "cluster.placement:", "seen 'both'", "'split' or 'colocated'"),
    ],
)
def test_a_wrong_value_shows_key_seen_and_allowed(tmp_path: Path, changes: Any, key: str, seen: str, allowed: str):
    text = refusal(tmp_path, **changes)
    assert f": {key} {seen}; " in text
    assert allowed in text
    assert not re.search(r"class|dictionary|tuple|Config|Model", text)


def test_no_is_no_number_but_1e_4_and_a_real_switch_are_as_they_read(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"eval\.every: seen False; a number is needed"):
        load_config(write(tmp_path), ["eval.every=no"])
    switches = ["learner.learning_rate=1e-4", "learner.activation_checkpointing=yes", "model.tie_embeddings=true"]
    config = load_config(write(tmp_path), [*switches, "rewards.0.args={flag: true}"])
    assert config.learner.learning_rate == 1e-4
    assert config.learner.activation_checkpointing is True
    assert config.rewards[0].args == {"flag": True}

    class Either(Section):
        limit: float | bool | None = None

    assert Either(limit=True).limit is True


def test_errors_of_a_section_name_the_section_not_its_kind(tmp_path: Path):
    text = refusal(tmp_path, model={"name": "scratch", "hidden_size": 100, "num_heads": 3})
    assert ": model: hidden_size 100 is not divisible by num_heads 3" in text


def test_a_missing_key_is_named(tmp_path: Path):
    file = write(tmp_path, text=yaml.safe_dump({k: v for k, v in SMALL.items() if k != "num_steps"}))
    with pytest.raises(ConfigError, match="num_steps: missing, must be given"):
        load_config(file)


def test_several_mistakes_are_all_told(tmp_path: Path):
    text = refusal(tmp_path, num_steps="x", naem=1)
    assert "num_steps: seen 'x'" in text
    assert "naem: unknown key; did you mean 'name'?" in text
    assert text.count("\n") == 2


# -- across sections -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout": {"samples_per_prompt": 1}}, ["advantage.name grpo", "samples_per_prompt is 1"]),
        ({"rollout": {"sampling": {"temperature": 0}}}, ["temperature is 0"]),
        ({"loss": {"name": "cross_entropy"}}, ["loss.name is cross_entropy", "num_steps: 0"]),
        (
            {"sampler": {"engine_args": {"max_model_len": 64}}, "rollout": {"sampling": {"max_tokens": 96}}},
            ["max_model_len is 64", "max_tokens 96"],
        ),
        (
            {"sampler": {"tensor_parallel": 2}, "weights": {"transport": "object_store"}},
            ["transport is object_store", "tensor_parallel 2"],
        ),
        ({"rewards": [{"name": "task"}, {"name": "task"}]}, ["rewards 0 and 1 are both recorded as 'task'", "label"]),
        ({"eval": {"reward": "tusk"}}, ["eval.reward is 'tusk'", "['task', 'length_penalty']"]),
        ({"sampler": {"engine_args": {"model": "x"}}}, ["sampler.engine_args", "'model'", "model.name"]),
        ({"sampler": {"engine_args": {"max_model_len": "1k"}}}, ["sampler.engine_args", "'1k'", "a number of tokens"]),
        ({"sampler": {"engine_args": {"max_model_len": 0}}}, ["sampler.engine_args", "is 0", "a number of tokens"]),
    ],
)
def test_contradictions_print_both_sides(tmp_path: Path, changes: dict[str, Any], words: list[str]):
    text = refusal(tmp_path, **changes)
    assert all(word in text for word in words)


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout": {"samples_per_prompt": 1}, "advantage": {"name": "reinforce"}},
        {"num_steps": 0, "loss": {"name": "cross_entropy"}},
        {"num_steps": 0, "rollout": {"sampling": {"temperature": 0}}},
        {"rewards": [{"name": "task"}, {"name": "task", "label": "again"}]},
        {"sampler": {"engine_args": {"max_model_len": 64}}, "rollout": {"sampling": {"max_tokens": 63}}},
    ],
)
def test_what_only_looks_like_a_contradiction_loads(tmp_path: Path, changes: dict[str, Any]):
    load_config(write(tmp_path, changes))


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [("- a\n- b\n", "a mapping of keys is needed, seen list"), ("", "seen NoneType"), ("a: [", "not YAML")],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, words: str):
    with pytest.raises(ConfigError, match=words):
        load_config(write(tmp_path, text=text))


def test_a_key_given_twice_is_named(tmp_path: Path):
    text = yaml.safe_dump(SMALL) + "learner:\n  num_ranks: 1\n  num_cpus: 1\n  num_ranks: 2\n"
    with pytest.raises(ConfigError, match=r"run\.yaml: key 'num_ranks' is given twice, in lines \d+ and \d+; keep one"):
        load_config(write(tmp_path, text=text))
    with pytest.raises(ConfigError, match=r"override .*: key 'num_cpus' is given twice, in line 1; keep one"):
        load_config(write(tmp_path), ["learner={num_cpus: 1, num_cpus: 2}"])


def test_anchors_and_merge_keys_are_no_repetition(tmp_path: Path):
    warm_start = "warm_start: {num_steps: 1, schedule: &s {name: linear, warmup_steps: 3}}\n"
    learner = "learner:\n  schedule:\n    <<: *s\n    <<: {min_ratio: 0.5}\n    warmup_steps: 4\n"
    text = yaml.safe_dump(SMALL) + warm_start + learner
    config = load_config(write(tmp_path, text=text))
    assert config.learner.schedule == ScheduleConfig(name="linear", warmup_steps=4, min_ratio=0.5)
    assert config.warm_start is not None
    assert config.warm_start.schedule.warmup_steps == 3


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "run.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(tmp_path / "run.yaml")


def test_importing_the_configuration_is_light():
    code = (
        "import sys, weaver_rl.config, weaver_rl.cli\n"
        "heavy = {'ray', 'vllm', 'torch', 'transformers', 'reasoning_gym'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
