"""What a server needs of each base model before any actor serves it: its files and limits. It starts no process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from weaver_rl.errors import ConfigError
from weaver_rl.models.resolve import load_tokenizer, max_model_len, resolve_model, stop_token_ids
from weaver_rl.service.calls import LineupModel
from weaver_rl.service.config import ServeConfig, ServedModel
from weaver_rl.tasks.load import load_task
from weaver_rl.tasks.prompts import sample_texts


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """A base model whose files are there."""

    config: ServedModel
    model_dir: Path
    stop_tokens: tuple[int, ...]
    lineup: LineupModel

    @property
    def max_length(self) -> int:
        """Tokens of a sequence at most."""
        return self.lineup.max_length


def prepare_lineup(config: ServeConfig, state_dir: Path) -> dict[str, PreparedModel]:
    """By name. Raises ModelError or ConfigError for a model that cannot be served."""
    return {served.name: _prepare(config, served, state_dir) for served in config.models}


def _prepare(config: ServeConfig, served: ServedModel, state_dir: Path) -> PreparedModel:
    assert config.base_dir is not None
    base_dir, task = config.base_dir, served.task

    def texts() -> Iterable[str]:
        assert task is not None  # checked by ServedModel
        return sample_texts(load_task(task, base_dir, config.seed), task)

    directory = state_dir / "base_models" / _directory_name(served.name)
    model_dir = resolve_model(served.model, directory, texts, base_dir)
    tokenizer = load_tokenizer(model_dir)
    longest = max_model_len(model_dir)
    wanted = served.max_length if served.max_length is not None else longest
    if wanted > longest:
        raise ConfigError(f"models {served.name!r}: max_length is {wanted}, the model was made for {longest} tokens")
    engine_len = served.sampler.engine_args.get("max_model_len", wanted)
    if engine_len != wanted:
        raise ConfigError(
            f"models {served.name!r}: sampler.engine_args.max_model_len is {engine_len}, max_length {wanted}; leave "
            "the first out"
        )
    return PreparedModel(
        config=served,
        model_dir=model_dir,
        stop_tokens=tuple(stop_token_ids(model_dir, tokenizer)),
        lineup=LineupModel(
            name=served.name,
            training_modes=served.training_modes,
            max_length=wanted,
            tokenizer_path=served.tokenizer_path or str(model_dir),
            max_lora_rank=served.max_lora_rank,
            vocab_size=len(tokenizer),
        ),
    )


def _directory_name(name: str) -> str:
    """Another one for every name, and no longer than it: names have neither of the two characters put in."""
    return name.replace("/", "+").replace(":", "=")
