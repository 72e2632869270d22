"""From a `model:` section to a local Hugging Face directory, and the few facts everybody needs about it.

It knows neither learner nor sampler: both load the directory themselves.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weaver_rl.errors import ModelError
from weaver_rl.models.config import SMOLLM2, PretrainedModel, ScratchModel
from weaver_rl.models.directories import make_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCRATCH_DIRECTORY = "initial_model"
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def resolve_model(
    config: ScratchModel | PretrainedModel,
    run_dir: Path,
    sample_texts: Callable[[], Iterable[str]],
    base_dir: Path | None = None,
) -> Path:
    """The directory the run starts from. `sample_texts` is asked only by `scratch`, to train its tokenizer.

    A scratch model is written to `run_dir`, and found there again when the run resumes.

    Raises:
        ModelError: names what was looked for and what to write instead.
    """
    if isinstance(config, ScratchModel):
        return _scratch(config, run_dir, list(sample_texts()))
    if config.name == SMOLLM2:
        from weaver_rl.models.smollm2 import smollm2_directory

        return smollm2_directory()
    directory = (base_dir or Path()) / Path(config.name).expanduser()
    if directory.is_dir():
        return check_directory(directory.resolve())
    if config.name.startswith((".", "/", "~")) or config.name.count("/") > 1:
        raise ModelError(f"model.name: directory {directory} is not there")
    return _download(config)


def _scratch(config: ScratchModel, run_dir: Path, texts: list[str]) -> Path:
    from weaver_rl.models.scratch import save_scratch_model

    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    source = {"scratch": config.model_dump(), "texts_sha256": digest}
    return make_once(run_dir / SCRATCH_DIRECTORY, source, lambda aside: save_scratch_model(config, texts, aside))


def _download(config: PretrainedModel) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = snapshot_download(config.name, revision=config.revision, allow_patterns=list(HUB_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        at = f" at revision {config.revision}" if config.revision else ""
        raise ModelError(
            f"model.name: {config.name!r} is no directory, and as a hub id{at} it could not be fetched{offline}: "
            f"{type(error).__name__}: {reason}. Write scratch, {SMOLLM2}, an existing directory, or a hub id that this "
            "machine can download or has in its cache"
        ) from error
    return check_directory(Path(found))


def check_directory(directory: Path) -> Path:
    """The directory itself, if it holds what learner and sampler load."""
    if not (directory / "config.json").is_file():
        raise ModelError(f"model directory {directory} has no config.json: expected a Hugging Face directory")
    if not any(directory.glob("*.safetensors")):
        raise ModelError(f"model directory {directory} has no *.safetensors: convert its weights to safetensors first")
    return directory


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # boundary: tokenizer files of any origin fail in any way
        raise ModelError(f"the tokenizer in {directory} cannot be loaded: {type(error).__name__}: {error}") from error
    return tokenizer


def stop_token_ids(directory: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a completion, ascending: the tokenizer's end token and those of generation_config.json."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    listed = _read_json(directory / "generation_config.json").get("eos_token_id")
    ids |= set(listed) if isinstance(listed, list) else {listed} - {None}
    if not ids:
        raise ModelError(f"{directory} names no end token in tokenizer or generation_config.json: nothing would end")
    return tuple(sorted(int(i) for i in ids))


def max_model_len(directory: Path) -> int:
    """Longest sequence the model was made for, in tokens."""
    config = _read_json(directory / "config.json")
    for section in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
            if isinstance(section.get(key), int):
                return int(section[key])
    raise ModelError(f"{directory / 'config.json'} has no max_position_embeddings")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}
