"""Inspection: what was recorded comes out again, factor by factor, and a difference is said."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_runs import EVIL, full_run, group, make_run, record_step, run_config, save_tokenizer, write_ledger
from rich.console import Console

from weaver_rl import cli
from weaver_rl.advantages import Grpo
from weaver_rl.errors import UserError
from weaver_rl.inspection.as_json import rollout_json
from weaver_rl.inspection.explanation import Explanation, explain
from weaver_rl.inspection.recorded_step import RecordedStep, step_of_rollout
from weaver_rl.inspection.rollout_view import print_rollout
from weaver_rl.inspection.step_figures import step_figures
from weaver_rl.inspection.step_view import print_step
from weaver_rl.inspection.terminal_text import clipped, plain
from weaver_rl.metrics import MetricsWriter
from weaver_rl.rollout_files import read_rollouts, write_rollouts
from weaver_rl.run_folder import RunFolder
from weaver_rl.token_texts import TokenReader, as_ids, find_tokenizer

pytestmark = pytest.mark.unit

ADVANTAGES = [
    {"name": "grpo"},
    {"name": "mean_centered"},
    {"name": "rloo"},
    {"name": "reinforce"},
    {"name": "reinforce", "baseline_decay": 0.5},
]
CORRECTIONS = [
    {"name": "none"},
    {"name": "tis", "cap": 1.2},
    {"name": "tis", "level": "sequence"},
    {"name": "mis", "min_ratio": 0.7, "max_ratio": 1.3},
    {"name": "mis", "level": "sequence"},
]


def recorded(path: Path, *, steps: int = 2, **changes: object) -> list[Explanation]:
    """Explanations of every rollout of the last step of a run with these settings."""
    config = run_config(**changes)
    make_run(path, steps=steps, config=config)
    tokenizer = save_tokenizer(path)
    baseline = None
    for step in range(1, steps + 1):
        groups = [group(config, 2 * step, tokenizer, step, missing=1), group(config, 2 * step + 1, tokenizer, step)]
        record_step(path, config, step, groups, baseline=baseline or 0.0)
        rewards = [s.reward for g in groups for s in g.scored_G if s.reward is not None]
        if getattr(config.advantage, "baseline_decay", None):
            baseline = config.advantage.next_baseline(baseline, sum(rewards) / len(rewards))
    read = RecordedStep.read(path, steps)
    return [explain(read, row.scored.rollout.rollout_id) for row in read.rows]


@pytest.mark.parametrize("advantage", ADVANTAGES, ids=str)
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_everything_comes_out_again_as_it_is_stored(tmp_path, advantage, correction):
    loss = {"name": "importance_sampling", "clip_ratio": 0.2}
    found = recorded(tmp_path, advantage=advantage, correction=correction, loss=loss)
    assert len(found) == 8
    assert all(one.equal for one in found), [one.notes for one in found]
    trained = [one for one in found if one.record.dropped is None]
    assert len(trained) == 7
    assert all(token.weight.stored is not None for one in trained for token in one.tokens)
    if advantage.get("baseline_decay"):
        assert all(one.group.baseline for one in trained)
    if correction["name"] != "none":
        factors = {token.correction for one in trained for token in one.tokens if token.weight.stored}
        assert len(factors - {None}) > 1
    for one in trained:
        for token in one.tokens:
            assert token.loss_weight == pytest.approx(float(np.clip(token.weight.stored, -0.2, 0.2)), rel=1e-6)
    assert any(token.is_clipped for one in trained for token in one.tokens)


def test_a_dropped_rollout_says_why_and_has_no_weights(tmp_path):
    (dropped,) = [one for one in recorded(tmp_path) if one.record.dropped is not None]
    assert dropped.record.dropped == "reward missing"
    assert dropped.reward.again is None
    assert all(token.weight.again is None and token.loss_weight is None for token in dropped.tokens)
    assert [part.missing for part in dropped.parts] == ["timed out", None]


def tampered(path: Path, rollout_id: str, **changes: object) -> Explanation:
    rows = [
        replace(row, **changes) if row.scored.rollout.rollout_id == rollout_id else row
        for row in read_rollouts(path, [2])
    ]
    write_rollouts(path, 2, rows)
    return explain(RecordedStep.read(path, 2), rollout_id)


def test_a_difference_is_found_and_said(tmp_path):
    one = next(one for one in recorded(tmp_path, correction={"name": "tis"}) if one.record.advantage)
    rollout_id = one.record.scored.rollout.rollout_id
    weights = one.record.importance_weights_L + np.float32(0.25)
    wrong = tampered(tmp_path, rollout_id, advantage=one.record.advantage + 0.5, importance_weights_L=weights)
    assert not wrong.equal
    assert wrong.reward.equal
    assert not wrong.advantage.equal
    assert wrong.largest_weight_difference == pytest.approx(0.25, rel=1e-3)
    shown = printed(wrong)
    assert "different by -0.5" in shown
    assert "Different from what is stored: advantage, importance weights (by at most 0.25)" in shown


def test_what_cannot_be_computed_again_is_said(tmp_path):
    one = next(one for one in recorded(tmp_path, correction={"name": "tis"}) if one.record.advantage)
    blind = tampered(tmp_path, one.record.scored.rollout.rollout_id, learner_logprobs_L=None)
    assert "log-probabilities were not recorded" in blind.notes[0]
    assert blind.equal is None
    assert blind.reward.equal
    assert blind.advantage.equal
    shown = printed(blind)
    assert "Not computed again: importance weights." in shown
    assert "Different" not in shown
    assert "bit for bit" not in shown


def test_rewards_of_another_configuration_are_not_computed_again(tmp_path):
    one = next(one for one in recorded(tmp_path) if one.record.advantage)
    config = run_config(rewards=[{"name": "task"}, {"name": "length_penalty"}, {"name": "task", "label": "again"}])
    RunFolder(tmp_path).config_json.write_text(config.model_dump_json())
    rollout_id = one.record.scored.rollout.rollout_id
    other = explain(RecordedStep.read(tmp_path, 2), rollout_id)
    assert "rewards of the configuration are not the recorded ones" in other.notes[0]
    assert (other.reward.stored, other.reward.again) == (one.reward.stored, None)
    assert other.equal is None
    shown = printed(other)
    assert f"stored {one.reward.stored:.4g}, not computed again" in shown
    assert "Not computed again: reward." in shown
    wrong = tampered(tmp_path, rollout_id, advantage=one.record.advantage + 0.5)
    assert wrong.equal is False
    assert "Different from what is stored: advantage. Not computed again: reward." in printed(wrong)


def test_what_is_stored_and_comes_out_as_nothing_is_a_difference(tmp_path):
    dropped = next(one for one in recorded(tmp_path) if one.record.dropped is not None)
    rollout_id = dropped.record.scored.rollout.rollout_id
    weights = np.ones(len(dropped.tokens), np.float32)
    wrong = tampered(tmp_path, rollout_id, advantage=0.5, importance_weights_L=weights)
    assert wrong.equal is False
    shown = printed(wrong)
    assert "advantage = –  stored 0.5" in shown
    assert "Different from what is stored: advantage, importance weights (only one side has them)." in shown


def test_an_unknown_baseline_is_said_and_nothing_is_made_of_it(tmp_path):
    advantage = {"name": "reinforce", "baseline_decay": 0.5}
    one = recorded(tmp_path, steps=3, advantage=advantage)[0]
    (tmp_path / "rollouts" / "step_000001.parquet").unlink()
    blind = explain(RecordedStep.read(tmp_path, 3), one.record.scored.rollout.rollout_id)
    assert "baseline is not known" in blind.notes[0]
    assert blind.advantage.again is None
    assert blind.equal is None
    shown = printed(blind)
    assert f"stored {blind.record.advantage:.4g}, not computed again" in shown
    assert "Not computed again: advantage, importance weights." in shown
    assert "Different" not in shown
    as_json = json.loads(rollout_json(blind, None))
    assert as_json["equal"] is None
    assert as_json["reward"]["equal"] is True
    assert as_json["advantage"] == {"stored": blind.record.advantage, "again": None, "equal": None}
    assert as_json["tokens"][0]["weight"]["equal"] is None


def test_of_a_held_out_rollout_no_baseline_is_missed(tmp_path):
    config = run_config(advantage={"name": "reinforce", "baseline_decay": 0.5})
    make_run(tmp_path, steps=1, config=config)
    record_step(tmp_path, config, 0, [], held_out=[group(config, 1, save_tokenizer(tmp_path), 1)])
    step = RecordedStep.read(tmp_path, 0)
    assert step.baseline_unknown is not None
    held_out = explain(step, step.held_out[0].scored.rollout.rollout_id)
    assert (held_out.notes, held_out.equal) == ((), True)


def printed(found: Explanation, tokens=None) -> str:
    out = io.StringIO()
    rollout = found.record.scored.rollout
    print_rollout(
        Console(file=out, width=140), found, tokens or as_ids(rollout.completion.token_ids_L.tolist(), rollout.text)
    )
    return out.getvalue()


def test_the_terminal_shows_every_factor_and_obeys_no_text(tmp_path):
    folder = full_run(tmp_path, config=run_config(correction={"name": "tis"}))
    step = RecordedStep.read(tmp_path, 4)
    row = next(row for row in step.rows if row.scored.rollout.text == EVIL and row.advantage)
    reader = find_tokenizer(tmp_path, {})
    tokens = reader.read(row.scored.rollout.completion.token_ids_L.tolist(), EVIL)
    shown = printed(explain(step, row.scored.rollout.rollout_id), tokens)
    for words in ("prompt-", "length_penalty", "0.1", "grpo: (reward − mean) / (std + eps)", "← this one",
                  "correction tis", "bit for bit", "⟨<eos>⟩"):  # fmt: skip
        assert words in shown
    assert EVIL in shown
    out = io.StringIO()
    print_step(Console(file=out, width=140), step_figures(step))
    for words in ("step 4  train · 2 groups, 8 rollouts", "00000003", "1 × not trained on: reward missing",
                  "1 × reward missing: task timed out", "sampler 0", "50.0%", "wait for learner"):  # fmt: skip
        assert words in out.getvalue(), out.getvalue()
    folder.ledger_file.unlink()
    assert step_figures(step).ledger is None


def test_escape_sequences_of_a_rollout_are_written_out():
    assert plain("a\x1b[2Jb\r\x07\ud800\u202ec\n") == "a\\x1b[2Jb\\r\\x07\\ud800\\u202ec\n"
    assert clipped("one\n\x1btwo three", 9) == "one \\x1b…"


def test_a_step_without_rollouts_is_shown_and_an_unknown_one_refused(tmp_path):
    make_run(tmp_path, warm_steps=1, steps=1)
    figures = step_figures(RecordedStep.read(tmp_path, 1))
    assert (figures.groups, figures.line.phase, figures.ledger) == ((), "warm_start", None)
    with pytest.raises(UserError, match=r"no step 9; there are steps 1 to 2"):
        RecordedStep.read(tmp_path, 9)
    with pytest.raises(UserError, match="none was recorded"):
        step_of_rollout(tmp_path, "00000001-000")


def test_the_evaluation_before_training_is_shown(tmp_path):
    folder = make_run(tmp_path)
    with MetricsWriter(folder) as metrics:
        metrics.write(0, "train", {"eval/accuracy": 0.25, "eval/num_prompts": 1})
    step = RecordedStep.read(tmp_path, 0)
    out = io.StringIO()
    print_step(Console(file=out, width=140), step_figures(step))
    assert "step 0  train · 0 groups, 0 rollouts, 0 held out" in out.getvalue()
    assert "accuracy 0.25" in out.getvalue()


def test_a_rollout_is_found_wherever_it_was_trained(tmp_path):
    full_run(tmp_path)
    assert step_of_rollout(tmp_path, "00000004-001") == 5
    assert step_of_rollout(tmp_path, "00000011-003") == 8
    with pytest.raises(UserError, match="an id looks like 0000"):
        step_of_rollout(tmp_path, "nonsense")


# -- token texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["12 é🎉 ok", "", "日本語 x", "a\u2028b", EVIL, "é" * 50])
def test_token_texts_together_are_the_text(tmp_path, text):
    tokenizer = save_tokenizer(tmp_path)
    ids = [*tokenizer.encode(text).ids, tokenizer.token_to_id("<eos>")]
    read = TokenReader(tokenizer).read(ids, text)
    assert read.complete
    assert "".join(read.texts) == text
    assert read.labels[len(ids) - 1] == "<eos>"
    assert all(read.texts[i] == "" for i in read.labels)


def test_bytes_that_are_no_character_and_unknown_ids_keep_their_place(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    party = tokenizer.encode("a🎉").ids
    cut = TokenReader(tokenizer).read(party[:3], tokenizer.decode(party[:3]))
    assert cut.complete
    assert cut.texts == ("a", "", "\ufffd")
    assert cut.labels == {1: "F0"}
    odd = TokenReader(tokenizer).read([party[0], 10_000, party[0]], "aa")
    assert odd.texts[0] == "a"
    assert odd.labels[1] == "#10000"


def test_a_text_that_the_tokens_do_not_give_is_said(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    assert not TokenReader(tokenizer).read(tokenizer.encode("abc").ids, "something else").complete


def test_a_tokenizer_is_found_beside_the_configuration_or_not_at_all(tmp_path):
    save_tokenizer(tmp_path / "models" / "mine")
    model = {"name": "models/mine/policy"}
    assert find_tokenizer(tmp_path / "run", {"model": model, "base_dir": str(tmp_path)}) is not None
    assert find_tokenizer(tmp_path / "run", {"model": {"name": "nobody/has-this"}}) is None
    assert find_tokenizer(tmp_path / "run", {}) is None


# -- commands ----------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["weaver-rl", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_inspect_as_json(monkeypatch, capsys, tmp_path):
    folder = full_run(tmp_path, config=run_config(correction={"name": "mis"}))
    write_ledger(folder, range(1, 9))
    assert command(monkeypatch, "inspect", tmp_path, "--step", 5, "--json") == 0
    step = json.loads(capsys.readouterr().out)
    assert step["dropped"] == {"reward missing": 2}
    assert [len(one["rewards"]) for one in step["groups"]] == [4, 4]
    assert step["groups"][0]["rollout_ids"][1] == "00000004-001"
    assert step["ledger"][0]["seconds"]["generate"] == 0.5
    assert command(monkeypatch, "inspect", tmp_path, "--rollout", "00000004-001", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is True
    assert found["correction"].startswith("mis (max_ratio 2.0")
    assert "".join(token["text"] for token in found["tokens"]) == found["completion"]
    assert found["group"]["eps"] == Grpo().eps


def test_mistakes_are_one_message(monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, "inspect", tmp_path, "--step", 1) == 2
    assert "holds no run" in capsys.readouterr().err
    full_run(tmp_path)
    assert command(monkeypatch, "inspect", tmp_path) == 2
    assert "--step S, or --rollout ID" in capsys.readouterr().err
    assert command(monkeypatch, "inspect", tmp_path, "--step", 5, "--rollout", "x") == 2
    assert "step 5" in capsys.readouterr().err


def test_report_as_a_command(monkeypatch, capsys, tmp_path):
    full_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "report", "run", "--steps", "3:5", "--max-rollouts", 10) == 0
    assert (tmp_path / "run" / "report.html").exists()
    assert command(monkeypatch, "report", "run", "run", "--out", "both.html") == 0
    assert "2 runs" in (tmp_path / "both.html").read_text()
    assert command(monkeypatch, "report", "nowhere") == 2
    assert "holds no run" in capsys.readouterr().err
