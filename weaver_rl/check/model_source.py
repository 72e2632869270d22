"""Finds the model of a run without loading weights: its configuration, its tokenizer, where its weights are.

It follows weaver_rl.models.resolve, but writes no scratch model and downloads no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weaver_rl.check.weight_files import weight_bytes
from weaver_rl.errors import ModelError
from weaver_rl.models.config import SMOLLM2, PretrainedModel, ScratchModel
from weaver_rl.models.resolve import (
    HUB_FILES,
    check_directory,
    load_tokenizer,
    max_model_len,
    stop_token_ids,
)

HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    """A model, as far as it can be known without its weights."""

    where: str
    """In words: made by the run, a directory, on the hub."""
    directory: Path | None
    """Of its configuration and tokenizer; None: made from nothing, at the start of the run."""
    config: Any
    """The configuration of transformers."""
    tokenizer: Callable[[], Any]
    """Loads the tokenizer."""
    download_bytes: int = 0
    """Weights that are still on the hub."""

    def stop_tokens(self, tokenizer: Any) -> tuple[int, ...]:
        if self.directory is None:
            return (int(tokenizer.eos_token_id),)
        return stop_token_ids(self.directory, tokenizer)

    def max_length(self) -> int:
        """Longest sequence, in tokens."""
        return int(self.config.max_position_embeddings) if self.directory is None else max_model_len(self.directory)


def find_model(
    config: ScratchModel | PretrainedModel, base_dir: Path, sample_texts: Callable[[], Iterable[str]]
) -> FoundModel:
    """Raises ModelError: names what was looked for, and where."""
    if isinstance(config, ScratchModel):
        return _scratch(config, sample_texts)
    if config.name == SMOLLM2:
        from weaver_rl.models.smollm2 import smollm2_directory

        return _local(smollm2_directory())
    directory = base_dir / Path(config.name).expanduser()
    if directory.is_dir():
        return _local(check_directory(directory.resolve()))
    if config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise ModelError(f"model.name: directory {directory} is not there")
    return _on_hub(config, directory)


def _scratch(config: ScratchModel, sample_texts: Callable[[], Iterable[str]]) -> FoundModel:
    from weaver_rl.models.scratch import build_tokenizer, llama_config

    tokenizer = build_tokenizer(sample_texts(), config.vocab_size, split_digits=config.split_digits)
    return FoundModel(
        where="made from nothing at the start of the run",
        directory=None,
        config=llama_config(config, tokenizer),
        tokenizer=lambda: tokenizer,
    )


def _local(directory: Path, download_bytes: int = 0) -> FoundModel:
    size = download_bytes or weight_bytes(directory)
    of_weights = f"{size / 1e9:.3g} GB of weights"
    return FoundModel(
        where=f"{of_weights} to download from the hub" if download_bytes else f"{of_weights} in {directory}, whole",
        directory=directory,
        config=_read_config(directory),
        tokenizer=lambda: load_tokenizer(directory),
        download_bytes=download_bytes,
    )


def _read_config(directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{directory / 'config.json'} is no configuration that transformers knows: {error}") from error


def _on_hub(config: PretrainedModel, directory: Path) -> FoundModel:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        cached = Path(
            snapshot_download(
                config.name, revision=config.revision, allow_patterns=list(HUB_FILES), local_files_only=True
            )
        )
        if (cached / "config.json").is_file() and any(cached.glob("*.safetensors")):
            return _local(cached)
    except (LocalEntryNotFoundError, ValueError):
        pass  # not in the cache: the hub is asked
    small = [pattern for pattern in HUB_FILES if pattern != "*.safetensors"]
    try:
        info = HfApi().model_info(config.name, revision=config.revision, files_metadata=True, timeout=HUB_TIMEOUT_S)
        sizes = [file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors")]
        found = Path(snapshot_download(config.name, revision=config.revision, allow_patterns=small))
    except Exception as error:  # boundary: HTTP clients of several versions raise what they like
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")[:200]
        kind = "refused" if isinstance(error, HfHubHTTPError) else "could not be asked"
        raise ModelError(
            f"model.name: {config.name!r} is not here: no directory {directory}, not in the hub's cache, and the hub "
            f"{kind} ({type(error).__name__}: {reason}). Download it first (hf download {config.name}), or give a "
            "directory"
        ) from error
    if not sizes:
        raise ModelError(f"model.name: {config.name!r} has no *.safetensors on the hub: convert its weights first")
    return _local(found, download_bytes=sum(sizes))
