"""Tokenizer, template and lengths: what is right passes, and each thing that can be wrong is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from check_parts import a_run, lines

from weaver_rl.check.given import Given
from weaver_rl.check.prompts import check_prompts
from weaver_rl.check.subject import RunUnderCheck

pytestmark = pytest.mark.unit

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def with_tokenizer(run: RunUnderCheck, **changes: object) -> RunUnderCheck:
    """The run's own tokenizer with attributes changed."""
    tokenizer = run.tokenizer.get()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return run


def with_model(run: RunUnderCheck, **changes: object) -> RunUnderCheck:
    run.tokenizer.get()
    model = Given("the model", lambda: dataclasses.replace(run.model.get(), **changes))
    return dataclasses.replace(run, model=model)


def found(run: RunUnderCheck):
    return lines(check_prompts(run))


def test_a_good_run_passes_every_line():
    seen = found(a_run())
    assert list(seen) == ["tokenizer", "stop tokens", "chat template", "round trip", "prompt lengths"]
    assert {finding.level for finding in seen.values()} == {"pass"}
    assert "'<eos>' (1)" in seen["stop tokens"].seen
    assert "room 58 (sequences of 64 less max_tokens 6)" in seen["prompt lengths"].seen
    assert "the tokenizer has none" in seen["chat template"].seen


def test_a_tokenizer_larger_than_the_model_fails():
    small = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=10))
    line = found(with_model(a_run(), config=_with_length(small)))["tokenizer"]
    assert line.level == "fail"
    assert "the model has 10" in line.seen


def _with_length(config: SimpleNamespace) -> SimpleNamespace:
    config.max_position_embeddings = 64
    return config


def test_a_model_without_end_token_fails(tmp_path: Path):
    run = a_run()
    run.tokenizer.get()
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    moved = with_model(run, directory=tmp_path)
    run.tokenizer.get().eos_token = None
    line = found(moved)["stop tokens"]
    assert line.level == "fail"
    assert "nothing would end" in line.seen


def test_stop_tokens_beyond_the_vocabulary_fail(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 99999]}))
    line = found(with_model(a_run(), directory=tmp_path))["stop tokens"]
    assert line.level == "fail"
    assert "[99999]" in line.seen


def test_a_chat_template_shows_how_it_opens_the_turn():
    line = found(with_tokenizer(a_run(), chat_template=CHATML))["chat template"]
    assert (line.level, "'<|assistant|>'" in line.seen) == ("pass", True)


def test_a_template_that_does_not_open_the_turn_is_a_warning():
    run = with_tokenizer(a_run(), chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    line = found(run)["chat template"]
    assert (line.level, "ignores add_generation_prompt" in line.seen) == ("warn", True)


def test_a_beginning_written_twice_is_a_warning():
    run = with_tokenizer(a_run(), chat_template="<eos><eos>" + CHATML, bos_token="<eos>")
    seen = [line for line in check_prompts(run) if line.level == "warn"]
    assert "every prompt begins with '<eos>' twice" in seen[0].seen
    once = with_tokenizer(a_run(), chat_template="<eos>" + CHATML, bos_token="<eos>")
    assert not [line for line in check_prompts(once) if line.level == "warn"]


def test_text_that_changes_by_encoding_is_shown():
    run = a_run()
    tokenizer = run.tokenizer.get()
    whole = type(tokenizer).decode
    tokenizer.decode = lambda ids, **more: whole(tokenizer, ids, **more).replace(" ", "")
    line = found(run)["round trip"]
    assert line.level == "warn"
    assert "reads differently" in line.seen


@pytest.mark.parametrize(
    ("overrides", "level", "words"),
    [
        (["rollout.sampling.max_tokens=61"], "fail", "100% are too long"),
        (["sampler.engine_args.max_model_len=9"], "fail", "100% are too long"),
        (["rollout.sampling.max_tokens=61", "task.on_too_long=drop"], "fail", "100% are too long"),
    ],
)
def test_no_room_for_prompts_fails(overrides: list[str], level: str, words: str):
    line = found(a_run(*overrides))["prompt lengths"]
    assert (line.level, words in line.seen) == (level, True), line


def jsonl(tmp_path: Path, rows: list[dict[str, str]]) -> list[str]:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"base_dir={tmp_path}",
        "task={name: jsonl, path: train.jsonl}",
        "rewards=[{name: numeric}]",
        "warm_start=null",
    ]


def test_some_prompts_too_long_fail_or_are_said_to_be_dropped(tmp_path: Path):
    rows = [{"prompt": f"{i} + 1 =" + (" +1" * 60 if i % 4 == 0 else ""), "answer": "1"} for i in range(40)]
    overrides = [*jsonl(tmp_path, rows), "model.max_position_embeddings=48"]
    line = found(a_run(*overrides))["prompt lengths"]
    assert line.level == "fail"
    assert "task.on_too_long: drop" in line.advice
    line = found(a_run(*overrides, "task.on_too_long=drop"))["prompt lengths"]
    assert line.level == "warn"
    assert "train.jsonl line" in line.seen


def test_prompts_without_the_answer_that_a_reward_compares_with(tmp_path: Path):
    rows = [{"prompt": f"{i} + 1 ="} | ({"answer": "1"} if i % 2 else {}) for i in range(40)]
    line = found(a_run(*jsonl(tmp_path, rows)))["answers"]
    assert line.level == "fail"
    assert "numeric compares with it" in line.seen
    few = found(a_run(*jsonl(tmp_path, rows), "reward_workers.max_missing_fraction=0.9"))["answers"]
    assert few.level == "warn"
    assert "answers" not in found(
        a_run(*jsonl(tmp_path, rows), "rewards=[{name: length_penalty, args: {soft: 1, max: 2}}]")
    )
