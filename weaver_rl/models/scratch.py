"""A small Llama with random weights and a tokenizer made from the task's own texts. It knows no task and no learner."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weaver_rl.models.config import ScratchModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOS, PAD = "<eos>", "<pad>"

PIECES = r" ?\p{L}+| ?[^\s\p{L}\p{N}]+ ?|\s+"
"""What BPE may merge within, beside digits or numbers. No space belongs to a number, so it looks the same after a
space, after an operator and at the start of an answer; spaces around an operator belong to it: `5|3| + |4|7| =`."""


def build_tokenizer(texts: Iterable[str], vocab_size: int, *, split_digits: bool = True) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer: any text survives encoding and decoding; the same texts give the same bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    number = r"\p{N}|" if split_digits else r"\p{N}+|"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(number + PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def llama_config(config: ScratchModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.feed_forward_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=config.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def save_scratch_model(config: ScratchModel, texts: Iterable[str], directory: Path) -> None:
    """Writes tokenizer, configuration and weights as a Hugging Face directory, the same bytes for the same input."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = build_tokenizer(texts, config.vocab_size, split_digits=config.split_digits)
    # The initialisation must neither depend on what was drawn before nor change what is drawn after.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: Any = LlamaForCausalLM(llama_config(config, tokenizer))  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
