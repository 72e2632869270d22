"""Prompts by position: the same in every process, whole epochs, chat templates, and prompts that are too long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import processors

from weaver_rl.errors import TaskError
from weaver_rl.models.scratch import build_tokenizer
from weaver_rl.tasks.config import CustomTask, JsonlTask, ReasoningGymTask, TaskConfig
from weaver_rl.tasks.load import load_task
from weaver_rl.tasks.prompts import PromptStream, render, sample_texts
from weaver_rl.tasks.task import Problem

pytestmark = pytest.mark.unit

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SUMS = ReasoningGymTask(dataset="chain_sum", args={"max_terms": 2}, prompt_template="{metadata[expression]} =")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["5 + 3 =", "8"], 512)


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = build_tokenizer(["5 + 3 =", "8"], 512)
    tokenizer.chat_template = CHAT
    return tokenizer


def file_task(folder: Path, prompts: list[str], **keys: object) -> tuple[JsonlTask, object]:
    (folder / "a.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": "7"}) + "\n" for p in prompts))
    config = JsonlTask(path="a.jsonl", **keys)
    return config, load_task(config, folder, seed=0)


def stream(task: object, tokenizer: object, config: TaskConfig, length: int = 64, seed: int = 0) -> PromptStream:
    return PromptStream(task, tokenizer, config, length, seed)  # type: ignore[arg-type]


def test_a_resumed_stream_continues_where_the_first_one_was(tokenizer):
    first = stream(load_task(SUMS, Path(), 3), tokenizer, SUMS)
    whole = [first.prompt(i) for i in range(20)]
    resumed = stream(load_task(SUMS, Path(), 3), tokenizer, SUMS)
    assert [resumed.prompt(i) for i in range(10, 20)] == whole[10:]


def test_every_epoch_of_a_file_is_all_of_it_in_another_order(tmp_path, tokenizer):
    config, task = file_task(tmp_path, [f"p{i}" for i in range(50)], eval_fraction=0)
    prompts = stream(task, tokenizer, config)
    epochs = [[prompts.prompt(e * 50 + i).text for i in range(50)] for e in range(3)]
    assert all(sorted(epoch) == sorted(f"p{i}" for i in range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [stream(task, tokenizer, config).prompt(i).text for i in range(50)] == epochs[0]
    assert [stream(task, tokenizer, config, seed=1).prompt(i).text for i in range(50)] != epochs[0]


def test_a_row_that_is_too_long_is_named_with_both_lengths(tmp_path, tokenizer):
    config, task = file_task(tmp_path, ["short", "x" * 40], eval_fraction=0)
    with pytest.raises(TaskError, match=r"a.jsonl line 2: the prompt has 40 tokens, allowed 30"):
        stream(task, tokenizer, config, 30)


def test_or_dropped_and_counted(tmp_path, tokenizer):
    config, task = file_task(tmp_path, ["short", "x" * 40, "small", "y" * 41], eval_fraction=0, on_too_long="drop")
    prompts = stream(task, tokenizer, config, 30)
    assert (prompts.num_dropped, prompts.num_prompts) == (2, 2)
    assert {prompts.prompt(i).text for i in range(2)} == {"short", "small"}
    assert prompts.dropped_note() == "2 of 4 prompts have more than 30 tokens and are left out"
    prompts.eval_prompts(0)
    assert prompts.num_dropped == 2
    with pytest.raises(TaskError, match="all 4 prompts have more than 3 tokens"):
        stream(task, tokenizer, config, 3)


def test_dropped_demonstrations_are_counted_and_told_too(tmp_path, tokenizer):
    config, task = file_task(tmp_path, ["short", "x" * 40, "small"], eval_fraction=0, on_too_long="drop")
    teacher = stream(task, tokenizer, config, 30)
    (tmp_path / "b").mkdir()
    other_config, other = file_task(tmp_path / "b", ["some", "other"], eval_fraction=0, on_too_long="drop")
    prompts = PromptStream(other, tokenizer, other_config, 30, 0, teacher)  # type: ignore[arg-type]
    assert prompts.num_dropped == 1
    assert prompts.dropped_note() == "1 of 3 demonstrations' prompts has more than 30 tokens and is left out"
    assert PromptStream(task, tokenizer, config, 30, 0, teacher).dropped_note() == (  # type: ignore[arg-type]
        "1 of 3 prompts has more than 30 tokens and is left out; "
        "1 of 3 demonstrations' prompts has more than 30 tokens and is left out"
    )
    assert stream(other, tokenizer, other_config, 30).dropped_note() is None


def test_an_endless_task_replaces_what_is_too_long(tokenizer):
    task = load_task(SUMS, Path(), 1)
    lengths = [len(render(task.problem(i), tokenizer, SUMS, 99).token_ids_P) for i in range(60)]
    limit = sorted(lengths)[30]
    assert lengths[0] > limit
    with pytest.raises(TaskError, match=r"problem train-\d+: the prompt has \d+ tokens, allowed"):
        [stream(task, tokenizer, SUMS, limit).prompt(i) for i in range(60)]
    config = SUMS.model_copy(update={"on_too_long": "drop"})
    prompts = stream(task, tokenizer, config, limit)
    assert (prompts.num_dropped, prompts.dropped_note()) == (0, None)
    seen = [prompts.prompt(i) for i in range(60)]
    assert max(len(prompt.token_ids_P) for prompt in seen) <= limit
    dropped = prompts.num_dropped
    assert dropped >= sum(length > limit for length in lengths)
    assert all(len(prompt.token_ids_P) <= limit for prompt in prompts.eval_prompts(40))
    assert prompts.num_dropped == dropped  # held-out prompts are others
    assert prompts.prompt(17) == seen[17]
    with pytest.raises(TaskError, match="problems in a row"):
        stream(task, tokenizer, config, 1)


def test_no_room_for_a_prompt(tokenizer):
    with pytest.raises(TaskError, match="no room"):
        stream(load_task(SUMS, Path(), 0), tokenizer, SUMS, 0)


def test_chat_template_is_used_when_the_tokenizer_has_one(chat_tokenizer, tokenizer):
    problem = Problem(problem_id="a", prompt="5 + 3 =")
    rendered = render(problem, chat_tokenizer, SUMS, 64)
    assert rendered is not None
    assert rendered.text == "[user]5 + 3 =[assistant]"
    assert chat_tokenizer.decode(rendered.token_ids_P) == rendered.text
    never = SUMS.model_copy(update={"chat_template": "never"})
    assert render(problem, chat_tokenizer, never, 64).text == "5 + 3 ="
    assert render(problem, tokenizer, SUMS, 64).text == "5 + 3 ="
    brief = SUMS.model_copy(update={"system_prompt": "Brief."})
    assert render(problem, chat_tokenizer, brief, 64).text == "[system]Brief.[user]5 + 3 =[assistant]"


def test_first_token_is_added_to_text_and_not_again_to_a_chat():
    tokenizer = build_tokenizer(["a"], 300)
    bos = ("<eos>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[bos])
    problem = Problem(problem_id="a", prompt="5")
    assert render(problem, tokenizer, SUMS, 64).token_ids_P[0] == bos[1]
    tokenizer.chat_template = "<eos>" + CHAT
    assert render(problem, tokenizer, SUMS, 64).token_ids_P.count(bos[1]) == 1


def test_chat_templates_that_cannot_be_used_are_errors(chat_tokenizer, tokenizer):
    text = Problem(problem_id="a", prompt="5")
    chat = Problem(problem_id="b", prompt=({"role": "system", "content": "s"}, {"role": "user", "content": "5"}))
    with pytest.raises(TaskError, match="problem b: the prompt is messages, but the tokenizer has no chat template"):
        render(chat, tokenizer, SUMS, 64)
    with pytest.raises(TaskError, match="always, but the tokenizer has no chat template"):
        render(text, tokenizer, SUMS.model_copy(update={"chat_template": "always"}), 64)
    with pytest.raises(TaskError, match="never cannot render"):
        render(chat, chat_tokenizer, SUMS.model_copy(update={"chat_template": "never"}), 64)
    with pytest.raises(TaskError, match="needs a chat template"):
        render(text, tokenizer, SUMS.model_copy(update={"system_prompt": "s"}), 64)
    with pytest.raises(TaskError, match="a system message of its own"):
        render(chat, chat_tokenizer, SUMS.model_copy(update={"system_prompt": "s"}), 64)
    broken = build_tokenizer(["a"], 300)
    broken.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TaskError, match=r"problem b: the chat template refuses it.*roles must alternate"):
        render(chat, broken, SUMS, 64)


def test_demonstration_is_the_gold_answer_and_the_end_token(tokenizer):
    config = SUMS.model_copy(update={"answer_template": " {answer}."})
    prompts = stream(load_task(config, Path(), 0), tokenizer, config)
    prompt, token_ids = prompts.demonstration(4)
    assert prompt == prompts.prompt(4)
    assert token_ids[-1] == tokenizer.eos_token_id
    assert prompts.decode(token_ids) == f" {prompt.answer}."


def test_demonstration_without_an_answer_names_the_prompt(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    config = JsonlTask(path="a.jsonl", eval_fraction=0)
    with pytest.raises(TaskError, match="row-1 has no answer"):
        stream(load_task(config, tmp_path, 0), tokenizer, config).demonstration(0)


LEAKING = """
from weaver_rl.tasks.task import Problem
class Leaking:
    num_problems = {num}
    def problem(self, index): return Problem(problem_id=f"train-{{index}}", prompt=f"p{{index}}")
    def eval_problems(self, num): return [Problem(problem_id=f"eval-{{i}}", prompt=f"p{{i + 3}}") for i in range(num)]
    def scorer(self): return None
"""


def test_a_task_that_leaks_its_evaluation_problems_is_stopped(tmp_path, tokenizer):
    config = CustomTask(name="leaking.py:Leaking")
    (tmp_path / "leaking.py").write_text(LEAKING.format(num=6))
    with pytest.raises(TaskError, match="train-3 reads the same as eval-0"):
        stream(load_task(config, tmp_path, 0), tokenizer, config).eval_prompts(2)
    (tmp_path / "leaking.py").write_text(LEAKING.format(num=None))
    endless = stream(load_task(config, tmp_path, 0), tokenizer, config)
    endless.eval_prompts(2)
    assert endless.prompt(2).text == "p2"
    with pytest.raises(TaskError, match="train-4 reads the same as eval-1"):
        endless.prompt(4)


def test_sample_texts_are_training_prompts_and_answers(tmp_path):
    config, task = file_task(tmp_path, ["a", "b"], eval_fraction=0, answer_template=" {answer}")
    assert list(sample_texts(task, config)) == ["a", " 7", "b", " 7"]  # type: ignore[arg-type]
