"""From token ids to the text of each token, such that the texts together are the completion. It knows no run.

Byte-level tokenizers split characters over tokens: the last token of a character gets it, the ones before it a label
of their bytes and no text. Special tokens are no part of a completion's text and get a label as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from weaver_rl.models.config import SMOLLM2

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTexts:
    """The tokens of one completion as text.

    Example:
        TokenTexts(texts=("7", "", "é", ""), labels={1: "C3", 3: "<eos>"}, complete=True)
    """

    texts: tuple[str, ...]
    """What each token adds to the text; empty for a part of a character and for a special token."""
    labels: Mapping[int, str] = field(default_factory=dict)
    """What to show for the tokens that add nothing: bytes in hex, the name of a special token, or the id."""
    complete: bool = True
    """Whether the texts together are the stored text of the completion."""


class TokenReader:
    """Reads tokens as text with the tokenizer of a run.

    Example:
        TokenReader(Tokenizer.from_file("policy/tokenizer.json")).read([52, 1], text="7")
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {number: token.content for number, token in added.items() if token.special}

    def read(self, token_ids: Sequence[int], text: str) -> TokenTexts:
        """The text of each token of a completion whose text is stored as `text`."""
        stream = DecodeStream(skip_special_tokens=True)
        texts = [self._step(stream, int(token_id)) for token_id in token_ids]
        joined = "".join(texts)
        if text != joined and text.startswith(joined) and texts:
            # What the stream still held back: bytes that never became a character.
            last = max((i for i, token_id in enumerate(token_ids) if int(token_id) not in self._special), default=None)
            if last is not None and not texts[last]:
                texts[last] = text[len(joined) :]
        labels = {i: self._label(int(token_ids[i])) for i, part in enumerate(texts) if not part}
        return TokenTexts(texts=tuple(texts), labels=labels, complete="".join(texts) == text)

    def _step(self, stream: DecodeStream, token_id: int) -> str:
        try:
            return stream.step(self._tokenizer, token_id) or ""
        except Exception:  # noqa: BLE001 boundary: an id that the tokenizer does not have is no reason to lose a page
            return ""

    def _label(self, token_id: int) -> str:
        if token_id in self._special:
            return self._special[token_id]
        piece = self._tokenizer.id_to_token(token_id)
        return (_hex(piece) if piece is not None else None) or f"#{token_id}"


def _spelled() -> dict[str, int]:
    """How byte-level vocabularies spell bytes: printable ones as themselves, the rest from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES = _spelled()


def _hex(piece: str) -> str | None:
    """The bytes that a piece of a vocabulary stands for, if it is one of bytes."""
    if found := _BYTE_TOKEN.fullmatch(piece):
        return found[1].upper()
    if not piece or any(character not in _BYTES for character in piece):
        return None
    return " ".join(f"{_BYTES[character]:02X}" for character in piece)


def as_ids(token_ids: Sequence[int], text: str) -> TokenTexts:
    """Without a tokenizer: each token as its id."""
    labels = {i: f"#{int(token_id)}" for i, token_id in enumerate(token_ids)}
    return TokenTexts(texts=("",) * len(token_ids), labels=labels, complete=not text)


def find_tokenizer(run_dir: Path, config: Mapping[str, Any]) -> TokenReader | None:
    """The tokenizer of a run: in its final policy, in the model it started from, or in the cache; never the network."""
    for file in _candidates(run_dir, config):
        if not file.is_file():
            continue
        try:
            return TokenReader(Tokenizer.from_file(os.fspath(file)))
        except Exception:  # noqa: BLE001 boundary: a tokenizer file of any origin fails in any way
            continue
    return None


def _candidates(run_dir: Path, config: Mapping[str, Any]) -> list[Path]:
    directories = [run_dir / "policy", run_dir / "initial_model"]
    model = config.get("model")
    name = str(model.get("name", "")) if isinstance(model, Mapping) else ""
    files = [directory / "tokenizer.json" for directory in directories]
    if name == SMOLLM2:
        from weaver_rl.models.smollm2 import cache_dir

        files.append(cache_dir() / SMOLLM2 / "tokenizer.json")
    elif name and name != "scratch":
        files.append(Path(str(config.get("base_dir") or ".")) / Path(name).expanduser() / "tokenizer.json")
        files += _in_hub_cache(name, model.get("revision") if isinstance(model, Mapping) else None)
    return files


def _in_hub_cache(name: str, revision: str | None) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer.json", revision=revision)
    except HFValidationError:
        return []
    return [Path(found)] if isinstance(found, str) else []
