"""The real small model: smollm2 once from its package into a cache, with the right tokenizer, and it answers."""

from __future__ import annotations

import pytest
from conftest import resolve_smollm2 as resolve

from weaver_rl.models.resolve import load_tokenizer, max_model_len, stop_token_ids

pytestmark = pytest.mark.ray


def test_nothing_is_left_beside_it_and_the_cache_is_used_again(smollm2, monkeypatch):
    cache, directory = smollm2
    assert [file.name for file in directory.parent.iterdir() if file.is_dir()] == ["smollm2-135m-instruct"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    before = (directory / "model.safetensors").stat()
    assert resolve() == directory
    assert (directory / "model.safetensors").stat() == before


def test_tokenizer_has_chat_template_end_token_and_single_digits(smollm2):
    _, directory = smollm2
    tokenizer = load_tokenizer(directory)
    assert tokenizer.eos_token == "<|im_end|>"
    assert stop_token_ids(directory, tokenizer) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert max_model_len(directory) == 8192
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.tokenize("12  345") == ["1", "2", "ĠĠ", "3", "4", "5"]


def test_it_answers(smollm2):
    import torch
    from transformers import AutoModelForCausalLM

    _, directory = smollm2
    tokenizer = load_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    prompt = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    output = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id
